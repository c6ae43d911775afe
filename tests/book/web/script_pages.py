# SPDX-License-Identifier: MIT-0
"""Scripts as pages: a chapter's has one for each part, a tool's, a table's or a test's is one page.

Prose comes from comments, code stands below it. Each public function has an anchor and a bar with
its tests, its planted bugs and a button that copies it with all it needs.
"""

import html
import posixpath
import re
from functools import lru_cache
from pathlib import Path

import lift
import shared_blocks

from web import proofs, prose, sources
from web.places import OVERVIEW, Places, reference, relative, target
from web.proofs import Test
from web.sources import Block, Code, Heading, Prose, Source

LIFTED = "lifted"  # the folder of the files that the buttons copy


class ScriptPages:
    """Writes the pages of scripts. carriers: a block's name to the chapters that carry it."""

    def __init__(self, places: Places):
        self.places = places
        self.proofs = proofs.proofs(places.root)
        self.bugs = {test.label: test for test in proofs.planted_bugs(places.root)}
        self.carriers: dict[str, list[Path]] = {}
        for path in places.chapters:
            for region in shared_blocks.parse(path)[0]:
                if region.kind == "carried":
                    self.carriers.setdefault(region.name, []).append(path)

    def pages(self, path: Path) -> dict[str, str]:
        """A script's pages: their sources' names to their text."""
        source = sources.read(path)
        page = first = self.places.docs[self.places.name(path)]
        is_chapter = path in self.places.chapters
        texts = {first: self.top(source, first, is_chapter)}
        for piece in source.pieces:
            if isinstance(piece, Heading):
                page = self.places.parts.get((path.stem, piece.number), page)
                if page not in texts:
                    texts[page] = part(piece, path) + self.origin(source, page)
                else:
                    texts[page] += heading(piece, path, 2 if piece.is_part or is_chapter else 3)
            else:
                texts[page] += self.written(piece, source, page)
        return texts

    def top(self, source: Source, page: str, is_chapter: bool) -> str:
        """The title and the docstring."""
        first, _, rest = source.docstring.partition("\n\n")
        link = self.places.link_in(source.path, page)
        title = source.path.name
        if is_chapter:
            title = f"Chapter {number_of(source.path)}. {OVERVIEW}"
            first = re.sub(r"^Chapter \d+\. ", "", first)
        text = f"# {title}\n\n{self.origin(source, page)}"
        text += "{.lead}\n" + prose.markdown(first.splitlines(), link)
        return text + "\n" + prose.markdown(rest.splitlines(), link) + "\n"

    def origin(self, source: Source, page: str) -> str:
        """One line: of which file this page is a part."""
        name = self.places.name(source.path)
        file = posixpath.relpath(name, posixpath.dirname(page))
        return f"{{.origin}}\nFrom {{download}}`{name} <{file}>`\n\n"

    def written(self, piece: sources.Piece, source: Source, page: str) -> str:
        if isinstance(piece, Prose):
            return prose.markdown(piece.lines, self.places.link_in(source.path, page)) + "\n"
        if isinstance(piece, Block):
            return self.block(piece.region, page)
        text = source.text(piece)
        code = f"```{{code-block}} python\n\n{text}\n```\n\n"
        if not piece.name:
            return code
        if source.path.stem.startswith("test_"):
            return (
                code
                if not piece.name.startswith("test_")
                else self.test_head(piece.name, source.path) + code
            )
        return self.bar(piece, source, page) + code

    # ── Regions ───────────────────────────────────────────────────────────────────────────────────

    def block(self, region: shared_blocks.Region, page: str) -> str:
        """A carried block is a line that links to its home; at home a line says who carries it."""
        label = target(f"block-{region.name}").replace(" ", "-")
        if region.kind == "carried":
            lines = region.body.count("\n")
            there = f"#{label}"
            home = lift.home_of_block(region)
            is_marked = region.name in lift.homes()
            if not is_marked or home not in shared_blocks.chapters():  # a tool's page is one block
                first = self.places.first_page(home)
                there = relative(page, first)
            chapter = int(region.home[:2])
            where = f"[chapter {chapter}]({there})"
            name = region.name[0].upper() + region.name[1:]
            return f"{{.carried}}\n{name}, {lines} lines: word for word as in {where}.\n\n"
        carriers = [self.chapter_link(path, page) for path in self.carriers.get(region.name, [])]
        if not carriers:
            return f"({label})=\n\n"
        those = "chapters " + listed(carriers) if len(carriers) > 1 else "chapter " + carriers[0]
        return f"({label})=\n{{.shared}}\nShared block **{region.name}**; also in {those}.\n\n"

    def chapter_link(self, path: Path, page: str) -> str:
        there = relative(page, self.places.first_page(path))
        return f"[{number_of(path)}]({there})"

    # ── Functions and tests ───────────────────────────────────────────────────────────────────────

    def bar(self, code: Code, source: Source, page: str) -> str:
        """The anchor of a public function, the button, its tests and its planted bugs."""
        stem = source.path.stem
        full = f"{stem}.{code.name}"
        kind = "class" if code.is_class else "function"
        up = "../" * page.count("/")
        file = f"{up}{lifted_file(source.path, code.name)}"
        lines = lifted(source.path, code.name).count("\n")
        command = f"make lift FROM={lift.label(source.path)} NAME={code.name}"
        text = f"```{{py:{kind}}} {full}\n:no-typesetting:\n```\n\n"
        text += (
            f'<div class="function-bar" id="{full}">\n'
            f'<a class="name" href="#{full}">{code.name}</a>\n'
            f'<span class="copies"><button type="button" data-lifted="{file}" '
            f'title="{html.escape(command)}">Copy with all it needs</button>\n'
            f'<a class="lifted" href="{file}">{lines} lines</a></span>\n'
        )
        return text + self.proof(code.name, source) + "\n</div>\n\n"

    def proof(self, name: str, source: Source) -> str:
        found = self.proofs.get((source.path.stem, name), [])
        tests = [test for test in found if not test.is_bug]
        bugs = [test for test in found if test.is_bug]
        text = details("test", tests) + details("planted bug", bugs)
        if found:
            return text
        users = proofs.users(source.path, name, self.proofs)
        stem = source.path.stem
        public = lift.public(source.path)
        links = [reference(user, f"{stem}.{user}") for user in users if user in public]
        if links:
            return f"\n{{.through}}\nTested through {listed(links)}\n"
        return "\n{.through}\nTested with the whole script\n"

    def test_head(self, name: str, path: Path) -> str:
        """The anchor of a test; of a planted bug what a user sees of it."""
        text = f"({target(f'{path.stem}-{name}')})=\n"
        bug = self.bugs.get(f"{path.stem}-{name}")
        if bug is None:
            return text
        return f"{text}{{.planted-bug}}\n**Planted bug.** {sentence(bug)}{seen_in(bug)}\n\n"


