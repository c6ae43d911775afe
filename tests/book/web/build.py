# SPDX-License-Identifier: MIT-0
"""Writes the site into build/book: `make book`. Its folder html/ works on any static server.

Nothing is executed: notebooks show their kept outputs. A warning of Sphinx is an error.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import shared_blocks

from web import other_pages, proofs
from web.places import REFERENCE, Places
from web.script_pages import ScriptPages

HERE = Path(__file__).resolve().parent
TO = shared_blocks.ROOT / "build/book"
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "latex2mathml")
NO_SEARCH = "---\nnosearch: true\n---\n\n"  # tests and plain files would hide the chapters


def sources(places: Places) -> dict[str, str]:
    """Every page's source, by its name in the site."""
    scripts = ScriptPages(places)
    texts = {}
    for path in proofs.scripts(places.root):
        texts |= scripts.pages(path)
    for path in proofs.test_files(places.root):
        for page, text in scripts.pages(path).items():
            texts[page] = NO_SEARCH + text
    for name, page in places.docs.items():
        if name.endswith(".md"):
            texts[page] = other_pages.markdown_page(places.root / name, places)
        elif name.endswith(".ipynb"):
            texts[page] = other_pages.notebook_page(places.root / name, places)
    texts["functions.md"] = other_pages.functions_page(places)
    texts["bugs.md"] = other_pages.bugs_page(places)
    while missing := [name for name, page in places.shown.items() if page not in texts]:
        for name in missing:  # a folder shows more files
            plain = other_pages.plain_page(name, places)
            texts[places.shown[name]] = "---\nnosearch: true\norphan: true\n---\n\n" + plain
    return with_contents(texts, places)


# ── Contents ──────────────────────────────────────────────────────────────────────────────────────


def with_contents(texts: dict[str, str], places: Places) -> dict[str, str]:
    """The same pages; those that others belong to list them, for the navigation."""
    chapters = []
    for chapter in places.chapters:
        first, *pages = chapter_pages(chapter, places)
        texts[first] += contents(pages, places)
        chapters.append(first)
    hunts = sorted(page for page in texts if page.startswith("notebooks/00_"))
    course = ["notebooks/index.md", *hunts, "notebooks/projects/index.md"]
    reference = ["GLOSSARY.md", "functions.md", "bugs.md", *(f"{name}.md" for name in REFERENCE)]
    for pages, caption in (chapters, "Chapters"), (course, "Course"), (reference, "Reference"):
        there = [page for page in pages if page in texts]
        texts["index.md"] += contents(there, places, caption)
    return texts


def chapter_pages(chapter: Path, places: Places) -> list[str]:
    """README, the script's parts, tools, tables, notebook, tests: what of them there is."""
    folder = chapter.parent.name
    pages = [places.first_page(chapter)]
    for path in proofs.scripts(places.root):
        if path.parent == chapter.parent:
            pages += places.pages_of(path)
    for start in (f"notebooks/{folder[:3]}", f"tests/test_{folder[:3]}"):
        pages += [page for name, page in places.docs.items() if name.startswith(start)]
    return list(dict.fromkeys(pages))


def contents(pages: list[str], places: Places, caption: str = "") -> str:
    options = f":caption: {caption}\n" if caption else ""
    entries = "".join(entry(page, places) for page in pages)
    return f"\n```{{toctree}}\n:hidden:\n{options}\n{entries}```\n"


def entry(page: str, places: Places) -> str:
    """A page in the navigation, under its chapter: so its title there may be short."""
    name = page.rsplit(".", 1)[0]
    title = places.titles.get(page)
    if match := re.match(r"tests/test_\d\d_(\w+)", name):
        title = f"Tests of {match[1]}"
    elif re.match(r"notebooks/(?!00)\d\d_", name):
        title = "Notebook"
    return f"{title} </{name}>\n" if title else f"/{name}\n"


# ── The command ───────────────────────────────────────────────────────────────────────────────────


def write(to: Path, places: Places) -> None:
    """Sources, pictures and the files that buttons copy."""
    shutil.rmtree(to, ignore_errors=True)
    texts = sources(places)
    lifted = other_pages.lifted_files(places)
    for folder, files in ((to / "source", texts), (to / "extra", lifted)):
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    copied = [*places.root.glob("[0-9][0-9]_*/*.png"), *proofs.scripts(places.root)]
    for path in [*copied, *proofs.test_files(places.root)]:
        there = to / "source" / places.name(path)
        there.parent.mkdir(exist_ok=True)
        shutil.copy(path, there)


def run_sphinx(to: Path) -> list[str]:
    """Its warnings, one a line. Exits where Sphinx does not finish."""
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-j", "auto"]
    command += ["-c", HERE, "-d", to / "doctrees", "-w", to / "warnings.txt"]
    command += [to / "source", to / "html"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr or done.stdout)
    return (to / "warnings.txt").read_text("utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=TO, metavar="FOLDER")
    args = parser.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"the site needs {', '.join(missing)}: pip install -e '.[book]'")
    begin = time.monotonic()
    write(args.to, Places())
    warnings = run_sphinx(args.to)
    site = args.to / "html"
    pages = len(list(site.rglob("*.html")))
    for warning in warnings:
        print(warning)
    seconds = time.monotonic() - begin
    print(f"{site}: {pages} pages, {len(warnings)} warnings, {seconds:.0f} s")
    sys.exit(bool(warnings))


if __name__ == "__main__":
    main()
