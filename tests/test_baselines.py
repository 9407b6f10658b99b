"""The baselines' preference pairs against what defines them: the samples, the judge, the panel, the
model's own library loss.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import open_image
from mmedpo_utils.base.rows import question_text
from mmedpo_utils.dataset import prepare_dataset
from mmedpo_utils.lvlm import generate, load_lvlm
from mmedpo_utils.phantom.panel import FactJudge, fact_panel
from mmedpo_utils.preference_rows import answer_text, read_manifest
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs import baselines
from mmedpo_utils.relevance import debate, normalise, sample_candidates, training_weights

from .conftest import REPOSITORY

SMALL = {
    "data.train_patients": 16,
    "data.validation_patients": 2,
    "data.test_patients": 6,
    "curation.text_pairs": 40,
    "curation.candidates": 4,
    "lvlm.max_new_tokens": 24,
    "lvlm.device": "cpu",
}
SAMPLED = ("stllava_med_style", "self_rewarding_style", "sima_style")


def both_answers(row: dict) -> list[str]:
    """The preferred and the rejected answer of a row."""
    return [answer_text(row), answer_text(row, rejected=True)]


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    return load_profile(
        "phantom-baselines", {**SMALL, "output": str(folder), "figures": str(folder / "figures")}
    )


@pytest.fixture(scope="module")
def dataset(profile):
    return prepare_dataset(profile)


@pytest.fixture(scope="module")
def rows(profile, dataset) -> dict[str, list[dict]]:
    """Every manifest that the profile's variants name."""
    baselines.build_manifests(profile, dataset)
    folder = profile.output / "pairs"
    return {
        name: read_manifest(folder / f"{name}.json", dataset.image_root, folder / "noised")
        for name in baselines.MANIFESTS
    }


@pytest.fixture(scope="module")
def lvlm():
    return load_lvlm("phantom", "cpu")


@pytest.fixture(scope="module")
def questions(profile, dataset) -> dict[str, dict]:
    return {str(row["question_id"]): row for row in baselines.training_questions(profile, dataset)}


@pytest.fixture(scope="module")
def samples(profile, dataset, lvlm, questions) -> dict[str, list[str]]:
    """Four samples of each question, by its id."""

    def answer(images, texts, **options):
        return generate(lvlm, images, texts, 24, profile.lvlm.batch_size, **options)

    found = sample_candidates(
        answer, list(questions.values()), dataset.image_root, 4, 1.0, profile.seed
    )
    return {
        key: [text.strip() for text in texts] for key, texts in zip(questions, found, strict=True)
    }


def own_loss(lvlm, dataset, row: dict, response: str) -> float:
    """transformers' own mean loss per token of one response, one row at a time, without padding."""
    processor, image = lvlm.processor, open_image(dataset.image_root / row["image"]).convert("RGB")
    prompt = f"<s>[INST] <image> {question_text(row)} [/INST]"
    batch = processor(
        images=image, text=f"{prompt} {response}</s>", add_special_tokens=False, return_tensors="pt"
    )
    before = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ].shape[1]
    labels = batch["input_ids"].clone()
    labels[:, :before] = -100
    with torch.no_grad():
        return float(lvlm.model(**batch, labels=labels).loss)


def test_the_profile_trains_every_manifest_and_names_the_papers_baselines(profile):
    assert {variant.pairs for variant in profile.training.variants.values()} == set(
        baselines.MANIFESTS
    )
    assert set(baselines.MANIFESTS) - {"train", "truth"} < set(profile.training.variants)
    parts = {
        name: profile.training.variants[name].trains
        for name in ("mmedpo", "lora_alone", "projector_alone")
    }
    assert parts == {
        "mmedpo": ("lora", "projector"),
        "lora_alone": ("lora",),
        "projector_alone": ("projector",),
    }


def test_every_manifest_is_of_the_released_format(rows, questions):
    schema = json.loads((REPOSITORY / "data_manifests" / "pair_schema.json").read_text())
    for name, pairs in rows.items():
        jsonschema.validate(pairs, schema)
        assert {str(row["id"]) for row in pairs} <= set(questions), name
        for row in pairs:
            assert question_text(row) == question_text(questions[str(row["id"])]), name
            if name not in SAMPLED:
                assert answer_text(row) == questions[str(row["id"])]["gpt4_answer"], name


