# SPDX-License-Identifier: MIT-0
"""How the notebooks' figures look, and how they are displayed.

Importing this sets fonts and colours. "C0" to "C6" are the colours of Okabe and Ito, which readers
with any form of colour vision can tell apart: blue, orange, green, vermilion, purple, light blue,
black.
"""

import base64
import html
import io

import matplotlib.pyplot as plt
from IPython.display import display
from PIL import Image

COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
WIDEST = 10.5  # inches; a wider figure is shrunk by the page, and its text with it
SMALLEST = 8  # points

plt.rcParams.update(
    {
        "axes.prop_cycle": plt.cycler(color=COLORS),
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 100,
        "font.size": 10,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
    }
)


def show(figure: plt.Figure, alt: str) -> None:
    """Displays a figure at two pixels for each of the screen, and closes it.

    Args:
        figure: at most WIDEST inches wide, with no text smaller than SMALLEST points.
        alt: what the figure shows, for readers who cannot see it.

    An <img> is what both JupyterLab and nbconvert display with a text of its own; neither takes one
    from the metadata of an image/png. A palette of 256 colours divides the file's size by three.
    """
    if figure.get_figwidth() > WIDEST:
        raise ValueError(f"{figure.get_figwidth():g} inches are more than {WIDEST}")
    for axes in figure.axes:
        if axes.images:
            axes.spines[:].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * figure.dpi, bbox_inches="tight")
    plt.close(figure)
    picture = Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    size = f'width="{picture.width // 2}"'
    image = f'<img src="{source}" {size} alt="{html.escape(alt)}">'
    display({"text/html": image, "text/plain": alt}, raw=True)
