"""Data sets and curation of a profile, on the shipped models."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmedpo_utils import curate
from mmedpo_utils.base.environment import check_environment, versions
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.dataset import prepare_dataset
from mmedpo_utils.lvlm import load_lvlm
from mmedpo_utils.medklip import load_medklip
from mmedpo_utils.phantom.panel import FactJudge, fact_panel
from mmedpo_utils.profiles import load_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return load_profile("phantom-smoke", {"output": str(tmp_path_factory.mktemp("curate"))})


@pytest.fixture(scope="module")
def dataset(profile):
    return prepare_dataset(profile)


def test_a_data_set_is_drawn_once_and_again_when_its_recipe_changes(profile, dataset, capsys):
    prepare_dataset(profile)
    assert "facts.json: read, made earlier" in capsys.readouterr().out
    before = np.asarray(dataset.image(dataset.image_names("test")[0]))
    other = load_profile("phantom-smoke", {"output": str(profile.output), "seed": 5})
    changed = prepare_dataset(other)
    assert "drawing" in capsys.readouterr().out
    first = dataset.image_names("test")[0]
    assert not np.array_equal(np.asarray(changed.image(first)), before)
    prepare_dataset(profile)


def test_masks_and_lesion_mask_agree(dataset):
    for name in dataset.image_names("test"):
        masks, union = dataset.masks(name), dataset.lesion_mask(name)
        assert (union is None) == (not masks)
        if masks:
            assert union.sum() <= sum(mask.sum() for mask in masks.values()) and union.any()


def test_a_folder_that_is_not_there_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEDPO_DATA_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="test_questions.jsonl.*MMEDPO_DATA_ROOT"):
        prepare_dataset(load_profile("vqa-rad-mini"))


def test_curation_runs_once_and_text_and_visual_pairs_ask_the_same(profile, dataset, capsys):
    medklip, lvlm, panel = load_medklip("phantom"), load_lvlm("phantom", "cpu"), fact_panel()
    visual = curate.curate_visual(profile, dataset, medklip)
    text, debates = curate.curate_text(profile, dataset, lvlm, FactJudge(), panel)
    rows = curate.write_training_pairs(profile, text, visual)
    assert [row["id"] for row in text] == [row["id"] for row in visual]
    assert len(text) == profile.curation.text_pairs == len(debates) and len(rows) == 2 * len(text)
    assert "computed" in capsys.readouterr().out
    before = (profile.output / "pairs" / "noised" / visual[0]["rejected_image"]).read_bytes()
    again = curate.curate_visual(profile, dataset, medklip)
    assert again == visual and "read, made earlier" in capsys.readouterr().out
    assert (
        profile.output / "pairs" / "noised" / visual[0]["rejected_image"]
    ).read_bytes() == before
    for row in text:
        assert (
            FactJudge().conflict(
                row["conversations"][0]["value"],
                row["conversations"][1]["value"],
                row["rejected_conversations"][1]["value"],
            )
            > 0
        )


def test_training_questions_are_a_seeded_draw(profile, dataset):
    first, second = (curate.training_questions(profile, dataset) for _ in range(2))
    assert first == second and len(first) == profile.curation.text_pairs
    assert {row["image"] for row in first} <= set(dataset.image_names("train"))


def test_released_rows_are_read_as_they_are(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("MMEDPO_DATA_ROOT", str(shared / "data" / "vqa_rad_mini"))
    profile = load_profile("vqa-rad-mini", {"output": str(tmp_path)})
    released = prepare_dataset(profile)
    rows, debates = curate.curate_text(profile, released, None, FactJudge(), fact_panel())
    assert debates == [] and rows == json.loads(released.released_pairs.read_text())
    assert [row["gpt4_answer"] for row in curate.training_questions(profile, released)][:2] == [
        "Respiratory",
        "No",
    ]


def test_the_environment_check_names_what_decides(monkeypatch):
    found = versions()
    assert found["torch"].split("+")[0] == "2.13.0" and found["python"].startswith("3.")
    rows = {part: (there, allows) for part, there, allows in check_environment()}
    assert {
        "Python",
        "torch",
        "device",
        "memory",
        "cores",
        "deepspeed",
        "bitsandbytes",
    } <= rows.keys()
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "deepspeed" else object()
    )
    missing = {part: (there, allows) for part, there, allows in check_environment()}
    assert missing["deepspeed"][0] == "not installed" and "one process" in missing["deepspeed"][1]