def test_both_answers_are_the_models_own(rows, samples):
    for name in ("stllava_med_style", "self_rewarding_style"):
        assert len(rows[name]) >= 10
        for row in rows[name]:
            assert len(set(both_answers(row))) == 2 and row["origin"] == "sampled"
            assert set(both_answers(row)) <= set(samples[str(row["id"])])


def test_the_judge_ranks_stllava_med_style_pairs_by_the_truth(rows, samples, questions):
    judge = FactJudge()
    for row in rows["stllava_med_style"]:
        truth = questions[str(row["id"])]
        conflicts = [
            judge.conflict(question_text(truth), truth["gpt4_answer"], text)
            for text in samples[str(row["id"])]
        ]
        found = [
            judge.conflict(question_text(truth), truth["gpt4_answer"], text)
            for text in both_answers(row)
        ]
        assert found == [min(conflicts), max(conflicts)] and found[0] < found[1]


def test_likelihood_is_the_librarys_own_loss_whatever_the_batch(rows, lvlm, dataset):
    pairs = (
        rows["self_rewarding_style"][:7]
        + [row for row in rows["train"] if len(answer_text(row).split()) > 5][:2]
    )
    images = [open_image(dataset.image_root / row["image"]) for row in pairs]
    texts, answers = [question_text(row) for row in pairs], [answer_text(row) for row in pairs]
    expected = [-own_loss(lvlm, dataset, row, answer) for row, answer in zip(pairs, answers)]
    for size in (1, 4, 32):
        np.testing.assert_allclose(
            baselines.likelihood(lvlm, images, texts, answers, size), expected, atol=1e-4
        )


def test_self_rewarding_prefers_what_the_model_finds_likelier(rows, samples, lvlm, dataset):
    for row in rows["self_rewarding_style"][:12]:
        scores = {text: -own_loss(lvlm, dataset, row, text) for text in samples[str(row["id"])]}
        assert scores[answer_text(row)] == pytest.approx(max(scores.values()), abs=1e-4)
        assert scores[answer_text(row, rejected=True)] == pytest.approx(
            min(scores.values()), abs=1e-4
        )


def test_sima_compares_the_greedy_answer_with_one_sample(rows, lvlm, dataset):
    assert len(rows["sima_style"]) >= 3
    for row in rows["sima_style"]:
        image = open_image(dataset.image_root / row["image"])
        greedy, both = generate(lvlm, [image], [question_text(row)], 24, 1)[0][0], both_answers(row)
        assert greedy in both and both[0] != both[1]
        evidence = baselines.visual_evidence(lvlm, [image] * 2, [question_text(row)] * 2, both, 2)
        assert evidence[0] > evidence[1]


def test_visual_evidence_agrees_with_the_facts_more_than_likelihood_does(
    samples, questions, lvlm, dataset
):
    judge, right = FactJudge(), {"likelihood": [], "visual_evidence": []}
    for name, found in right.items():
        for key, row in questions.items():
            texts = sorted({text for text in samples[key] if text})
            if row["answer_type"] == "REPORT" or len(texts) < 2:
                continue
            image = open_image(dataset.image_root / row["image"])
            count = len(texts)
            scores = getattr(baselines, name)(
                lvlm, [image] * count, [question_text(row)] * count, texts, count
            )
            conflicts = [
                judge.conflict(question_text(row), row["gpt4_answer"], text) for text in texts
            ]
            found += [
                (scores[i] > scores[j]) == (conflicts[i] < conflicts[j])
                for i in range(count)
                for j in range(i)
                if conflicts[i] != conflicts[j]
            ]
    assert len(right["likelihood"]) >= 20
    assert np.mean(right["visual_evidence"]) > 0.65 > np.mean(right["likelihood"])


