"""The numbers that the shipped text quotes are the ones that `make results` measured."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest

from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs import reference_results
from mmedpo_utils.programs.run_notebooks import scores_as_text
from tests.conftest import REPOSITORY

RESULTS = json.loads((REPOSITORY / "figures" / "reference" / "phantom_results.json").read_text())
ARENA = json.loads((REPOSITORY / "figures" / "reference" / "arena.json").read_text())
README = (REPOSITORY / "README.md").read_text()
WEIGHTS = REPOSITORY / "mmedpo_utils" / "phantom" / "weights"
MODELS = ("base", "sft", "dpo", "stage1", "stage2", "mmedpo", "mmedpo_shuffled")
METRICS = ("closed_accuracy", "open_recall", "bleu", "rouge_l", "attention_in_lesion")


def test_the_file_has_every_number_that_was_promised():
    for model in MODELS:
        for metric in METRICS[:4] if model == "mmedpo_shuffled" else METRICS:
            entry = RESULTS["models"][model][metric]
            assert 0 <= entry["low"] <= entry["mean"] <= entry["high"] <= 100, (model, metric)
            assert entry["seeds"] >= (1 if model == "base" else 3), (model, metric)
    assert {"pointing_game", "pointing_game_nodule", "auc"} <= RESULTS["medklip"].keys()
    assert {"closed_accuracy", "open_recall"} <= RESULTS["ceiling"].keys()
    assert {"seconds", "cached_seconds", "peak_gib"} <= RESULTS["run"].keys()
    for part in (RESULTS, RESULTS["run"]):
        assert re.fullmatch(r"[0-9a-f]{40}", part["commit"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", part["date"])


@pytest.mark.parametrize("model", MODELS)
def test_the_readme_quotes_the_reference(model):
    row = re.search(rf"^\| `{model}` \|(.*)\|$", README, flags=re.M)
    assert row, f"README has no row for {model}"
    for cell, metric in zip(row[1].split("|"), METRICS[:2], strict=False):
        mean, low, high = (
            f"{RESULTS['models'][model][metric][key]:.1f}" for key in ("mean", "low", "high")
        )
        assert cell.strip() == f"{mean} ({low} to {high})"


def test_the_readme_quotes_the_ceiling_the_visual_tool_and_the_run():
    ceiling, run = RESULTS["ceiling"], RESULTS["run"]
    assert f"reaches {ceiling['closed_accuracy']:.1f} and {ceiling['open_recall']:.1f}." in README
    assert f"of it, on\n{RESULTS['medklip']['pointing_game']:.1f}% of the films" in README
    said = (
        f"{run['seconds'] / 60:.0f} minutes after the install ({run['cached_seconds'] / 60:.0f} "
        "when its results are there "
        f"already) and {run['peak_gib']:.1f} GiB"
    )
    assert said in " ".join(README.split())


def test_mmedpo_gains_over_the_base_and_the_gain_needs_the_film():
    for metric in ("closed_accuracy", "open_recall"):
        base, trained = (RESULTS["models"][name][metric] for name in ("base", "mmedpo"))
        assert trained["low"] > base["high"], f"{metric}: the intervals are not apart"
        assert RESULTS["differences"]["mmedpo_shuffled - base_shuffled"][metric]["low"] <= 0, (
            f"{metric}: survives the shuffle"
        )


def test_the_readme_quotes_the_measured_minutes():
    for name, seconds in RESULTS["run"]["seconds_per_notebook"].items():
        if name[0].isdigit():
            row = re.search(rf"\(notebooks/{name}\.ipynb\).*\| ([\d.]+) \|$", README, flags=re.M)
            assert row and float(row[1]) == round(seconds / 60, 1), name


def rounded_entries(value: object, decimals: int) -> set[tuple[str, ...]]:
    """Every mean with its interval in a results file, as text would print it."""
    found = set()
    if isinstance(value, dict):
        if {"mean", "low", "high"} <= value.keys():
            found.add(tuple(f"{value[key]:.{decimals}f}" for key in ("mean", "low", "high")))
        for part in value.values():
            found |= rounded_entries(part, decimals)
    if isinstance(value, list):
        for part in value:
            found |= rounded_entries(part, decimals)
    return found


@pytest.mark.parametrize("text", ["README.md", "06_paper_figures", "07_when_does_it_help"])
def test_every_interval_that_a_text_quotes_stands_in_a_results_file(text):
    if text == "README.md":
        said = README
    else:
        notebook = json.loads((REPOSITORY / "notebooks" / f"{text}.ipynb").read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
        said = "\n".join("".join(cell["source"]) for cell in cells)
    known = set()
    for results in (RESULTS, ARENA):
        known |= rounded_entries(results, 1) | rounded_entries(results, 2)
    quoted = re.findall(r"(-?\d+\.\d+) \((-?\d+\.\d+) to (-?\d+\.\d+)\)", said)
    assert quoted or text == "06_paper_figures"
    assert not [numbers for numbers in quoted if numbers not in known]


@pytest.mark.parametrize("card", ["medklip", "lvlm"])
def test_model_cards_quote_their_scores(card):
    text = (WEIGHTS / card / "README.md").read_text()
    scores = json.loads((WEIGHTS / card / "scores.json").read_text())
    if card == "lvlm":
        wanted = [
            scores[kind][metric]
            for kind in ("base", "ceiling")
            for metric in ("closed_accuracy", "open_recall")
        ]
    else:
        wanted = [scores["pointing_game"], scores["pointing_game_alone"]["nodule"], scores["auc"]]
        wanted = [100 * value if value <= 1 else value for value in wanted]
    assert all(f"{value:.1f}" in text for value in wanted), wanted


def test_weights_are_small_and_safe():
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert len(files) == 2 and sum(path.stat().st_size for path in files) < 10 * 2**20
    assert not [
        path for path in WEIGHTS.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")
    ]


def test_scores_as_text_has_a_row_a_model():
    lines = scores_as_text(RESULTS["models"]).splitlines()
    assert len(lines) == len(RESULTS["models"]) + 1
    assert (
        f"{RESULTS['models']['mmedpo']['closed_accuracy']['mean']:.1f}"
        in lines[1 + list(RESULTS["models"]).index("mmedpo")]
    )


def test_a_shuffled_name_asks_that_model_about_other_films_and_every_seed_is_scored(monkeypatch):
    asked, cards = [], []

    def answer(profile, dataset, label, adapter, shuffle=False):
        asked.append((label, adapter, shuffle))
        right = "no" if shuffle else "yes"
        return [
            {
                "question_id": number,
                "image": f"{number}.png",
                "answer_type": "CLOSED",
                "answer": "yes",
                "prediction": right,
            }
            for number in range(6)
        ]

    def trained(profile, name, seed, live):
        return SimpleNamespace(
            adapter=f"{name}{seed}", result={"pairs": 5, "seconds": {"steps": seed + 1.0}}
        )

    monkeypatch.setattr(reference_results, "train", trained)
    monkeypatch.setattr(reference_results, "predict_test_split", answer)
    monkeypatch.setattr(reference_results, "lesion_attention_of_test_split", lambda *_: [])
    monkeypatch.setattr(
        reference_results,
        "add_scores",
        lambda adapter, scores: cards.append((adapter, len(scores))),
    )
    profile = load_profile("phantom-smoke", {"evaluation.seeds": [4]})
    one = dataclasses.replace(profile.training, variants={"dpo": profile.training.variants["dpo"]})
    pairs = [("dpo", "base"), ("dpo_shuffled", "base")]
    table = reference_results.evaluate_seeds(
        dataclasses.replace(profile, training=one), None, (4, 5), pairs
    )
    assert asked == [
        ("base", None, False),
        ("dpo", "dpo4", False),
        ("dpo_shuffled", "dpo4", True),
        ("dpo-seed5", "dpo5", False),
        ("dpo-seed5_shuffled", "dpo5", True),
    ]
    assert cards == [("dpo4", 1), ("dpo5", 1)] and table["training"] == {
        "dpo": {"pairs": 5, "seconds": [5.0, 6.0]}
    }
    means = {
        name: difference["closed_accuracy"]["mean"]
        for name, difference in table["differences"].items()
    }
    assert means == {"dpo - base": 0, "dpo_shuffled - base": -100}
