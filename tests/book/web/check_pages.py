# SPDX-License-Identifier: MIT-0
"""The site without a browser: `make test-book`, which builds it first."""

import re

import lift
import pytest
import shared_blocks

from web import built, proofs, sources
from web.places import Places

PLACES = Places()
CHAPTERS = shared_blocks.chapters()
SCRIPTS = proofs.scripts()
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def dead_links(page: built.Page) -> list[str]:
    """Links to pages, files and anchors that are not there."""
    dead = []
    for address in page.links:
        if built.is_elsewhere(address) or address == "#":
            continue
        file = page.file(address)
        _, _, anchor = address.partition("#")
        if not file.is_file():
            dead.append(address)
        elif anchor and file.suffix == ".html" and anchor not in built.page(file).ids:
            dead.append(address)
    return dead


def test_no_link_is_dead():
    assert len(built.pages()) > 100, "build the site first: make book"
    dead = {path.name: found for path in built.pages() if (found := dead_links(built.page(path)))}
    assert not dead


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "there.html").write_text('<p id="here">')
    text = '<a href="there.html#here"><a href="there.html#no"><a href="no.html"><a href="#no">'
    (tmp_path / "page.html").write_text(text)
    assert dead_links(built.Page(tmp_path / "page.html")) == ["there.html#no", "no.html", "#no"]


def test_every_file_that_a_page_loads_is_there_and_its_own():
    """Pictures, scripts and styles: the site works without a network."""
    for path in built.pages():
        page = built.page(path)
        for address in page.loads:
            assert not built.is_elsewhere(address), f"{page.name} loads {address}"
            assert address.startswith("data:image/") or page.file(address).is_file(), address
    for style in built.HTML.rglob("*.css"):
        loaded = re.findall(r"url\([\"']?([^)\"']+)|@import", style.read_text("utf-8"))
        assert not [address for address in loaded if built.is_elsewhere(address)], style


def test_the_next_page_leads_through_the_book_in_order():
    """From the first page through every page of the navigation, chapter by chapter."""
    page = built.page(built.HTML / "index.html")
    visited = []
    while page.next:
        page = built.page(page.file(page.next))
        assert page.name not in visited
        visited.append(page.name)
    assert visited[0] == f"{CHAPTERS[0].parent.name}/index.html"
    first = [name for name in visited if re.fullmatch(r"\d\d_\w+/index.html", name)]
    assert first == [f"{path.parent.name}/index.html" for path in CHAPTERS]
    for path in [*SCRIPTS, *proofs.test_files()]:
        assert {html(page) for page in PLACES.pages_of(path)} <= set(visited)


def html(source: str) -> str:
    return source.rsplit(".", 1)[0] + ".html"


@each_script
def test_every_public_function_has_an_anchor_and_a_copy(path):
    pages = [built.page(built.HTML / html(source)) for source in PLACES.pages_of(path)]
    for name in sources.own(path):
        (page,) = (page for page in pages if f"{path.stem}.{name}" in page.ids)
        (copy,) = (found for found in page.lifted if found.endswith(f"/{path.stem}/{name}.py"))
        assert page.file(copy).read_text("utf-8") == lift.lift(path, name)


@each_script
def test_the_pages_have_each_line_of_the_script_once(path):
    """Carried blocks stand at their home."""
    pages = [built.page(built.HTML / html(source)) for source in PLACES.pages_of(path)]
    text = "\n".join(page.text for page in pages)
    source = sources.read(path)
    for piece in source.pieces:
        if isinstance(piece, sources.Code):
            assert text.count(f"\n{source.text(piece)}\n".lstrip("\n")) == 1, source.text(piece)
    for name in lift.public(path):
        definition = lift.read(path).named(name)[0].node
        line = source.lines[definition.lineno - 1]
        is_own = sources.home_of(path)[name] == path
        assert text.count(f"{line}\n") == (1 if is_own else 0), line


def test_bugs_have_their_symptom_and_their_public_occurrence():
    page = built.page(built.HTML / "bugs.html")
    bugs = proofs.planted_bugs()
    assert len(bugs) > 50
    anchors = {link.partition("#")[2] for link in page.links}
    for bug in bugs:
        assert bug.seen_in is None or bug.seen_in in page.links
        assert re.sub(r"[^a-z0-9]+", "-", bug.label.lower()) in anchors


TERMS = """replicated, sharded, shard, partial sum, device mesh, token, token id, vocabulary entry,
embedding table, element, matmul, GEMM, transposed, mantissa, tensor core, upcast, in flight,
expert capacity, initial weights, train split, eval split, sublayer, reduce-scatter"""


def test_the_glossary_has_the_books_terms():
    """Each with an anchor, and a link to the chapter that explains it."""
    ids = built.page(built.HTML / "GLOSSARY.html").ids
    for term in TERMS.replace("\n", " ").split(", "):
        assert f"term-{term.replace(' ', '-').lower()}" in ids, term