def test_povid_pairs_contradict_the_truth_and_touch_the_whole_image(rows, dataset, profile):
    judge, noised, changed = FactJudge(), profile.output / "pairs" / "noised", {}
    for name in ("povid_style", "train"):
        for row in rows[name]:
            if row.get("rejected_image"):
                images = [
                    np.asarray(open_image(path).convert("L"), float)
                    for path in (dataset.image_root / row["image"], noised / row["rejected_image"])
                ]
                blocks = (images[0] != images[1]).reshape(8, 28, 8, 28).any((1, 3))
                changed.setdefault(name, []).append(blocks.mean())
                assert answer_text(row) == answer_text(row, rejected=True)
    assert set(changed["povid_style"]) == {1.0} and max(changed["train"]) < 0.8
    written = [row for row in rows["povid_style"] if row["source"] == "text"]
    assert len(written) == 40 and {row["origin"] for row in written} == {"written"}
    assert all(judge.conflict(question_text(row), *both_answers(row)) > 0 for row in written)


def test_global_noise_differs_from_mmedpo_in_the_rejected_images_alone(rows):
    without = {
        name: [{**row, "rejected_image": None} for row in rows[name]]
        for name in ("global_noise", "train")
    }
    assert without["global_noise"] == without["train"]
    pairs = [
        (one["rejected_image"], two["rejected_image"])
        for one, two in zip(rows["global_noise"], rows["train"])
    ]
    assert all((one is None) == (two is None) and (one is None or one != two) for one, two in pairs)


def test_scores_of_one_and_of_several_language_models_are_the_debates(rows, profile):
    text = [row for row in rows["train"] if row["source"] == "text"]
    panel = fact_panel()
    for name, members in (("single_llm", panel[:1]), ("several_llm", panel)):
        expected = [
            debate(question_text(row), *both_answers(row), members, profile.curation.rounds).score
            for row in text
        ]
        assert [row["weighted_score"] for row in rows[name]] == expected
        weights = training_weights(rows[name], profile.training.variants[name], profile)
        np.testing.assert_allclose(weights, normalise(expected))
        assert list(map(both_answers, rows[name])) == list(map(both_answers, text))
    assert rows["several_llm"] == text
    alone = [panel[0](question_text(row), *both_answers(row), None)[0] for row in text]
    assert (
        [row["weighted_score"] for row in rows["single_llm"]]
        == alone
        != [row["weighted_score"] for row in text]
    )


def test_truth_needs_no_model_no_judge_and_is_read_without_a_warning(
    profile, dataset, questions, tmp_path, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("not needed")

    for name in ("build_judges", "load_profile_lvlm", "load_medklip"):
        monkeypatch.setattr(baselines, name, never)
    sft = replace(profile.training, variants={"sft": profile.training.variants["sft"]})
    baselines.build_manifests(replace(profile, output=tmp_path, training=sft), dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = read_manifest(tmp_path / "pairs" / "truth.json", dataset.image_root)
    assert [(str(row["id"]), answer_text(row)) for row in pairs] == [
        (key, row["gpt4_answer"]) for key, row in questions.items()
    ]
    assert all(
        answer_text(row) == answer_text(row, rejected=True) and row["origin"] == "none"
        for row in pairs
    )
    with pytest.raises(
        InputError, match="training.variants.dpo.objective.*expected sft for the pairs `truth`"
    ):
        load_profile("phantom-smoke", {"training.variants.dpo.pairs": "truth"})


def test_manifests_are_made_once_and_again_when_their_inputs_change(
    profile, dataset, rows, monkeypatch, capsys
):
    def never(_):
        raise AssertionError("made again")

    made = {name: replace(manifest, build=never) for name, manifest in baselines.MANIFESTS.items()}
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "MANIFESTS", made)
        baselines.build_manifests(profile, dataset)
        assert "computed" not in capsys.readouterr().out
        hotter = replace(profile, curation=replace(profile.curation, temperature=2.0))
        with pytest.raises(AssertionError, match="made again"):
            baselines.build_manifests(hotter, dataset)


def test_a_manifest_of_ones_own_has_to_be_there(profile, dataset, tmp_path):
    mine = replace(profile.training.variants["dpo"], pairs="mine")
    own = replace(
        profile, output=tmp_path, training=replace(profile.training, variants={"dpo": mine})
    )
    with pytest.raises(InputError, match="mine.json: no such manifest"):
        baselines.build_manifests(own, dataset)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "mine.json").write_text("[]")
    baselines.build_manifests(own, dataset)
    assert (tmp_path / "pairs" / "mine.json").read_text() == "[]"


