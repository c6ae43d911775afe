# SPDX-License-Identifier: MIT-0
"""Which page of the site shows which file of the repository, and links between pages.

A page is named by its source: 02_megatron_tp/1_the_idea.md becomes the .html of that name.
A chapter's script is a page for each of its parts. A file that a page links to and that is no page
of its own is shown as it is, under files/.
"""

import posixpath
import re
from pathlib import Path

import lift
import shared_blocks

from web import proofs, prose, sources

LINK = re.compile(r"\]\(([^)\s]+)\)")
OVERVIEW = "The problem, the idea, notation"  # the first page of a chapter's script
REFERENCE = "CLAIMS COMBINE DIFFERENCES CLUSTER INSTALL CONTRIBUTING".split()


def slug(title: str) -> str:
    """The idea → the_idea: part of an address."""
    words = re.findall(r"\w+", title.lower())
    return "_".join(words[:5])


def target(name: str) -> str:
    """A name for MyST's (name)=, which ignores case."""
    return name.lower()


class Places:
    """docs: a file's path in the repository to its page's source. shown: files linked to."""

    def __init__(self, root: Path = shared_blocks.ROOT):
        self.root = root
        self.known: dict[Path, dict[str, str]] = {}
        self.docs: dict[str, str] = {}
        self.parts: dict[tuple[str, str], str] = {}  # ("megatron_tp", "1") to a page
        self.titles: dict[str, str] = {}  # of the pages of chapters' scripts, in the navigation
        self.sections: set[tuple[str, str]] = set()  # ("megatron_tp", "1.2"): there is one
        self.shown: dict[str, str] = {}
        self.chapters = shared_blocks.chapters(root)
        for path in [
            *root.glob("*.md"),
            *root.glob("[0-9n]*/*.md"),
            *root.glob("notebooks/*/*.md"),
            *root.glob("notebooks/*.ipynb"),
        ]:
            name = self.name(path)
            self.docs[name] = re.sub(r"README(?=\.md$)", "index", name)
        for path in proofs.scripts(root):
            self.docs[self.name(path)] = self.name(path).replace(".py", ".md")
            self.add_parts(path)
        for path in proofs.test_files(root):
            self.docs[self.name(path)] = f"tests/{path.stem}.md"

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def add_parts(self, path: Path) -> None:
        folder = path.parent.name
        is_chapter = path in self.chapters
        page = self.docs[self.name(path)]
        if is_chapter:
            self.titles[page] = OVERVIEW
        for piece in sources.read(path).pieces:
            if not isinstance(piece, sources.Heading) or not piece.number:
                continue
            if is_chapter and piece.is_part and piece.number != "0":
                page = f"{folder}/{piece.number}_{slug(piece.title)}.md"
                self.titles[page] = f"{piece.number} {piece.title}"
            if piece.is_part:
                self.parts[path.stem, piece.number] = page
            self.sections.add((path.stem, piece.number))

    def pages_of(self, path: Path) -> list[str]:
        """The sources of a script's pages, in order."""
        pages = [page for (stem, _), page in self.parts.items() if stem == path.stem]
        return list(dict.fromkeys([self.docs[self.name(path)], *pages]))

    def chapter(self, number: int) -> Path | None:
        for path in self.chapters:
            if path.parent.name.startswith(f"{number:02}_"):
                return path
        return None

    def first_page(self, chapter: Path) -> str:
        """A chapter's README, or its script where it has none."""
        readme = chapter.parent / "README.md"
        return self.docs[self.name(readme if readme.is_file() else chapter)]

    # ── Links ─────────────────────────────────────────────────────────────────────────────────────

    def page_of(self, path: Path) -> str | None:
        """The page that shows a file or a folder; None where there is no such file."""
        if path.is_dir() and (path / "README.md").exists():
            path = path / "README.md"
        if not path.exists() or not path.is_relative_to(self.root):
            return None
        name = self.name(path)
        if name in self.docs:
            return self.docs[name]
        self.shown[name] = f"files/{name.lstrip('.')}.md"
        return self.shown[name]

    def rewritten(self, text: str, path: Path) -> str:
        """The Markdown of a file, with its links to files as links to their pages."""
        page = self.page_of(path)

        def replace(match: re.Match) -> str:
            file, _, anchor = match[1].partition("#")
            there = (path.parent / file).resolve()
            if not file or "://" in file or file.endswith(".png"):
                return match[0]
            found = self.page_of(there)
            if found is None:
                return match[0]
            address = relative(page, found)
            return f"]({address}#{anchor})" if anchor else f"]({address})"

        return LINK.sub(replace, text)

    def link_in(self, path: Path, page: str) -> prose.Link:
        """How the prose of a script links: from `page`, where the text stands."""
        objects = self.objects(path)

        def link(found: str) -> str | None:
            if match := prose.CHAPTER.fullmatch(found):
                return self.link_to_chapter(found, int(match[1]), match[2] or "", page)
            if re.search(r"\.(py|md|ipynb|json)$", found):
                return self.link_to_file(found, path, page)
            name = found.removesuffix("()")
            return reference(name, objects[name]) if name in objects else None

        return link

    def link_to_file(self, found: str, path: Path, page: str) -> str | None:
        """A file is named by its path in the repository, or in the folder of who names it."""
        for folder in (path.parent, self.root, self.root / "notebooks"):
            if (folder / found).is_file():
                there = relative(page, self.page_of(folder / found))
                return f"[`{found}`]({there})"
        return None

    def link_to_chapter(self, found: str, number: int, section: str, page: str) -> str | None:
        script = self.chapter(number)
        if script is None:
            return None
        if (script.stem, section) in self.sections:
            label = target(f"{script.stem}-{section}")
            return f"[{found}](#{label})"
        there = self.first_page(script)
        return f"[{found}]({relative(page, there)})"

    def objects(self, path: Path) -> dict[str, str]:
        """Each public name that a script's prose may mean, to where it is defined."""
        if path in self.known:
            return self.known[path]
        found = self.known[path] = {}
        scripts = [script for script in (lift.chapter_of(path), path) if script.is_file()]
        for script in scripts:
            homes = sources.home_of(script)
            for name in lift.public(script):
                full = f"{homes[name].stem}.{name}"
                found[name] = full
                found[f"{script.stem}.{name}"] = full
        return found


def reference(name: str, full: str) -> str:
    """A link to a function or class."""
    return f"{{py:obj}}`{name} <{full}>`"


def relative(page: str, there: str) -> str:
    return posixpath.relpath(there, posixpath.dirname(page) or ".")
