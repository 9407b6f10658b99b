"""The arena at its smallest: what is trained, what is shared, and what the results hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.phantom.panel import reworded
from mmedpo_utils.preference_rows import answer_text, read_manifest
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs import arena as experiments
from mmedpo_utils.programs import recipes
from mmedpo_utils.programs.baselines import Ingredients
from mmedpo_utils.programs.recipes import Arena, Job, QuestionSet, Recipe, keep_result

SMALL = {
    "data.train_patients": 24,
    "data.validation_patients": 6,
    "data.test_patients": 8,
    "lvlm.max_new_tokens": 16,
    "curation.text_pairs": 24,
    "curation.candidates": 2,
    "training.lora_rank": 4,
    "training.per_device_batch_size": 6,
    "evaluation.questions": 16,
    "evaluation.bootstrap_samples": 20,
}


@pytest.fixture(scope="module")
def arena(tmp_path_factory) -> Arena:
    folder = tmp_path_factory.mktemp("arena")
    places = {"output": str(folder / "run"), "figures": str(folder / "figures")}
    return Arena(load_profile("arena", SMALL | places), workers=2)


@pytest.fixture(scope="module")
def chosen(arena) -> Arena:
    """The arena with values for each variant, as `tune` leaves them."""
    values = {"learning_rate": 1e-4, "beta": 0.5, "passes": 1.0}
    found = {name: {"chosen": values} for name in experiments.VARIANTS}
    keep_result(arena.profile, "tune", {"variants": found}, 1.0)
    return arena


@pytest.fixture
def in_this_process(chosen, monkeypatch) -> list:
    """Models are trained and asked here: a worker's libraries take longer to import than its work
    does. Each group of jobs, as it begins.
    """
    begun = []

    def finished(self, groups):
        for group in groups:
            begun.append(group)
            recipes.train_and_ask(chosen.profile, group)
            yield

    monkeypatch.setattr(Arena, "_finished", finished)
    return begun


def test_before_tune_an_experiment_says_what_to_run(tmp_path):
    small = Arena(
        load_profile("arena", SMALL | {"output": str(tmp_path), "figures": str(tmp_path)}), 1
    )
    with pytest.raises(InputError, match="mmedpo arena --only tune"):
        experiments.tuned(small, "dpo")


def test_each_model_is_trained_once_and_one_that_starts_from_another_after_it(
    chosen, in_this_process
):
    trained = in_this_process
    supervised = experiments.tuned(chosen, "sft")
    later = replace(experiments.tuned(chosen, "dpo"), start=supervised)
    jobs = [Job(later, 0), Job(later, 0, QuestionSet(shuffled=True)), Job(None, 0)]
    answers = chosen.answers(jobs, "test")
    assert [len(group) for group in trained] == [1, 1, 2], "base, sft, then dpo from sft"
    assert trained[1][0].recipe == supervised and trained[2][0].recipe == later
    shown = [row.get("shown_image") for row in answers[jobs[1]]]
    assert all(shown) and shown != [row["image"] for row in answers[jobs[1]]]
    trained.clear()
    assert chosen.answers(jobs, "test") == answers and not trained, "nothing is done twice"
    folders = {path.name for path in (chosen.profile.output / "train").iterdir() if path.is_dir()}
    assert len(folders) == 2


def test_another_manifest_of_the_same_name_is_another_model(chosen):
    recipe = experiments.tuned(chosen, "dpo").on("changing")
    rows = experiments.base_rows(chosen)[0]
    chosen.write_pairs("changing", rows)
    before = recipes.recipe_digest(chosen.profile, recipe)
    chosen.write_pairs("changing", rows[:-1])
    assert recipes.recipe_digest(chosen.profile, recipe) != before


def test_answers_of_another_profile_or_another_model_are_not_read(chosen, monkeypatch):
    recipe = experiments.tuned(chosen, "dpo")
    jobs = [Job(None, 0), Job(recipe, 0)]
    before = [recipes.predictions_path(chosen.profile, job) for job in jobs]
    values = replace(chosen.profile.training, lora_rank=8)
    other = replace(chosen.profile, training=values)
    monkeypatch.setattr(recipes, "_BASES", {})
    monkeypatch.setattr(recipes, "model_digest", lambda model: "other weights")
    after = [recipes.predictions_path(chosen.profile, job) for job in jobs]
    assert not set(before) & set(after)
    assert not set(after) & {recipes.predictions_path(other, job) for job in jobs}


def test_a_recipe_trains_with_its_own_values(chosen):
    recipe = Recipe(
        chosen.profile.training.variants["mmedpo"],
        passes=2,
        learning_rate=2e-4,
        projector_share=10,
        beta=0.3,
    )
    own = recipes.recipe_profile(chosen.profile, recipe, 0).training
    assert (own.epochs, own.max_steps, own.beta) == (2, None, 0.3)
    assert own.learning_rate == 2e-4 and own.projector_learning_rate == pytest.approx(2e-3)
    (variant,) = own.variants.values()
    assert variant == recipe.variant


def test_more_leaking_pairs_are_won_blind_more_often_with_the_same_claims(chosen):
    plain = experiments.plain_text_rows(chosen)
    sentences = reworded(plain, 1.0, 0)
    assert [answer_text(row) for row in plain] == [answer_text(row) for row in sentences]
    assert [row["weighted_score"] for row in plain] == [row["weighted_score"] for row in sentences]
    longer = [len(answer_text(row, rejected=True)) for row in sentences]
    assert sum(longer) > sum(len(answer_text(row, rejected=True)) for row in plain)
    # What curation writes where the profile asks for sentences.
    judge = replace(chosen.profile.judge, whole_sentences=1.0)
    profile = replace(chosen.profile, judge=judge, output=chosen.profile.output / "sentences")
    assert Ingredients(profile, chosen.dataset).text_rows == sentences


@pytest.mark.parametrize("kind", experiments.NOISE_PLACES)
def test_noise_lies_where_the_experiment_says(chosen, kind):
    _, visual = experiments.base_rows(chosen)
    rows = experiments.noised_elsewhere(chosen, visual, kind)
    assert [row["id"] for row in rows] == [row["id"] for row in visual]
    root = chosen.profile.output / "pairs" / "noised"
    seen = 0
    for row, before in zip(rows, visual, strict=True):
        masks = chosen.dataset.masks(row["image"])
        asked = experiments.asked_region(masks, row["finding"])
        if kind in ("lesion", "elsewhere") and asked is None:
            assert row == before
            continue
        clean = np.asarray(chosen.dataset.image(row["image"]))
        with Image.open(root / row["rejected_image"]) as copy:
            changed = np.asarray(copy) != clean
        seen += 1
        if kind == "lesion":
            assert changed[asked].mean() > 0.8 and not changed[~asked].any()
        elif kind == "elsewhere":
            assert changed.sum() > 0 and changed[asked].mean() < 0.2
        elif kind == "global":
            assert changed.mean() > 0.8
        else:
            assert 0 < changed.mean()
    assert seen


def test_weights_are_permuted_and_reversed_within_a_source(chosen, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        experiments, "compared", lambda arena, told, models, *_: asked.update(models) or {}
    )
    experiments.weights(chosen)
    folder = chosen.profile.output / "pairs"
    own, permuted, turned = (
        read_manifest(folder / f"{name}.json")
        for name in ("train", "weights-permuted", "weights-reversed")
    )
    for source in ("text", "visual"):
        scores, moved, flipped = (
            np.array([row["weighted_score"] for row in rows if row["source"] == source])
            for rows in (own, permuted, turned)
        )
        assert np.allclose(sorted(scores), sorted(moved), atol=1e-6)
        assert np.allclose(scores + flipped, scores.min() + scores.max(), atol=1e-5)
    assert asked["none"].variant.weights == "uniform"
    assert asked["as_they_are"] == experiments.tuned(chosen, "mmedpo")


def test_pairs_of_the_supervised_model_ask_the_same_and_keep_the_visual_pairs(chosen):
    name = experiments.supervised_pairs(chosen, experiments.tuned(chosen, "sft"))
    text, visual = experiments.base_rows(chosen)
    rows = read_manifest(chosen.profile.output / "pairs" / f"{name}.json")
    assert [row for row in rows if row["source"] == "visual"] == visual
    own = [row for row in rows if row["source"] == "text"]
    assert {row["id"] for row in own} <= {row["id"] for row in text}
    truth = {row["id"]: answer_text(row) for row in text}
    assert all(answer_text(row) == truth[row["id"]] for row in own)


@pytest.mark.usefixtures("in_this_process")
def test_curves_have_looks_at_held_out_pairs_and_scores_of_validation_patients(chosen, monkeypatch):
    monkeypatch.setattr(experiments, "VARIANTS", ("dpo",))
    monkeypatch.setattr(experiments, "DOSES", (1.0, 2.0))
    monkeypatch.setattr(experiments, "LOOK_EVERY", 1)
    curve = experiments.curves(chosen)["variants"]["dpo"]
    steps = [look["step"] for look in curve["looks"]]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
    assert all(0 <= look["validation_accuracy"] <= 1 for look in curve["looks"])
    assert [point["passes"] for point in curve["validation"]] == [1.0, 2.0]
    for point in curve["validation"]:
        assert all(0 <= point[metric] <= 100 for metric in experiments.SCORES)


@pytest.mark.usefixtures("in_this_process")
def test_the_premise_is_measured_for_every_variant_and_seed(chosen, monkeypatch):
    monkeypatch.setattr(experiments, "VARIANTS", ("dpo",))
    monkeypatch.setattr(experiments, "SEEDS", (0, 1))
    models = experiments.premise(chosen)["models"]
    assert {name: entries["lesion_drop"]["seeds"] for name, entries in models.items()} == {
        "base": 1,
        "dpo": 2,
    }


@pytest.mark.usefixtures("in_this_process")
def test_what_was_seen_is_counted_on_the_pairs_that_were_trained_on(chosen):
    recipe = experiments.tuned(chosen, "mmedpo")
    chosen.answers([Job(recipe, experiments.SEEDS[0])], "test")
    seen = experiments.seen(chosen, recipe)
    size = chosen.profile.training.per_device_batch_size
    assert seen["steps"] == -(-seen["pairs_seen"] // size)
    assert seen["text_pairs_seen"] == pytest.approx(seen["pairs_seen"] / 2, abs=1)
    assert seen["pairs_seen"] < len(read_manifest(chosen.profile.output / "pairs" / "train.json"))


def test_an_experiment_keeps_the_results_of_the_others(chosen, monkeypatch):
    """Real worker processes: the leak at one share, one seed."""
    monkeypatch.setattr(experiments, "LEAKS", (0.25,))
    monkeypatch.setattr(experiments, "SEEDS", (0,))
    result = experiments.leaks(chosen)
    keep_result(chosen.profile, "leak", result, 2.0)
    kept = json.loads(Path(recipes.results_path(chosen.profile)).read_text())
    assert set(kept["experiments"]) == {"tune", "leak"}
    (point,) = kept["experiments"]["leak"]["points"]
    assert point["share"] == 0.25
    for name in ("dpo", "mmedpo", "difference"):
        for metric in ("closed_accuracy", "open_recall"):
            entry = point[name][metric]
            assert entry["low"] <= entry["mean"] <= entry["high"] and entry["seeds"] == 1
    mean = point["difference"]["closed_accuracy"]["mean"]
    both = [point[name]["closed_accuracy"]["mean"] for name in ("mmedpo", "dpo")]
    assert mean == pytest.approx(both[0] - both[1])
    assert {"versions", "date", "commit", "seconds"} <= kept["experiments"]["leak"].keys()
