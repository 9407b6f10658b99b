"""Predictions, shuffled images, attention in the lesion and comparisons, on a tiny random Med-LVLM
and real files.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from mmedpo_utils import evaluate, lvlm, metrics
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import open_image
from mmedpo_utils.base.rows import question_text
from mmedpo_utils.dataset import FilmDataset
from mmedpo_utils.phantom.texts import read_masks, write_dataset
from mmedpo_utils.preference_rows import read_questions
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.show import comparison
from mmedpo_utils.show.lesion_attention import (
    attention_share,
    head_shares,
    head_table,
    lesion_attention,
)
from mmedpo_utils.show.premise import Asked
from mmedpo_utils.trainer import adapter_config

from .test_trainer import tiny_lvlm


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder, {"train": 1, "validation": 1, "test": 6}, seed=3)
    questions = read_questions(folder / "test_questions.jsonl")
    kinds = {
        kind: [row for row in questions if row["answer_type"] == kind]
        for kind in ("CLOSED", "OPEN", "REPORT")
    }
    chosen = [*kinds["CLOSED"][:12], *kinds["OPEN"][:6], *kinds["REPORT"][:4]]
    return {
        "folder": folder,
        "images": folder / "images",
        "masks": folder / "masks",
        "questions": chosen,
        "model": lvlm.load_lvlm(tiny_lvlm(folder / "model"), device="cpu"),
    }


def predict(world, path, **more):
    decoding = more.pop("decoding", evaluate.greedy_decoding(16))
    return evaluate.predict(
        world["model"], world["questions"], world["images"], path, 4, decoding, **more
    )


def test_predictions_are_what_generate_says_in_the_order_of_the_questions(world, tmp_path, capsys):
    rows = predict(world, tmp_path / "base.jsonl")
    assert [row["question_id"] for row in rows] == [
        row["question_id"] for row in world["questions"]
    ]
    assert rows == evaluate.read_predictions(tmp_path / "base.jsonl")
    for row, question in list(zip(rows, world["questions"]))[::7]:
        image = open_image(world["images"] / question["image"])
        alone = lvlm.generate(
            world["model"], [image], [question_text(question)], max_new_tokens=16, batch_size=1
        )
        assert row["prediction"] == alone[0][0]
        assert row["answer"] == question["gpt4_answer"] and "<image>" not in row["question"]
        assert row["patient_id"] == question["patient_id"] and "shown_image" not in row
    closed = sum(row["answer_type"] == "CLOSED" for row in rows)
    assert metrics.score_predictions(rows)["closed_accuracy"]["n"] == closed > 5
    assert ": computed" in capsys.readouterr().out


def test_a_file_is_read_again_only_while_model_questions_and_images_are_the_same(
    world, tmp_path, capsys
):
    path = tmp_path / "base.jsonl"
    first = predict(world, path)
    assert predict(world, path) == first
    assert capsys.readouterr().out.splitlines()[1].startswith("base.jsonl: read")
    parameter = world["model"].model.lm_head.weight
    with torch.no_grad():
        parameter.add_(0.1)
    predict(world, path)
    with torch.no_grad():
        parameter.sub_(0.1)
    assert "computed" in capsys.readouterr().out
    predict(world, path)
    template = world["model"].processor.chat_template
    world["model"].processor.chat_template = template + " "
    predict(world, path)
    world["model"].processor.chat_template = template
    assert ["computed" in line for line in capsys.readouterr().out.splitlines() if line] == [
        True,
        True,
    ]
    assert not list(tmp_path.glob(".*"))


def test_released_decoding_samples_at_their_temperature_and_length(world, tmp_path, capsys):
    rows = predict(world, tmp_path / "released.jsonl", decoding=evaluate.RELEASED_DECODING)
    for kind, tokens in (("CLOSED", 64), ("OPEN", 64), ("REPORT", 1024)):
        asked = [row for row in world["questions"] if row["answer_type"] == kind]
        images = [open_image(world["images"] / row["image"]) for row in asked]
        texts = [question_text(row) for row in asked]
        drawn = lvlm.generate(world["model"], images, texts, tokens, 4, temperature=0.2, seed=0)
        assert [row["prediction"] for row in rows if row["answer_type"] == kind] == [
            text[0] for text in drawn
        ]
    predict(world, tmp_path / "released.jsonl")
    assert "computed" in capsys.readouterr().out.splitlines()[-1], (
        "another decoding gives other predictions"
    )


def test_a_profile_evaluates_somebodys_adapter_with_released_decoding(world, tmp_path):
    """The same questions, the Vicuna template, base and adapter side by side, and the attention of
    both.
    """
    tuned = get_peft_model(
        lvlm.load_lvlm(world["folder"] / "model", "cpu").model, adapter_config(2, 4, 0.0)
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "theirs")
    profile = load_profile(
        "phantom-smoke",
        {
            "output": str(tmp_path),
            "lvlm.model": str(world["folder"] / "model"),
            "evaluation.decoding": "released",
            "evaluation.adapters": {"theirs": str(tmp_path / "theirs")},
            "lvlm.device": "cpu",
        },
    )
    data = FilmDataset(world["images"], {"test": world["questions"]}, world["masks"], None)
    answers = {
        name: evaluate.predict_test_split(profile, data, name, adapter)
        for name, adapter in ({"base": None} | profile.evaluation.adapters).items()
    }
    loaded = lvlm.load_profile_lvlm(profile, tmp_path / "theirs", template="v1")
    assert (
        lvlm.prompt(loaded.processor, "q")
        .removeprefix("<s>")
        .startswith("A chat between a curious user")
    )
    kept = [dict(row) for row in world["questions"]]
    expected = evaluate.predict(
        loaded,
        kept,
        world["images"],
        tmp_path / "again.jsonl",
        profile.evaluation.batch_size,
        evaluate.RELEASED_DECODING,
    )
    assert answers["theirs"] == expected
    assert [row["prediction"] for row in answers["theirs"]] != [
        row["prediction"] for row in answers["base"]
    ]
    _, before, after = comparison.attention_example(profile, data, tmp_path / "theirs")
    assert before.sum() == pytest.approx(1, abs=1e-4) and np.abs(after - before).max() > 1e-4


def test_shuffling_gives_everyone_another_patients_image(world, tmp_path):
    shown = evaluate.shuffled_images(world["questions"], 0)
    owner = {row["image"]: row["patient_id"] for row in world["questions"]}
    assert all(owner[name] != row["patient_id"] for name, row in zip(shown, world["questions"]))
    assert set(shown) == set(owner)
    assert shown == evaluate.shuffled_images(world["questions"], 0)
    rows = predict(world, tmp_path / "shuffled.jsonl", shuffle_images=0)
    assert [row["shown_image"] for row in rows] == shown
    assert [row["image"] for row in rows] == [row["image"] for row in world["questions"]]
    with pytest.raises(InputError, match="two patients"):
        evaluate.shuffled_images(world["questions"][:1], 0)


def test_shuffling_without_patient_names_goes_by_image():
    rows = [{"image": name} for name in ("a.jpg", "b.jpg", "a.jpg")]
    assert evaluate.shuffled_images(rows, 1) == ["b.jpg", "a.jpg", "b.jpg"]


def test_attention_share_closed_forms():
    mask = np.zeros((224, 224), bool)
    mask[:112, :50] = True
    assert attention_share(np.ones((14, 14)), mask) == pytest.approx(mask.mean())
    inside = np.zeros((14, 14))
    inside[2, 1] = 5.0
    assert attention_share(inside, mask) == pytest.approx(1)
    border = np.zeros((14, 14))
    border[0, 3] = 1.0
    assert attention_share(border, mask) == pytest.approx(2 / 16, abs=1e-6)


def test_lesion_attention_asks_only_where_the_finding_has_a_mask(world):
    rows = lesion_attention(world["model"], world["questions"], world["images"], world["masks"], 4)
    masks = {row["image"]: read_masks(world["masks"] / row["image"]) for row in world["questions"]}
    expected = [
        row["question_id"]
        for row in world["questions"]
        if row.get("finding") in masks[row["image"]]
    ]
    assert [row["question_id"] for row in rows] == expected and expected
    assert all(0 <= row["share"] <= 1 for row in rows)
    assert rows[0]["chance"] == pytest.approx(masks[rows[0]["image"]][rows[0]["finding"]].mean())
    assert lesion_attention(world["model"], world["questions"], world["images"], None, 4) == []
    table = comparison.compare({"base": [rows]}, 50, ["attention_in_lesion"])
    assert table["base"]["attention_in_lesion"]["mean"] == pytest.approx(
        100 * np.mean([row["share"] for row in rows])
    )


def test_every_head_is_measured_against_the_models_own_attention(world):
    """Against transformers' attentions of one whole forward pass for each question."""
    asked = []
    for row in world["questions"]:
        masks = read_masks(world["masks"] / row["image"])
        if row.get("finding") in masks:
            film = np.asarray(open_image(world["images"] / row["image"]).convert("L"))
            lesion = masks[row["finding"]]
            asked.append(Asked(row, film, lesion, lesion))
    model = world["model"]
    shares = head_shares(model, asked, batch_size=2)
    llava = model.model
    llava.model.language_model.set_attn_implementation("eager")
    try:
        for item, of_heads in zip(asked, shares, strict=True):
            text = lvlm.prompt(model.processor, question_text(item.row))
            film = Image.fromarray(item.pixels).convert("RGB")
            inputs = model.processor(images=film, text=text, return_tensors="pt")
            with torch.no_grad():
                attentions = llava(**inputs, output_attentions=True).attentions
            seen = inputs["input_ids"][0] == llava.config.image_token_id
            for layer, weights in enumerate(attentions):
                for head, row in enumerate(weights[0, :, -1, seen].numpy()):
                    grid = row.reshape(int(len(row) ** 0.5), -1)
                    expected = attention_share(grid, item.lesion)
                    assert of_heads[layer, head] == pytest.approx(expected, abs=1e-5)
    finally:
        llava.model.language_model.set_attn_implementation("sdpa")
    table = head_table({"base": shares, "again": shares + 0.02}, asked, samples=50)
    assert [(row["layer"], row["head"]) for row in table][:2] == [(1, 1), (1, 2)]
    for row in table:
        mean = 100 * shares[:, row["layer"] - 1, row["head"] - 1].mean()
        assert row["base"]["mean"] == pytest.approx(mean)
        assert row["base"]["low"] <= row["base"]["mean"] <= row["base"]["high"]
        assert list(row["difference"].values()) == pytest.approx([2, 2, 2])


