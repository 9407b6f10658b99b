"""How figures and tables get into a notebook, and into files.

A figure's output is HTML with alternative text, which JupyterLab gives to screen readers from there
alone, and a PNG for programs that read notebooks, such as the export to PDF. Text from data is
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
from matplotlib.text import Text
from PIL import Image

from ..base.errors import InputError
from ..base.files import atomic_write
from . import plots

SHOWN_DPI = 110
SAVED_DPI = 200
FILM_SHARE = 0.65  # of the shown width: the PNG of a film, which compresses badly


FORMULA = "formula"  # the label of a text that is to be read as TeX


def _names_as_text(figure: Figure) -> None:
    """Take names from data as text: a `$` in a judge's name or a file's begins no formula, which
    would end the figure with an error, or lose letters.
    """
    for text in figure.findobj(Text):
        if text.get_label() != FORMULA:
            text.set_parse_math(False)


def figure_png(figure: Figure, dpi: int) -> bytes:
    """A figure as a PNG in true colours, without dates: the same figure gives the same bytes."""
    small = io.BytesIO()
    _drawn(figure, dpi).save(small, format="PNG", optimize=True, dpi=(dpi, dpi))
    return small.getvalue()


def _drawn(figure: Figure, dpi: int) -> Image.Image:
    raw = io.BytesIO()
    _names_as_text(figure)
    figure.savefig(raw, format="png", dpi=dpi, facecolor="white")
    figure.set_layout_engine("none")  # a second save keeps the layout of the first
    with Image.open(raw, formats=["PNG"]) as image:
        return image.convert("RGB")


class ShownFigure:
    """A figure as a notebook's output: HTML with alternative text, and a smaller PNG.

    Args:
        alt: what the figure shows, for readers who cannot see it.
        dpi: of the picture in the HTML.
    """

    def __init__(self, figure: Figure, alt: str, dpi: int = SHOWN_DPI) -> None:
        self.alt = alt
        picture = _drawn(figure, dpi)
        films = any(axes.images for axes in figure.axes)
        webp = io.BytesIO()
        # Lines and letters are smaller without a loss, films much smaller with a slight one.
        picture.save(webp, format="WEBP", lossless=not films, quality=90)
        self.webp = webp.getvalue()
        if films:
            size = [round(FILM_SHARE * side) for side in picture.size]
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        else:
            # A plot has a few hundred colours, all of them shades at the edges of letters.
            picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        png = io.BytesIO()
        picture.save(png, format="PNG", optimize=True)
        self.png = png.getvalue()

    def html(self) -> str:
        """The figure as an image element."""
        data = base64.b64encode(self.webp).decode()
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
    _names_as_text(figure)
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
            folders are made. Where that cannot be, a line says so.
    """
    shown = ShownFigure(figure, alt)
    if save_as is not None:
        path = Path(save_as)
        contents = {path: figure_png(figure, SAVED_DPI)}
        if not any(axes.images for axes in figure.axes):
            contents[path.with_suffix(".svg")] = figure_svg(figure)
        try:
            for file, content in contents.items():
                with atomic_write(file) as temporary:
                    temporary.write_bytes(content)
        except InputError as error:  # a lesson goes on without the file
            print(f"The figure is shown, and not saved: {error}")
    display(shown)


def show_table(rows: Sequence[Mapping[str, Any]], caption: str, decimals: int = 1) -> None:
    """Show a table (see `plots.results_table`) in a notebook."""
    display(
        {"text/html": plots.results_table(rows, caption, decimals), "text/plain": caption}, raw=True
    )
