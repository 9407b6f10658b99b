"""How figures and tables get into a notebook, and into files.

A figure's output is a PNG, for files made from the notebook, and the same picture as HTML with
alternative text, which JupyterLab gives to screen readers from there alone. Text from data is
escaped wherever it is shown.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from ..base.files import atomic_write
from . import plots

SHOWN_DPI = 110
SAVED_DPI = 200


def figure_png(figure: Figure, dpi: int) -> bytes:
    """A figure as a PNG in true colours, without dates: the same figure gives the same bytes."""
    raw = io.BytesIO()
    small = io.BytesIO()
    figure.savefig(raw, format="png", dpi=dpi, facecolor="white")
    figure.set_layout_engine("none")  # a second save keeps the layout of the first
    with Image.open(raw, formats=["PNG"]) as image:
        image.convert("RGB").save(small, format="PNG", optimize=True, dpi=(dpi, dpi))
    return small.getvalue()


class ShownFigure:
    """A figure as a notebook's output.

    Args:
        alt: what the figure shows, for readers who cannot see it.
    """

    def __init__(self, figure: Figure, alt: str, dpi: int = SHOWN_DPI) -> None:
        self.png = figure_png(figure, dpi)
        self.alt = alt

    def html(self) -> str:
        """The figure as an image element, smaller than the PNG and with hardly a loss."""
        small = io.BytesIO()
        with Image.open(io.BytesIO(self.png), formats=["PNG"]) as image:
            image.save(small, format="WEBP", quality=90, method=6)
        data = base64.b64encode(small.getvalue()).decode()
        alt = html.escape(self.alt)
        return f'<img src="data:image/webp;base64,{data}" alt="{alt}" style="max-width:100%">'

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data = {
            "image/png": base64.b64encode(self.png).decode(),
            "text/html": self.html(),
            "text/plain": self.alt,
        }
        return data, {"image/png": {"alt": self.alt}}


def figure_svg(figure: Figure) -> bytes:
    """A figure as an SVG, without dates: the same figure gives the same bytes."""
    drawing = io.BytesIO()
    # Names of parts are random otherwise.
    with matplotlib.rc_context({"svg.hashsalt": "mmedpo", "svg.fonttype": "none"}):
        figure.savefig(drawing, format="svg", facecolor="white", metadata={"Date": None})
    return drawing.getvalue()


def show(figure: Figure, alt: str, save_as: str | Path | None = None) -> None:
    """Show a figure in a notebook, and write it to a file if ``save_as`` names one.

    The notebook's output has 110 dots an inch.

    Args:
        alt: What the figure shows, for readers who cannot see it.
        save_as: The PNG file to write, with its ending: 200 dots an inch. A figure without images
            is written as SVG, too, under the same name. Files are written atomically; missing
            folders are made.
    """
    shown = ShownFigure(figure, alt)
    if save_as is not None:
        path = Path(save_as)
        contents = {path: figure_png(figure, SAVED_DPI)}
        if not any(axes.images for axes in figure.axes):
            contents[path.with_suffix(".svg")] = figure_svg(figure)
        for file, content in contents.items():
            with atomic_write(file) as temporary:
                temporary.write_bytes(content)
    display(shown)


def show_table(rows: Sequence[Mapping[str, Any]], caption: str, decimals: int = 1) -> None:
    """Show a table (see `plots.results_table`) in a notebook."""
    display(
        {"text/html": plots.results_table(rows, caption, decimals), "text/plain": caption}, raw=True
    )