def number_of(path: Path) -> int:
    return int(path.parent.name[:2])


def part(piece: Heading, path: Path) -> str:
    """The title of a page; the results of a search show it alone."""
    title = prose.escaped(f"Chapter {number_of(path)}, part {piece.number}. {piece.title}")
    label = target(f"{path.stem}-{piece.number}")
    return f"({label})=\n# {title}\n\n"


def heading(piece: Heading, path: Path, level: int) -> str:
    title = prose.escaped(f"{piece.number} {piece.title}".strip())
    text = "#" * level + f" {title}\n\n"
    is_test = path.stem.startswith("test_")  # two of its headings may have one number
    if is_test or not piece.number:
        return text
    label = target(f"{path.stem}-{piece.number}")
    return f"({label})=\n{text}"


def details(kind: str, tests: list[Test]) -> str:
    """A list of links that opens."""
    if not tests:
        return ""
    kinds = kind if len(tests) == 1 else kind + "s"
    text = f"<details><summary>{len(tests)} {kinds}</summary>\n\n"
    for test in tests:
        title = prose.escaped(test.title)
        symptom = f": {sentence(test)}{seen_in(test)}" if test.is_bug else ""
        text += f"- [{title}](#{target(test.label)}){symptom}\n"
    return text + "\n</details>\n"


def sentence(bug: Test) -> str:
    """What a user sees, as a sentence."""
    text = bug.symptom[0].upper() + bug.symptom[1:]
    if text[-1] not in ".!?":
        text += "."
    return prose.inline(text, lambda name: None)


def seen_in(bug: Test) -> str:
    """The public occurrence, if it had one."""
    if not bug.seen_in:
        return ""
    short = bug.seen_in.removeprefix("https://").removeprefix("github.com/")
    return f" Seen in [{prose.escaped(short)}]({bug.seen_in})."


def listed(words: list[str]) -> str:
    *first, last = words
    return ", ".join(first) + " and " + last if first else last


@lru_cache
def lifted(path: Path, name: str) -> str:
    return lift.lift(path, name)


def lifted_file(path: Path, name: str) -> str:
    return f"{LIFTED}/{path.parent.name}/{path.stem}/{name}.py"
