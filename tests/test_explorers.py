"""The views answer to their controls; text from data arrives escaped; a figure's bytes are the same
every time.
"""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from PIL import Image

from mmedpo_utils.show import explorers, plots

EVIL = "<script>alert(1)</script>"
RNG = np.random.default_rng(0)
FILMS = [(40 * n + np.tile(np.arange(64), (64, 1))).astype(np.uint8) for n in range(3)]
MASK = np.zeros((64, 64), bool)
MASK[10:30, 20:40] = True


def controls(view):
    return {
        child.description: child
        for child in view.children[0].children
        if getattr(child, "description", "")
    }


def picture(view):
    return view.children[1].value


@pytest.fixture()
def images(tmp_path):
    for n, film in enumerate(FILMS):
        Image.fromarray(film).save(tmp_path / f"{n}.png")
    return tmp_path


def overlay():
    return plots.attention_overlay(FILMS[0], np.arange(196.0).reshape(14, 14), MASK)


def shown(figure, alt, save_as=None):
    """What `explorers.show` puts into a notebook."""
    InteractiveShell.instance()
    with capture_output() as captured:
        explorers.show(figure, alt, save_as)
    InteractiveShell.clear_instance()
    (output,) = captured.outputs
    return output


def test_saved_figures_are_small_stable_pngs(tmp_path):
    figure = overlay()
    path = tmp_path / "new" / "overlay.png"
    output = shown(figure, "an overlay", save_as=path)
    assert [file.name for file in path.parent.iterdir()] == ["overlay.png"]
    assert explorers.figure_png(figure) == path.read_bytes() == explorers.figure_png(overlay())
    assert base64.b64decode(output.data["image/png"]) == path.read_bytes()
    with Image.open(path) as image:
        assert (
            image.format == "PNG"
            and image.mode == "P"
            and not {"Software", "Creation Time"} & set(image.info)
        )
    assert path.stat().st_size < 100_000


def test_show_gives_a_png_with_its_alternative_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = shown(overlay(), f'a "quote" {EVIL}')
    assert Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).format == "PNG"
    assert "text/html" not in output.data, "nothing in the output is read as HTML"
    assert output.metadata["image/png"]["alt"] == f'a "quote" {EVIL}'
    assert not list(tmp_path.iterdir()), "without save_as no file is written"


def test_a_views_picture_has_escaped_alternative_text():
    picture = explorers.figure_html(overlay(), f'a "quote" {EVIL}')
    assert EVIL not in picture and 'alt="a &quot;quote&quot; &lt;script&gt;' in picture
    data = re.search(r'base64,([^"]+)"', picture)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "PNG"


def pair(n, rejected_image=None):
    turns = [
        [{"from": "human", "value": f"<image>\nIs {EVIL} there?"}, {"from": "gpt", "value": answer}]
        for answer in (f"yes {n} {EVIL}", f"no {n} $x$")
    ]
    return {
        "id": n,
        "image": f"{n}.png",
        "rejected_image": rejected_image,
        "conversations": turns[0],
        "rejected_conversations": turns[1],
        "weighted_score": 0.5,
    }


def test_pairs_can_be_filtered_and_walked(images):
    view = explorers.pairs_explorer(
        [pair(0), pair(1, "2.png"), {**pair(2), "finding": "nodule"}], images, images
    )
    assert (
        "yes 0" in picture(view) and EVIL not in picture(view) and "&lt;script&gt;" in picture(view)
    )
    controls(view)["number"].value = 3
    assert "yes 2" in picture(view)
    controls(view)["source"].value = "visual"
    assert "yes 1" in picture(view) and controls(view)["number"].max == 1
    assert view.children[0].children[-1].value == "of 1"
    controls(view)["source"].value, controls(view)["finding"].value = "any", "nodule"
    assert "yes 2" in picture(view) and view.children[0].children[-1].value == "of 1"


def test_a_pair_without_a_score_is_shown_as_one(images):
    bare = {key: value for key, value in pair(0).items() if key != "weighted_score"}
    view = explorers.pairs_explorer([bare], images, images)
    assert "without a relevance score" in picture(view)


def test_released_pairs_open_as_they_are(shared):
    folder = shared / "data/vqa_rad_mini"
    rows = json.loads((folder / "train_preferences.json").read_text())
    view = explorers.pairs_explorer(rows, folder / "images")
    controls(view)["number"].value = len(rows)
    assert "Preference pair about" in picture(view)


def case(n, kind, prediction, finding="nodule"):
    return {
        "question_id": n,
        "image": f"{n}.png",
        "answer_type": kind,
        "finding": finding,
        "question": f"Q{n} {EVIL}",
        "answer": "yes",
        "prediction": prediction,
    }


def test_cases_filter_by_finding_type_and_change(images):
    base = [
        case(0, "CLOSED", "no"),
        case(1, "CLOSED", "yes"),
        case(2, "OPEN", f"no {EVIL}", "effusion"),
    ]
    after = [case(0, "CLOSED", "yes"), case(1, "CLOSED", "yes"), case(2, "OPEN", "no", "effusion")]
    view = explorers.cases_explorer({"base": base, "mmedpo <b>": after}, images)
    assert (
        "Q0" in picture(view) and EVIL not in picture(view) and "mmedpo &lt;b&gt;" in picture(view)
    )
    count = view.children[0].children[-1]
    assert count.value == "of 3"
    controls(view)["changed by training"].value = True
    assert count.value == "of 1" and "Q0" in picture(view)
    controls(view)["changed by training"].value = False
    controls(view)["finding"].value = "effusion"
    assert count.value == "of 1" and "Q2" in picture(view) and EVIL not in picture(view)
    controls(view)["type"].value = "CLOSED"
    assert count.value == "of 0" and "nothing matches" in picture(view)
    controls(view)["finding"].value = "any"
    assert count.value == "of 2" and "Q0" in picture(view)
