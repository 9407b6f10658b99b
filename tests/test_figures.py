"""Figures get into notebooks and files: in true colours, with alternative text, always the same
bytes.
"""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure
from PIL import Image

from mmedpo_utils.show import figures, plots
from mmedpo_utils.show.figures import FORMULA, figure_png, figure_svg

EVIL = "<script>alert(1)</script>"
RNG = np.random.default_rng(0)
FILMS = [(40 * n + np.tile(np.arange(64), (64, 1))).astype(np.uint8) for n in range(3)]
MASK = np.zeros((64, 64), bool)
MASK[10:30, 20:40] = True


def overlay():
    return plots.attention_overlay(FILMS[0], np.arange(196.0).reshape(14, 14), MASK)


def shown(figure, alt, save_as=None):
    """What `figures.show` puts into a notebook."""
    InteractiveShell.instance()
    with capture_output() as captured:
        figures.show(figure, alt, save_as)
    InteractiveShell.clear_instance()
    (output,) = captured.outputs
    return output


def test_saved_figures_are_sharp_stable_and_in_true_colours(tmp_path):
    path = tmp_path / "new" / "overlay.png"
    output = shown(overlay(), "an overlay", save_as=path)
    assert [file.name for file in path.parent.iterdir()] == ["overlay.png"]
    again = tmp_path / "again.png"
    assert shown(overlay(), "an overlay", save_as=again).data == output.data
    assert path.read_bytes() == again.read_bytes()
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        assert not {"Software", "Creation Time"} & set(image.info)
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        greys = {pixel for _, pixel in image.getcolors(1 << 20) if len(set(pixel)) == 1}
    assert len(greys) > 60, "the film's 64 greys are not cut to a palette"


def test_a_plots_two_pictures_have_the_same_colours():
    entry = {"mean": 50, "low": 45, "high": 60}
    models = ("base", "sft", "dpo", "stage1", "stage2", "mmedpo")
    figure = plots.score_intervals({name: {"bleu": entry} for name in models})
    drawn = figures.ShownFigure(figure, "scores")
    one, other = (
        np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), int)
        for picture in (drawn.webp, drawn.png)
    )
    assert np.abs(one - other).max() <= 8, "the smaller palette holds every colour"


def test_a_figure_without_images_is_written_as_svg_too(tmp_path):
    shown(plots.pointing_game_bars({"a $x": 0.5}, 0.1), "bars", save_as=tmp_path / "bars.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bars.png", "bars.svg"]
    drawing = (tmp_path / "bars.svg").read_bytes()
    shown(plots.pointing_game_bars({"a $x": 0.5}, 0.1), "bars", save_as=tmp_path / "2" / "b.png")
    assert drawing == (tmp_path / "2" / "b.svg").read_bytes()
    assert b"a $x" in drawing and b"<dc:date>" not in drawing


def test_show_gives_a_png_with_its_alternative_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = shown(overlay(), f'a "quote" {EVIL}')
    assert Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).format == "PNG"
    assert output.metadata["image/png"]["alt"] == f'a "quote" {EVIL}'
    picture = output.data["text/html"]
    assert EVIL not in picture and 'alt="a &quot;quote&quot; &lt;script&gt;' in picture
    data = re.search(r'base64,([^"]+)"', picture)[1]
    large = Image.open(io.BytesIO(base64.b64decode(data))).convert("L")
    small = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("L")
    assert large.width > 1.4 * small.width
    apart = np.subtract(large.resize(small.size, Image.Resampling.LANCZOS), small, dtype=float)
    assert np.abs(apart).mean() < 2, "the same picture"
    assert not list(tmp_path.iterdir()), "without save_as no file is written"
    assert len({pixel for _, pixel in small.getcolors()}) > 60, "a film keeps its greys"


def test_a_plots_png_is_the_shown_picture_and_white_stays_white():
    output = shown(plots.pointing_game_bars({"nodule": 0.5}, 0.1), "bars")
    data = re.search(r'base64,([^"]+)"', output.data["text/html"])[1]
    large = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), int)
    png = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
    copy = np.asarray(png.convert("RGB"), int)
    assert np.abs(large - copy).max() < 16
    white = (large == 255).all(-1)
    assert white.mean() > 0.5 and (copy[white] == 255).all()


def test_no_name_is_read_as_tex_and_a_formula_is():
    evil = r"judge $\nonsense{$ & $x$"
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label=evil)
    axes.set_yticks([0, 1], [evil, "b"])
    axes.set_xlabel(evil)
    axes.set_title(evil)
    axes.text(0, 0.5, r"$\beta$", label=FORMULA)
    axes.legend()
    figure.suptitle(evil)
    assert figure_png(figure, 50).startswith(b"\x89PNG")
    drawing = figure_svg(figure).decode()
    assert drawing.count("nonsense") >= 5 and r">$\beta$<" not in drawing
