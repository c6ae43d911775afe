# SPDX-License-Identifier: MIT-0
"""How notebooks read: what each begins with, and what its figures say to whom."""

import base64
import html
import io
import itertools
import json
import re

import figures
import front_door
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image

import notebooks

NOTEBOOKS = {path.stem: path for path in notebooks.notebooks()}
IMAGE = re.compile(r"<img\b[^>]*>")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cell_says_what_a_reader_needs(name):
    """Goals; prerequisites, with the mathematics; minutes: measured to run, estimated to read."""
    text = read(name).cells[0].source
    lines = dict(re.findall(r"^- \*\*(\w+)\*\*: (.+)$", text, re.MULTILINE))
    assert list(lines) == ["Goals", "Prerequisites", "Minutes"]
    assert "chapter" in lines["Prerequisites"] and "Mathematics: " in lines["Prerequisites"]
    stated = re.fullmatch(
        r"(\d+) to run, measured on two CPU cores\. About \d+ to read it and to solve the "
        r"exercises, a reader's estimate\.",
        lines["Minutes"],
    )
    seconds = json.loads(front_door.KEPT.read_text("utf-8"))["notebooks"][name]
    assert int(stated[1]) == max(1, round(seconds / 60))


# ── Figures ───────────────────────────────────────────────────────────────────────────────────────


def without_text(notebook: nbformat.NotebookNode) -> list[str]:
    """The images of a notebook that say nothing to readers who cannot see them."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found += re.findall(r"!\[\s*\]\([^)]*\)", cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            found += [kind for kind in data if kind.startswith("image/")]  # no text is displayed
            for image in IMAGE.findall(data.get("text/html", "")):
                alt = re.search(r'\balt="([^"]*)"', image)
                found += [] if alt and len(alt[1]) > 40 else [image[:40]]
    return found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_figure_has_a_text(name):
    assert not without_text(read(name))


def test_a_figure_without_a_text_is_told():
    def of(**data):
        output = nbformat.v4.new_output("display_data", data)
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])

    assert without_text(of(**{"image/png": "", "text/plain": "a figure that shows one thing"}))
    assert without_text(of(**{"text/html": '<img src="x">'}))
    assert without_text(of(**{"text/html": '<img src="x" alt="a figure">'}))
    assert not without_text(of(**{"text/html": f'<img src="x" alt="{"what it shows. " * 4}">'}))
    cells = [nbformat.v4.new_markdown_cell("![](a.png)")]
    assert without_text(nbformat.v4.new_notebook(cells=cells))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_that_draw_are_folded(name):
    """And they name the colours of figures.COLORS, or greys and shades, but no default ones."""
    for cell in read(name).cells:
        if cell.cell_type == "code" and "figures.show(" in cell.source:
            assert cell.metadata["jupyter"]["source_hidden"]
        assert not re.search(r"""["'](tab:\w+|crimson|red|green)["']|tab10|tab20""", cell.source)


def test_show(monkeypatch):
    """A figure is displayed once, at two pixels for each of the screen, with its text."""
    shown = []
    monkeypatch.setattr(figures, "display", lambda data, raw: shown.append(data))
    figure, axis = plt.subplots(figsize=(4, 2), layout="constrained")
    axis.plot([0, 1], label='"one" < two')
    figures.show(figure, 'A line of "one" < two.')
    (data,) = shown
    assert not plt.fignum_exists(figure.number)  # or the notebook would display it again
    assert data["text/plain"] == 'A line of "one" < two.'
    image = IMAGE.fullmatch(data["text/html"])[0]
    assert html.unescape(re.search(r'alt="([^"]*)"', image)[1]) == data["text/plain"]
    source = re.search(r"base64,([^\"]*)", image)[1]
    picture = Image.open(io.BytesIO(base64.b64decode(source)))
    width = int(re.search(r'width="(\d+)"', image)[1])
    assert 380 < width < 420 and picture.width in (2 * width, 2 * width + 1)
    with pytest.raises(ValueError, match="20 inches are more than"):
        figures.show(plt.figure(figsize=(20, 2)), "too wide")
    plt.close("all")


# What remains of linear RGB without one of the three kinds of cones: Machado, Oliveira and
# Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009
WITHOUT = {
    "red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]
WHITE = [0.95047, 1.0, 1.08883]


def smallest_difference(colors: list[str], cones: str) -> float:
    """Of any two colours, in CIE L*a*b*, where 2 is what a trained eye just sees."""
    rgb = np.array([plt.matplotlib.colors.to_rgb(color) for color in colors])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.transpose(WITHOUT[cones])).clip(0, 1)
    ratio = seen @ np.transpose(XYZ) / WHITE
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2))


@pytest.mark.parametrize("cones", WITHOUT)
def test_colours_can_be_told_apart(cones):
    assert smallest_difference(figures.COLORS, cones) > 15


def test_default_colours_cannot():
    default = ["tab:blue", "tab:orange", "tab:green", "tab:red"]
    assert smallest_difference(default, "red") < 8 and smallest_difference(default, "green") < 8
