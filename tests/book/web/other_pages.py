# SPDX-License-Identifier: MIT-0
"""Pages that are no scripts: Markdown files, notebooks, lists of functions and of bugs, files."""

import ast
import json
import re
from pathlib import Path

import lift

from web import proofs, prose, sources
from web.places import Places, relative, target
from web.script_pages import lifted, lifted_file, seen_in, sentence

TERMS = re.compile(r"^- [^:]+:", re.MULTILINE)  # before the colon of an entry
TERM = re.compile(r"\*\*(.+?)\*\*")
LANGUAGES = {".py": "python", ".json": "json", ".yml": "yaml", ".toml": "toml", ".cff": "yaml"}
LONGEST = 3000  # lines of a plain file that are shown


def markdown_page(path: Path, places: Places) -> str:
    text = places.rewritten(path.read_text("utf-8"), path)
    # One comment a line would end a paragraph: these only mark what a command fills in.
    text = re.sub(r"<!--.*?-->", "", text)
    return with_terms(text) if path.name == "GLOSSARY.md" else text


def with_terms(text: str) -> str:
    """The glossary with an anchor for each term: GLOSSARY.html#term-all-reduce."""

    def anchored(match: re.Match) -> str:
        return TERM.sub(lambda term: f"[{term[0]}]{{#{term_id(term[1])}}}", match[0])

    return TERMS.sub(anchored, text)


def term_id(term: str) -> str:
    return "term-" + re.sub(r"\W+", "-", term.lower()).strip("-")


def notebook_page(path: Path, places: Places) -> str:
    """The notebook as it is kept; links in its text lead to pages."""
    notebook = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = places.rewritten("".join(cell["source"]), path)
            cell["source"] = text.splitlines(keepends=True)
    # Python's own lexer also colours the cells that begin with %%px.
    notebook["metadata"]["language_info"]["pygments_lexer"] = "python3"
    return json.dumps(notebook, ensure_ascii=False)


# ── Lists ─────────────────────────────────────────────────────────────────────────────────────────


def functions_page(places: Places) -> str:
    """Every public function, by script, with the first sentence of its docstring."""
    text = "# Functions and classes to copy\n\n"
    text += (
        "Each name leads to its code, its tests and a button that copies it with all it needs.\n"
    )
    for path in sorted(proofs.scripts(places.root), key=lambda path: chapter_first(path, places)):
        page = places.docs[places.name(path)]
        rows = [
            f"- {{py:obj}}`{name} <{path.stem}.{name}>`{about(path, name)}"
            for name in sources.own(path)
        ]
        if rows:
            name = places.name(path)
            text += f"\n## [{name}]({relative('functions.md', page)})\n\n" + "\n".join(rows) + "\n"
    return text


def chapter_first(path: Path, places: Places) -> tuple:
    return path.parent.name, path not in places.chapters, path.stem.endswith("_tables"), path.stem


def about(path: Path, name: str) -> str:
    """The first sentence of a docstring, after a colon."""
    (definition, *_) = lift.read(path).named(name)
    doc = ast.get_docstring(definition.node) or ""
    first = re.split(r"(?<=\.) |\n\n", doc, maxsplit=1)[0].rstrip(".")
    return ": " + prose.inline(" ".join(first.split()), lambda found: None) if first else ""


def bugs_page(places: Places) -> str:
    """Every planted bug: what a user sees, and where it was seen."""
    bugs = proofs.planted_bugs(places.root)
    seen = sum(bool(bug.seen_in) for bug in bugs)
    text = (
        f"# Planted bugs\n\n{len(bugs)} tests each take one safeguard away and show what a user "
        f"would see of it. {seen} of these bugs were seen in public projects.\n\n"
        "`make bugs` runs them, and prints for each what the loss shows and what a check of the "
        "gradients shows. [A notebook](notebooks/00_find_the_bug.ipynb) has bugs to find.\n"
    )
    for chapter in places.chapters:
        number = chapter.parent.name[:2]
        own = [bug for bug in bugs if bug.path.stem.startswith(f"test_{number}_")]
        if own:
            title = title_of(chapter, places)
            text += f"\n## {title}\n\n| without the safeguard | what a user sees |\n|---|---|\n"
            text += "".join(map(bug_row, own))
    return text


def bug_row(bug: proofs.Test) -> str:
    title = prose.escaped(bug.title)
    return f"| [{title}](#{target(bug.label)}) | {sentence(bug)}{seen_in(bug)} |\n"


def title_of(chapter: Path, places: Places) -> str:
    """A chapter's title, from its README, with a link."""
    readme = chapter.parent / "README.md"
    if not readme.is_file():
        return chapter.parent.name
    title = readme.read_text("utf-8").splitlines()[0].removeprefix("# ")
    return f"[{title}]({places.first_page(chapter)})"


# ── Plain files ───────────────────────────────────────────────────────────────────────────────────


def plain_page(name: str, places: Places) -> str:
    """A file as it is, or what is in a folder."""
    path = places.root / name
    page = places.shown[name]
    if path.is_dir():
        entries = [entry for entry in sorted(path.iterdir()) if entry.suffix in LANGUAGES]
        links = [f"- [{e.name}]({relative(page, places.page_of(e))})\n" for e in entries]
        return f"# {name}/\n\n{''.join(links)}"
    text = path.read_text("utf-8")
    fence = "`" * 4
    language = LANGUAGES.get(path.suffix, "text")
    lines = text.splitlines()[:LONGEST]
    return f"# {name}\n\n{fence}{{code-block}} {language}\n\n" + "\n".join(lines) + f"\n{fence}\n"


def lifted_files(places: Places) -> dict[str, str]:
    """What the buttons copy: a file for each public function, as `make lift` prints it."""
    return {
        lifted_file(path, name): lifted(path, name)
        for path in proofs.scripts(places.root)
        for name in sources.own(path)
    }
