# SPDX-License-Identifier: MIT-0
"""The site as it was built: its pages, and what each of them has and refers to."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from web.build import TO

HTML = TO / "html"
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}


@dataclass
class Page(HTMLParser):
    """One page. links: of <a>. loads: what a browser fetches to display it."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    lifted: list[str] = field(default_factory=list)  # what its buttons copy
    next: str = ""  # the page after this one
    text: str = ""

    def __post_init__(self):
        super().__init__()
        self.skips = False
        self.feed(self.path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = {name: value or "" for name, value in attributes}
        self.skips = tag in ("script", "style")
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
            if "right-next" in found.get("class", ""):
                self.next = found["href"]
        if tag in LOADS and LOADS[tag] in found:
            self.loads.append(found[LOADS[tag]])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(found["href"])
        if "data-lifted" in found:
            self.lifted.append(found["data-lifted"])

    def handle_data(self, data: str) -> None:
        if not self.skips:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.skips = False

    def file(self, address: str) -> Path:
        """What an address of this page stands for."""
        path, _, _ = address.partition("#")
        path, _, _ = path.partition("?")
        return (self.path.parent / unquote(path)).resolve() if path else self.path

    @property
    def name(self) -> str:
        return self.path.relative_to(HTML).as_posix()


@lru_cache
def page(path: Path) -> Page:
    return Page(path)


def pages() -> list[Path]:
    return sorted(path for path in HTML.rglob("*.html") if "_static" not in path.parts)


def is_elsewhere(address: str) -> bool:
    """On another server, or by mail."""
    return bool(re.match(r"(https?:)?//|mailto:", address))
