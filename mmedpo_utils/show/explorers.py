"""Views to play with in a notebook (ipywidgets), drawn by the functions of plots.py, and the way a
figure gets shown.

Every view is a `VBox` whose last child is an `HTML` picture with alternative text. Nothing comes
from the network, and text from data is escaped wherever it is shown.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
from IPython.display import Image as DisplayedImage
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from ..base.files import atomic_write
from ..base.images import open_image, resolve_image
from ..base.rows import question_text
from ..metrics import answer_score
from ..preference_rows import answer_text, row_source
from . import plots

ANY = "any"


def figure_png(figure: Figure) -> bytes:
    """A figure as a small PNG (110 dots an inch, 256 colours, no dates): the same figure gives the
    same bytes.
    """
    raw = io.BytesIO()
    small = io.BytesIO()
    figure.savefig(raw, format="png", dpi=110, facecolor="white")
    figure.set_layout_engine("none")  # a second save keeps the layout of the first
    with Image.open(raw, formats=["PNG"]) as image:
        few_colours = image.convert("RGB").quantize(
            256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
        few_colours.save(small, format="PNG", optimize=True)
    return small.getvalue()


def figure_html(figure: Figure, alt: str) -> str:
    """An HTML image that holds the figure itself and its alternative text, escaped."""
    data = base64.b64encode(figure_png(figure)).decode()
    return (
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" style="max-width:100%">'
    )


def show(figure: Figure, alt: str, save_as: str | Path | None = None) -> None:
    """Show a figure in a notebook, and write it to a file if ``save_as`` names one.

    The notebook's output is a PNG (`figure_png`). Its metadata holds the alternative text.

    Args:
        alt: What the figure shows, for readers who cannot see it.
        save_as: The PNG file to write, with its ending. It is written atomically and holds the
            bytes that are shown. Missing folders are made.
    """
    png = figure_png(figure)
    if save_as is not None:
        with atomic_write(Path(save_as)) as temporary:
            temporary.write_bytes(png)
    display(DisplayedImage(data=png, format="png", alt=alt))


def show_table(rows: Sequence[Mapping[str, Any]], caption: str, decimals: int = 1) -> None:
    """Show a table (see `plots.results_table`) in a notebook."""
    display(
        {"text/html": plots.results_table(rows, caption, decimals), "text/plain": caption}, raw=True
    )


def _view(
    controls: Sequence[widgets.Widget],
    draw: Callable[[], tuple[Figure, str]],
    text: Callable[[], str] = lambda: "",
) -> widgets.VBox:
    """Controls above an `HTML` picture that is drawn again whenever a control's value changes."""
    picture = widgets.HTML()

    def update(_: Any = None) -> None:
        figure, alt = draw()
        picture.value = figure_html(figure, alt) + text()

    for control in controls:
        control.observe(update, "value")
    update()
    box = widgets.Box(list(controls), layout=widgets.Layout(flex_flow="row wrap"))
    return widgets.VBox([box, picture])


def _choice(label: str, options: Sequence) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, description=label)


def open_pixels(root: str | Path, name: str) -> np.ndarray:
    """The pixels of one image inside ``root``, upright. Shape: [H, W] or [H, W, 3]."""
    return np.asarray(open_image(resolve_image(root, name)))


def _browser(
    filters: Sequence[widgets.Widget],
    kept: Callable[[], list],
    draw: Callable[[Any], tuple[Figure, str]],
    text: Callable[[Any], str],
) -> widgets.VBox:
    """Filters, a number that walks through what they keep, and the picture of the item that is
    there.
    """
    place = widgets.BoundedIntText(1, min=1, max=max(1, len(kept())), description="number")
    found = widgets.HTML()

    def narrow(_: Any = None) -> None:
        count = len(kept())
        place.max = max(1, count)
        place.value = 1
        found.value = f"of {count}"

    def current() -> Any:
        items = kept()
        return items[place.value - 1] if items else None

    for control in filters:
        control.observe(narrow, "value")
    narrow()
    nothing = "nothing matches"
    view = _view(
        [*filters, place],
        lambda: draw(current()) if current() else (Figure((2, 0.5)), nothing),
        lambda: text(current()) if current() else nothing,
    )
    view.children[0].children += (found,)
    return view


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return [ANY, *sorted({str(row[key]) for row in rows if row.get(key)})]


def pairs_explorer(
    rows: Sequence[dict[str, Any]], image_root: str | Path, noised_root: str | Path | None = None
) -> widgets.VBox:
    """Walk through preference pairs; filter by source and finding. ``noised_root`` holds the
    rejected images.
    """
    source = _choice("source", [ANY, *sorted({row_source(row) for row in rows})])
    finding = _choice("finding", _values(rows, "finding"))

    def kept() -> list[dict[str, Any]]:
        return [
            row
            for row in rows
            if source.value in (ANY, row_source(row)) and finding.value in (ANY, row.get("finding"))
        ]

    def draw(row: dict[str, Any]) -> tuple[Figure, str]:
        rejected_image = None
        if row.get("rejected_image") and noised_root:
            rejected_image = open_pixels(noised_root, row["rejected_image"])
        score = row.get("weighted_score")
        figure = plots.pair_card(
            open_pixels(image_root, row["image"]),
            rejected_image,
            question_text(row),
            answer_text(row),
            answer_text(row, rejected=True),
            score,
        )
        relevance = "without a relevance score"
        if score is not None:
            relevance = f"clinical relevance {score:.2f}"
        return figure, f"Preference pair about {row['image']}, {relevance}; its text is below"

    def text(row: dict[str, Any]) -> str:
        return plots.results_table(
            [{"preferred": answer_text(row), "rejected": answer_text(row, rejected=True)}],
            question_text(row),
        )

    return _browser([source, finding], kept, draw, text)


def cases_explorer(
    predictions: Mapping[str, Sequence[dict[str, Any]]], image_root: str | Path
) -> widgets.VBox:
    """Walk through test questions with each model's answer; filter by finding, type and "changed by
    training".

    Args:
        predictions: Model name to prediction rows, the models in the order of the table; every
            model has answered the same questions. "Changed" means that the last model's answer
            scores otherwise than the first one's.
    """
    tables = []
    for rows in predictions.values():
        tables.append({str(row["question_id"]): row for row in rows})
    cases = []
    for question in tables[0]:
        if all(question in table for table in tables):
            cases.append([table[question] for table in tables])
    first = [case[0] for case in cases]
    finding = _choice("finding", _values(first, "finding"))
    kind = _choice("type", _values(first, "answer_type"))
    changed = widgets.Checkbox(False, description="changed by training")

    def kept() -> list[list[dict[str, Any]]]:
        found = []
        for case in cases:
            of_finding = finding.value in (ANY, case[0].get("finding"))
            of_kind = kind.value in (ANY, case[0]["answer_type"])
            same = answer_score(case[0]) == answer_score(case[-1])
            if of_finding and of_kind and not (changed.value and same):
                found.append(case)
        return found

    def draw(case: list[dict[str, Any]]) -> tuple[Figure, str]:
        row = case[0]
        return plots.film_grid(
            [open_pixels(image_root, row["image"])], [row["image"]], columns=1
        ), f"film {row['image']}"

    def text(case: list[dict[str, Any]]) -> str:
        lines = [{"": "ground truth", "answer": case[0]["answer"], "score": None}]
        lines += [
            {"": name, "answer": row["prediction"], "score": 100 * answer_score(row)}
            for name, row in zip(predictions, case)
        ]
        return plots.results_table(lines, case[0]["question"])

    return _browser([finding, kind, changed], kept, draw, text)
