# SPDX-License-Identifier: MIT-0
"""The site in a headless Chromium: `make test-book`, which builds it first.

Without a browser these tests are skipped, and one line says how to install it.
"""

import functools
import http.server
import shutil
import threading
from importlib.resources import files
from pathlib import Path

import lift
import pytest
import shared_blocks
from examples import EXAMPLES
from test_lift import loaded

from web import built, sources
from web.places import Places

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[book]'")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
MISSING = "no Chromium, so no page was opened; to install one: make browser"
# One page of each kind; axe-core looks at them in light and dark.
KINDS = [
    "index.html",
    "02_megatron_tp/index.html",
    "02_megatron_tp/megatron_tp.html",
    "02_megatron_tp/1_the_idea.html",
    "02_megatron_tp/pretrain.html",
    "02_megatron_tp/megatron_tp_tables.html",
    "tests/test_02_pretrain.html",
    "notebooks/02_megatron_tp.html",
    "notebooks/index.html",
    "GLOSSARY.html",
    "CLAIMS.html",
    "bugs.html",
    "search.html",
]


def chromium() -> str | None:
    """The system's, or the one that playwright has downloaded."""
    for path in map(shutil.which, BROWSERS):
        if path:
            return path
    with sync_api.sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


CHROMIUM = chromium()
if CHROMIUM is None:
    pytest.skip(MISSING, allow_module_level=True)


@pytest.fixture(scope="module")
def address():
    """Of a static server of the site."""
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": print_nothing})
    at_site = functools.partial(handler, directory=built.HTML)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), at_site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def print_nothing(*args) -> None:
    pass


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def seen():
    """What the browser complained of, and what it asked other servers for."""
    return []


@pytest.fixture(scope="module")
def page(browser, address, seen):
    """One tab for all tests of this file."""
    context = browser.new_context(
        viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    page.set_default_timeout(120_000)  # milliseconds: a busy machine is slow

    def on_request(request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            seen.append(f"asks for {request.url}")

    def on_console(message) -> None:
        if message.type in ("error", "warning"):
            seen.append(f"{message.type}: {message.text}")

    page.on("request", on_request)
    page.on("console", on_console)
    page.on("pageerror", lambda error: seen.append(str(error)))
    yield page
    context.close()


BROKEN_PICTURES = """() => [...document.images]
    .filter(image => !(image.complete && image.naturalWidth > 0))
    .map(image => image.src.slice(0, 200))"""
TOO_WIDE = """() => document.documentElement.scrollWidth > window.innerWidth
    ? [...document.querySelectorAll("article *")]
        .filter(e => e.getBoundingClientRect().right > window.innerWidth)
        .map(e => e.outerHTML.slice(0, 100)).slice(0, 5).concat("too wide") : []"""


def faults_of(page) -> list[str]:
    """Of the page that is open: pictures that did not load, and what is wider than a phone."""
    page.set_viewport_size(PHONE)
    page.evaluate("() => document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_load_state("networkidle") if page.evaluate(BROKEN_PICTURES) else None
    found = page.evaluate(BROKEN_PICTURES) + page.evaluate(TOO_WIDE)
    page.set_viewport_size(DESKTOP)
    return found


@pytest.mark.parametrize(
    "name", [path.relative_to(built.HTML).as_posix() for path in built.pages()]
)
def test_a_page(name, page, address, seen):
    """No error, nothing from another server, every picture, no sideways scroll on a phone."""
    seen.clear()
    page.goto(address + name)
    found = faults_of(page)
    assert not found + seen


def test_faults_are_found(page, address, seen):
    seen.clear()
    page.goto(address + "index.html")
    page.evaluate("""() => {
        document.querySelector("article").innerHTML +=
            '<img src="no.png"><div style="width: 2000px">wide</div>'; console.error("wrong") }""")
    found = " ".join(faults_of(page) + seen)
    assert "no.png" in found and "too wide" in found and "wrong" in found
    seen.clear()
    page.evaluate("() => fetch('http://127.0.0.2:9/').catch(() => 0)")
    assert "asks for http://127.0.0.2:9/" in seen


# ── What a reader does ────────────────────────────────────────────────────────────────────────────


def test_the_search_finds_reduce_scatter(page, address):
    """The chapters that use it are among the results, and tests are not."""
    page.goto(f"{address}search.html?q=reduce-scatter")
    page.wait_for_selector("#search-results .search-summary:has-text('finished')")
    found = [a.get_attribute("href") for a in page.query_selector_all("#search-results li > a")]
    pages = " ".join(found)
    assert "04_seq_parallel/" in pages and "GLOSSARY.html" in pages
    assert not [link for link in found if link.startswith(("tests/", "files/"))]
    page.goto(f"{address}search.html?q=nosuchwordatall")
    page.wait_for_selector("#search-results p.search-summary:has-text('did not match')")


def copied_in_each_chapter() -> list:
    """The first function of each chapter that has an example."""
    found = []
    for path in shared_blocks.chapters():
        names = [name for name in sources.own(path) if name in EXAMPLES.get(path.stem, {})]
        if names:
            found.append(pytest.param(path, names[0], id=f"{path.stem}-{names[0]}"))
    return found


@pytest.mark.parametrize("path, name", copied_in_each_chapter())
def test_what_the_button_copies_runs_alone(path, name, page, address, tmp_path):
    places = Places()
    pages = [built.page(built.HTML / p.replace(".md", ".html")) for p in places.pages_of(path)]
    (there,) = (found for found in pages if f"{path.stem}.{name}" in found.ids)
    page.goto(address + there.name)
    page.evaluate("() => navigator.clipboard.writeText('')")
    button = page.locator(f"button[data-lifted$='/{path.stem}/{name}.py']")
    button.click()
    page.wait_for_function("b => b.textContent == 'Copied'", arg=button.element_handle())
    text = page.evaluate("() => navigator.clipboard.readText()")
    assert text == lift.lift(path, name)
    EXAMPLES[path.stem][name](loaded(text, name), tmp_path)


def test_a_functions_tests_open(page, address):
    page.goto(address + "02_megatron_tp/1_the_idea.html#megatron_tp.copy_to_tp")
    bar = page.locator(".function-bar", has=page.locator("a.name", has_text="copy_to_tp")).first
    link = bar.locator("a", has_text="without copy").first
    assert not link.is_visible()
    bar.locator("summary", has_text="planted bug").click()
    link.click()
    page.wait_for_url("**/tests/test_02_megatron_tp.html#*test-without-copy")


# ── For every reader ──────────────────────────────────────────────────────────────────────────────


AXE = files("axe_playwright_python").joinpath("axe.min.js")
RUN_AXE = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
    .filter(v => ["serious", "critical"].includes(v.impact))
    .map(v => `${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))}`)"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", KINDS)
def test_axe_finds_no_serious_fault(name, theme, page, address):
    page.goto(address + name)
    page.evaluate(f"() => document.documentElement.dataset.theme = '{theme}'")
    page.wait_for_timeout(300)  # colours fade
    page.add_script_tag(content=AXE.read_text("utf-8"))
    assert page.evaluate(RUN_AXE) == []


def test_axe_finds_a_fault(page, address):
    page.goto(address + "index.html")
    page.evaluate("() => document.querySelector('article').innerHTML += '<img src=\"x.png\">'")
    page.add_script_tag(content=AXE.read_text("utf-8"))
    assert any("image-alt" in fault for fault in page.evaluate(RUN_AXE))
