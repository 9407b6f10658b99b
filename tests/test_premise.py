"""The premise of the visual pairs: places of the control, log-probabilities, and the table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmedpo_utils.dataset import prepare_dataset
from mmedpo_utils.lvlm import load_lvlm, prompt
from mmedpo_utils.phantom.world import draw_film
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.show.premise import (
    Asked,
    answer_logps,
    asked_of_split,
    asked_region,
    elsewhere,
    measure_premise,
    noised_films,
    premise_table,
)


def test_the_control_has_the_same_area_and_touches_no_lesion():
    film = draw_film(3, 0, ("nodule", "effusion"))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        moved = elsewhere(film.masks["nodule"], film.lesion_mask, rng)
        assert moved.sum() == film.masks["nodule"].sum()
        assert not (moved & film.lesion_mask).any()


def test_where_no_place_is_free_the_one_that_touches_least_is_taken():
    avoid = np.ones((8, 8), bool)
    avoid[:, 6:] = False
    mask = np.zeros((8, 8), bool)
    mask[:, :4] = True
    moved = elsewhere(mask, avoid, np.random.default_rng(0))
    assert moved.sum() == 32 and (moved & avoid).sum() == 16


def test_each_condition_changes_its_region_alone():
    film = draw_film(3, 0, ("opacity",))
    lesion = film.lesion_mask
    tool = np.zeros(lesion.shape)
    tool[:50] = 1
    shown = noised_films(film.image, lesion, lesion, tool, 0.5, np.random.default_rng(0))
    changed = {name: np.asarray(image) != film.image for name, image in shown.items()}
    assert not changed["clean"].any()
    assert changed["lesion"][lesion].mean() > 0.9 and not changed["lesion"][~lesion].any()
    assert not changed["elsewhere"][lesion].any() and changed["elsewhere"].sum() > 0
    assert not changed["tool"][50:].any()


@pytest.fixture(scope="module")
def lvlm():
    return load_lvlm("phantom", "cpu")


def test_log_probabilities_are_those_of_one_answer_at_a_time(lvlm):
    """Against transformers' own loss on prompt and answer, without padding."""
    films = [Image.fromarray(draw_film(number, 0).image) for number in range(3)]
    questions = ["Is there a nodule?", "Where is the opacity?", "Write the report."]
    answers = ["yes", "right upper", "The heart is enlarged."]
    logps, tokens = answer_logps(lvlm, films, questions, answers, batch_size=3)
    told = zip(films, questions, answers, logps, tokens, strict=True)
    for film, question, answer, logp, count in told:
        asked = prompt(lvlm.processor, question)
        whole = f"{asked} {answer}</s>"
        batch = lvlm.processor(
            images=film.convert("RGB"), text=whole, add_special_tokens=False, return_tensors="pt"
        )
        labels = batch["input_ids"].clone()
        said = len(lvlm.processor.tokenizer.encode(f" {answer}</s>", add_special_tokens=False))
        labels[:, :-said] = -100
        with torch.inference_mode():
            loss = lvlm.model(**batch, labels=labels).loss
        assert logp == pytest.approx(-float(loss) * said, abs=1e-4) and count == said


def test_a_model_that_sees_loses_its_answer_under_noise_on_the_lesion_alone(lvlm):
    asked = []
    for number in range(12):
        film = draw_film(number, 5, ("effusion",))
        row = {
            "question_id": str(number),
            "image": f"{number}.png",
            "text": "Is there an effusion?\n<image>",
            "gpt4_answer": "yes",
            "answer_type": "CLOSED",
        }
        asked.append(Asked(row, film.image, film.lesion_mask, film.lesion_mask))
    rows = measure_premise(lvlm, asked, 0.5, 8)
    assert all(set(row["logp"]) == {"clean", "lesion", "elsewhere"} for row in rows)
    for row, again in zip(rows, measure_premise(lvlm, asked, 0.5, 5), strict=True):
        assert row["said"] == again["said"], "the batch does not matter"
        assert row["logp"] == pytest.approx(again["logp"], abs=1e-4)
    table = premise_table({"base": [rows]}, 50)["base"]
    assert table["lesion_drop"]["mean"] == pytest.approx(
        np.mean([row["logp"]["clean"] - row["logp"]["lesion"] for row in rows])
    )
    assert table["lesion_minus_elsewhere"]["mean"] == pytest.approx(
        table["lesion_drop"]["mean"] - table["elsewhere_drop"]["mean"]
    )
    assert "tool_drop" not in table
    assert 0 <= table["lesion_flips"]["mean"] <= 100


def test_the_questions_of_a_split_come_with_what_they_ask_about(tmp_path):
    profile = load_profile("phantom-smoke", {"output": str(tmp_path)})
    dataset = prepare_dataset(profile)
    asked = asked_of_split(profile, dataset, "test")
    assert asked and asked_of_split(profile, dataset, "no such split") == []
    for item in asked:
        masks = dataset.masks(item.row["image"])
        assert np.array_equal(item.lesion, asked_region(masks, item.row["finding"]))
        assert item.lesion.any() and not (item.lesion & ~item.lesions).any()
        assert item.tool_mask.shape == item.pixels.shape
