# SPDX-License-Identifier: MIT-0
"""Settings of Sphinx for the site. No page loads anything from another server."""

import shutil
from pathlib import Path

import latex2mathml.converter
import matplotlib
from docutils import nodes

HERE = Path(__file__).resolve().parent

project = "Training at scale"
author = "the authors of Training at scale"
html_title = "Training at scale, paper by paper"
extensions = ["myst_nb"]
root_doc = "index"
language = "en"

myst_enable_extensions = ["attrs_inline", "attrs_block", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_ipywidgets_js = {}

html_theme = "sphinx_book_theme"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_js_files = [("book.js", {"defer": "defer"})]
html_favicon = "static/icon.svg"
html_context = {"default_mode": "auto"}
html_extra_path = []
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_domain_indices = False
html_theme_options = {
    "show_navbar_depth": 1,
    "max_navbar_depth": 2,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "footer_content_items": ["author"],
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def inline_math(self, node) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def display_math(self, node) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext(), display="block"))
    raise nodes.SkipNode


def add_files(app) -> None:
    """The files that buttons copy, and a font in which sketches keep their columns."""
    app.config.html_extra_path = [str(Path(app.srcdir).parent / "extra")]
    fonts = Path(app.outdir) / "_static/fonts"
    fonts.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", fonts)


def mark_short_cells(app, doctree) -> None:
    """Cells like 28 s and 1e-7, which a narrow table would break in two."""
    for cell in doctree.findall(nodes.entry):
        if len(cell.astext()) <= 8:
            cell["classes"].append("short")


def setup(app) -> None:
    """Formulas become MathML, which browsers display without a script."""
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("builder-inited", add_files)
    app.connect("doctree-read", mark_short_cells)


html_math_renderer = "mathml"