def answers(right, kinds=("CLOSED", "OPEN")):
    return [
        {
            "question_id": n,
            "image": f"{n}.png",
            "answer_type": kinds[n % len(kinds)],
            "answer": "yes",
            "prediction": "yes" if n % 10 < right else "no",
        }
        for n in range(200)
    ]


def test_compare_has_intervals_per_model_and_seed():
    table = comparison.compare(
        {"base": [answers(5)], "mmedpo": [answers(8), answers(9), answers(8)]}, samples=300
    )
    assert json.loads(json.dumps(table)) == table
    assert (
        table["base"]["open_recall"]["seeds"] == 1 and table["mmedpo"]["open_recall"]["seeds"] == 3
    )
    assert "bleu" not in table["base"]
    for scores in table.values():
        for entry in scores.values():
            assert entry["low"] <= entry["mean"] <= entry["high"]
    assert table["mmedpo"]["closed_accuracy"]["mean"] == pytest.approx(
        np.mean([metrics.score(answers(n), "closed_accuracy") for n in (8, 9, 8)])
    )


def test_compare_pair_is_the_difference_and_wants_the_same_questions():
    pair = comparison.compare_pair([answers(8), answers(9)], [answers(5)], samples=300)
    single = comparison.compare({"a": [answers(8), answers(9)], "b": [answers(5)]}, samples=300)
    for metric, entry in pair.items():
        assert entry["mean"] == pytest.approx(
            single["a"][metric]["mean"] - single["b"][metric]["mean"]
        )
    assert comparison.compare_pair([answers(5)], [answers(5)], 50)["closed_accuracy"]["high"] == 0
    with pytest.raises(InputError, match="same questions"):
        comparison.compare_pair([answers(8)], [answers(5)[1:]], samples=10)