def test_ranked_pairs_leave_out_ties_repeats_and_silence():
    question = {
        "question_id": 7,
        "image": "a.png",
        "text": "Where?\n<image>",
        "gpt4_answer": "left",
        "answer_type": "OPEN",
    }
    cases = [
        (["right", "left", "base"], [0.1, 0.9, 0.5], ("left", "right")),
        (["left", "right"], [0.5, 0.5], None),
        (["Left", "left"], [0.1, 0.5], None),
        (["", "left"], [0.9, 0.5], None),
        (["", "  "], [0.9, 0.5], None),
        (["", "left", "right"], [0.9, -3.0, -2.0], ("right", "left")),
    ]
    for texts, scores, expected in cases:
        found = list(map(both_answers, baselines.ranked_pairs([question], [texts], [scores])))
        assert found == ([list(expected)] if expected else []), texts


def run_program(folder: Path, monkeypatch, variants: dict, seeds: list[str]) -> dict:
    """The program from its command line on a saved profile; the table that it wrote."""
    changes = {
        **SMALL,
        "output": str(folder),
        "figures": str(folder / "figures"),
        "training.epochs": None,
        "training.max_steps": 2,
        "training.per_device_batch_size": 2,
        "training.processes": 1,
        "training.variants": variants,
        "evaluation.questions": 12,
        "evaluation.bootstrap_samples": 20,
        "curation.text_pairs": 24,
    }
    load_profile("phantom-baselines", changes).save(folder / "small.yaml")
    monkeypatch.setattr(
        sys, "argv", ["baselines", "--profile", str(folder / "small.yaml"), "--seeds", *seeds]
    )
    assert baselines.main() == 0
    return json.loads((folder / "figures" / "reference" / "phantom_baselines.json").read_text())


def as_dict(names) -> dict:
    variants = load_profile("phantom-baselines").as_dict()["training"]["variants"]
    return {name: variants[name] for name in names}


def test_the_program_builds_trains_evaluates_and_writes_one_table(tmp_path, monkeypatch, capsys):
    table = run_program(tmp_path, monkeypatch, as_dict(["sft", "self_rewarding_style"]), ["0"])
    assert list(table["models"]) == ["base", "sft", "self_rewarding_style"]
    assert set(table["differences"]) == {"sft - base", "self_rewarding_style - base"}
    for scores in table["models"].values():
        assert all(
            0 <= score["low"] <= score["mean"] <= score["high"] <= 100 for score in scores.values()
        )
    assert table["training"]["sft"]["pairs"] <= 24 and len(table["training"]["sft"]["seconds"]) == 1
    made = {path.stem for path in (tmp_path / "pairs").glob("*.json")}
    assert made == {"truth", "self_rewarding_style"}
    card = (tmp_path / "train" / "sft-seed0" / "adapter" / "README.md").read_text()
    assert f"| closed accuracy | {table['models']['sft']['closed_accuracy']['mean']:.1f} (" in card
    printed = capsys.readouterr().out.splitlines()
    lines = [
        line
        for line in printed
        if line.startswith(("model ", "base ", "sft ", "self_rewarding_style "))
    ]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4


@pytest.mark.slow
def test_every_variant_of_the_profile_trains(tmp_path, monkeypatch):
    names = list(load_profile("phantom-baselines").training.variants)
    table = run_program(tmp_path, monkeypatch, as_dict(names), ["0"])
    assert list(table["models"]) == ["base", *names]
    assert {f"mmedpo - {name}" for name in names if name != "mmedpo"} < set(table["differences"])
    assert all(len(run["seconds"]) == 1 for run in table["training"].values())
