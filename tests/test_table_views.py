"""The views of pairs, cases and training in a real browser, and the form for one's own film."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.lvlm import load_lvlm
from mmedpo_utils.phantom.errors import severity
from mmedpo_utils.preference_rows import answer_text
from mmedpo_utils.show.case_view import case_view
from mmedpo_utils.show.own_view import PROMISE, own_view
from mmedpo_utils.show.pair_view import differing, pair_view
from mmedpo_utils.show.training_view import training_view

from .conftest import tiny_medklip
from .test_views import EVIL, RNG, changes, distance, opened, pictures

SIZE = 224


@pytest.fixture()
def images(tmp_path) -> Path:
    for number in range(4):
        film = RNG.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
        Image.fromarray(film).save(tmp_path / f"{number}.png")
    return tmp_path


def pair(number: int, preferred: str, rejected: str, **more) -> dict:
    sides = [
        [{"from": "human", "value": f"<image>\nIs {EVIL} there?"}, {"from": "gpt", "value": answer}]
        for answer in (preferred, rejected)
    ]
    return {
        "id": str(number),
        "image": f"{number}.png",
        "conversations": sides[0],
        "rejected_conversations": sides[1],
        **more,
    }


def chosen(tab, label: str):
    """The control with this label."""
    found = tab.locator("label").filter(has_text=re.compile(f"^{label}"))
    return found.locator("select, input").first


def move(tab, label: str, presses: list[str]) -> None:
    chosen(tab, label).focus()
    for key in presses:
        tab.keyboard.press(key)
    pictures(tab)


def test_words_that_differ_are_marked():
    one, other = differing("It is in the left upper lung.", "it is in the right upper lung, there")
    assert [word for word, differs in one if differs] == ["left", "lung."]
    assert [word for word, differs in other if differs] == ["right", "lung,", "there"]
    assert [word for word, _ in one] == "It is in the left upper lung.".split()


def test_pairs_are_filtered_and_their_films_wiped(tab, images):
    turn = {"member": "strict", "score": 0.4, "agrees": False, "reason": f"a {EVIL} place"}
    rows = [
        pair(0, "left upper", f"right upper {EVIL}", weighted_score=0.4, origin="sampled"),
        pair(1, "yes", "no", weighted_score=0.9, origin="written", finding="nodule"),
        # A visual pair has the id of its question's text pair.
        pair(2, "yes", "yes", rejected_image="3.png", source="visual") | {"id": "0"},
    ]
    debates = [{"id": "0", "history": [turn]}]
    page = pair_view(rows, images, images, debates)
    assert EVIL not in page.html()
    opened(tab, page, images)
    text = tab.locator(".text")
    assert tab.locator("mark").all_inner_texts()[:2] == ["left", "right"]
    assert "strict" in text.inner_text() and f"a {EVIL} place" in text.inner_text()
    told = tab.locator("[role=status]")
    assert "relevance 0.40" in told.inner_text() and "Pair 1 of 3" in told.inner_text()
    assert "by words alone" in told.inner_text() and chosen(tab, "wipe").is_disabled()
    assert changes(tab, lambda: move(tab, "source", ["v"]))
    assert "Pair 1 of 1" in told.inner_text() and "by words alone" not in told.inner_text()
    assert "strict" not in text.inner_text(), "the debate was about another answer"
    films = [np.asarray(Image.open(images / name)) for name in ("2.png", "3.png")]
    for key, film in (("End", films[0]), ("Home", films[1])):
        move(tab, "wipe", [key])
        assert distance(tab.locator("canvas"), film) < 5, key
    assert changes(tab, lambda: move(tab, "wipe", ["PageUp"] * 5))
    move(tab, "source", ["a"])
    move(tab, "relevance at least", ["End"])
    assert told.inner_text() == "No pair fits these choices."
    assert not text.is_visible(), "no pair that does not fit is left to look at"
    move(tab, "relevance at least", ["Home"])
    chosen(tab, "finding").select_option("nodule")
    pictures(tab)
    assert "finding nodule" in told.inner_text() and "Pair 1 of 1" in told.inner_text()


def test_released_pairs_open_as_they_are(tab, shared, tmp_path):
    folder = shared / "data/vqa_rad_mini"
    rows = json.loads((folder / "train_preferences.json").read_text())
    page = pair_view(rows, folder / "images")
    opened(tab, page, tmp_path)
    listed = tab.locator("label", has_text="pair").locator("select").last.locator("option")
    assert listed.count() == min(24, len(rows))
    words = tab.locator(".sides p").all_inner_texts()
    assert words[0].split() == answer_text(rows[0]).split()


def case(number: int, kind: str, said: str, **more) -> dict:
    return {
        "question_id": str(number),
        "image": f"{number % 2}.png",
        "answer_type": kind,
        "question": "Is there a nodule?" if kind == "CLOSED" else f"Where is the nodule? {EVIL}",
        "answer": "yes" if kind == "CLOSED" else "right upper",
        "prediction": said,
        "finding": "nodule",
        **more,
    }


def test_cases_are_filtered_by_disagreement_error_and_severity(tab, images):
    base = [
        case(0, "CLOSED", "no"),
        case(1, "CLOSED", "yes"),
        case(2, "OPEN", f"left upper {EVIL}", finding="effusion"),
    ]
    trained = [case(0, "CLOSED", "yes"), case(1, "CLOSED", "yes"), case(2, "OPEN", "right upper")]
    base.append(case(3, "REPORT", "the lungs are clear."))
    trained.append(case(3, "REPORT", "the lungs are clear."))
    mask = np.zeros((SIZE, SIZE), bool)
    mask[20:90, 30:100] = True
    dataset = SimpleNamespace(
        image=lambda name: Image.open(images / name),
        masks=lambda name: {"nodule": mask} if name == "0.png" else {},
    )
    models = {"base": load_lvlm("phantom", "cpu")}
    predictions = {"base": base, "trained": trained}
    page = case_view(predictions, dataset, models, 2, costs=True)
    assert EVIL not in page.html()
    opened(tab, page, images)
    told = tab.locator("[role=status]")
    rows = tab.locator("td")
    assert "Case 1 of 4" in told.inner_text()
    assert "missed" in rows.all_inner_texts() and "✗ 0" in rows.all_inner_texts()
    missed = severity("Is there a nodule?", "yes", "no")
    assert f"{missed:.2f}" in rows.all_inner_texts()
    assert changes(tab, lambda: move(tab, "type", ["R"]))
    assert "0.00" not in rows.all_inner_texts(), "errors of reports are not counted"
    chosen(tab, "type").select_option("any")
    pictures(tab)
    assert changes(tab, lambda: move(tab, "attention of", ["b"]))
    assert changes(tab, lambda: move(tab, "opacity", ["Home"]))
    assert changes(tab, lambda: move(tab, "true lesions", ["Space"]))
    move(tab, "models disagree", ["Space"])
    assert "Case 1 of 2" in told.inner_text()
    chosen(tab, "kind of error").select_option("wrong side")
    pictures(tab)
    assert "Case 1 of 1" in told.inner_text() and EVIL in told.inner_text()
    move(tab, "severity at least", ["End"])
    assert told.inner_text() == "No case fits these choices."
    move(tab, "severity at least", ["Home"])
    chosen(tab, "finding").select_option("effusion")
    pictures(tab)
    assert "Case 1 of 1" in told.inner_text()


def test_without_costs_masks_or_models_no_control_stands_for_them(tab, images):
    dataset = SimpleNamespace(image=lambda name: Image.open(images / name), masks=lambda name: {})
    one, other = [case(0, "OPEN", "left upper")], [case(0, "OPEN", "right lower")]
    opened(tab, case_view({"a": one, "b": other}, dataset, {}, 2), images)
    labels = [text.split("\n")[0] for text in tab.locator("label").all_inner_texts()]
    assert labels == ["type", "finding", "models disagree", "case", "size"]
    move(tab, "models disagree", ["Space"])
    told = tab.locator("[role=status]").inner_text()
    assert "Case 1 of 1" in told, "two answers of one score are two answers"
    with pytest.raises(InputError, match="the same questions"):
        case_view({"a": one, "b": [case(1, "OPEN", "left")]}, dataset, {}, 2)


def test_no_pairs_to_show_is_one_sentence(images):
    with pytest.raises(InputError, match="no preference pairs"):
        pair_view([], images)


def events(slope: float) -> list[dict]:
    logged = [
        {"step": step, "chosen_logp": -slope * step, "text_margin": slope * step}
        for step in range(1, 11)
    ]
    sample = {"question": f"Is {EVIL} there?", "preferred": "yes", "answer": f"no {slope}"}
    logged[4]["samples"] = [sample]
    logged[4]["validation_loss"] = 0.5
    logged[9]["validation_loss"] = 0.3
    return logged


def test_training_runs_lie_over_each_other_with_their_answers(tab, tmp_path):
    page = training_view({"dpo": events(0.01), "mmedpo": events(0.02)})
    opened(tab, page, tmp_path)
    drawn = tab.locator("svg polyline")
    assert drawn.count() == 2
    mean_of_five = "chosen answer: dpo -0.080, mmedpo -0.160"  # of steps 6 to 10
    assert mean_of_five in tab.locator("[role=status]").inner_text()
    move(tab, "mean of steps", ["Home"])
    assert "chosen answer: dpo -0.100, mmedpo -0.200" in tab.locator("[role=status]").inner_text()
    answers = tab.locator("table").last
    assert "no 0.02" in answers.inner_text() and EVIL in answers.inner_text()
    move(tab, "step", ["Home", "ArrowRight"])
    assert "chosen answer: dpo -0.020, mmedpo -0.040" in tab.locator("[role=status]").inner_text()
    assert "no 0.02" not in tab.locator(".mmedpo").inner_text(), "the first look was at step 5"
    lines = [line.get_attribute("points") for line in drawn.all()]
    move(tab, "quantity", ["r"])
    assert "reward margin, text pairs" in tab.locator("svg").get_attribute("aria-label")
    assert [line.get_attribute("points") for line in drawn.all()] != lines
    chosen(tab, "quantity").select_option("loss, held-out")
    move(tab, "mean of steps", ["End", *["ArrowLeft"] * 15])
    move(tab, "step", ["End"])
    assert "dpo 0.300" in tab.locator("[role=status]").inner_text(), "looks are not averaged"
    assert tab.locator("svg circle").count() == 4, "two looks of two runs"
    move(tab, "mmedpo", ["Space"])
    assert drawn.count() == 1


def test_ones_own_film_is_asked_here(tab, images, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("mmedpo_utils.show.own_view.display", shown.append)
    view = own_view({"base": load_lvlm("phantom", "cpu")}, tiny_medklip(), 4)
    label, form, _ = view.children
    path, upload, question, ask = form.children
    assert label.value == PROMISE
    path.value = str(images / "1.png")
    question.value = f"Is {EVIL} there?"
    ask.click()
    assert len(shown) == 2
    (images / "view.html").write_text(shown[1].data, encoding="utf-8")
    tab.goto(f"file://{images / 'view.html'}")
    tab.wait_for_selector("[data-live] canvas")
    assert "<img" not in shown[1].data, "no still picture is drawn for a reader who waits"
    assert EVIL in tab.locator(".note").first.inner_text() and tab.locator("img").count() == 0
    path.value = ""
    content = (images / "2.png").read_bytes()
    told = {"name": "../../mine.png", "type": "", "size": len(content), "content": content}
    upload.value = [told | {"last_modified": datetime.now()}]
    ask.click()
    assert len(shown) == 4 and "<p>mine.png: attention of disease</p>" in shown[2].data
    question.value = " "
    ask.click()
    assert len(shown) == 4 and "no question" in capsys.readouterr().out
    bundle = view._repr_mimebundle_()
    assert "live notebook" in bundle["text/html"] and "VBox" not in bundle["text/plain"]


@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused_by_name(content, capsys, monkeypatch):
    monkeypatch.setattr("mmedpo_utils.show.own_view.display", lambda page: pytest.fail("shown"))
    view = own_view({"base": load_lvlm("phantom", "cpu")}, tiny_medklip(), 4)
    _, upload, _, ask = view.children[1].children
    ask.click()
    assert "no film" in capsys.readouterr().out
    told = {"name": "mine.png", "type": "", "size": len(content), "content": content}
    upload.value = [told | {"last_modified": datetime.now()}]
    ask.click()
    said = capsys.readouterr().out
    assert "\rmine.png: cannot be opened as an image" in said and "/" not in said
