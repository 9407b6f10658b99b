"""Recompute the reference results that the README and the model cards quote: ``mmedpo results
[--only run | scores]``.

``run``: the whole tutorial runs twice, from nothing and again on its own artefacts, and is timed.
``scores``: every variant is trained with three seeds on the same pairs and evaluated. Both are
written to ``figures/reference/phantom_results.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from ..base.environment import provenance
from ..base.files import load_json, write_json
from ..base.settings import SPLITS, repository_root
from ..dataset import FilmDataset, prepare_dataset
from ..evaluate import predict_test_split
from ..launch import train
from ..lvlm import PHANTOM_WEIGHTS
from ..medklip import load_medklip
from ..profiles import Profile, load_profile
from ..show.comparison import compare_pair, score_table
from ..show.lesion_attention import lesion_attention_of_test_split
from ..show.medklip_scores import read_films, score_maps, score_medklip
from . import run_notebooks
from .export import add_scores

SEEDS = (0, 1, 2)
PAIRS = (
    ("mmedpo", "base"),
    ("mmedpo", "sft"),
    ("mmedpo", "dpo"),
    ("mmedpo", "stage1"),
    ("mmedpo", "stage2"),
    ("dpo", "base"),
    ("stage1", "dpo"),
    ("stage2", "base"),
    ("mmedpo_shuffled", "base_shuffled"),
)


def evaluate_seeds(
    profile: Profile, dataset: FilmDataset, seeds: Sequence[int], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Train and evaluate every variant with every seed; the scores go into the adapters' model
    cards too.

    Args:
        pairs: the models of each difference: variants, or "base". A name that ends in ``_shuffled``
            is that model, asked about another patient's film.

    Returns:
        ``models``: scores per model; ``differences``: paired differences, in percent, with 95%
        intervals over patients and seeds; ``training``: per variant the pairs and, per seed, the
        seconds of the steps.
    """
    runs: dict[str, list[Any]] = {}
    for name in profile.training.variants:
        runs[name] = [train(profile, name, seed, live=False) for seed in seeds]
    # Each model's runs with the label of their answers. The base model has no seed: asked once.
    asked: dict[str, list[tuple[str, Any]]] = {"base": [("base", None)]}
    for name, found in runs.items():
        labels = [_label(profile, name, seed) for seed in seeds]
        asked[name] = [(label, run.adapter) for label, run in zip(labels, found, strict=True)]
    compared = [name for pair in pairs for name in pair]
    predictions: dict[str, Any] = {}
    attention: dict[str, Any] = {}
    for name, models in asked.items():
        shuffled = f"{name}_shuffled"
        for label, adapter in models:
            predictions.setdefault(name, []).append(
                predict_test_split(profile, dataset, label, adapter)
            )
            attention.setdefault(name, []).append(
                lesion_attention_of_test_split(profile, dataset, adapter)
            )
            if shuffled in compared:
                rows = predict_test_split(
                    profile, dataset, f"{label}_shuffled", adapter, shuffle=True
                )
                predictions.setdefault(shuffled, []).append(rows)
    samples = profile.evaluation.bootstrap_samples
    table = score_table(predictions, attention, samples)
    differences = {}
    for one, other in pairs:
        difference = compare_pair(predictions[one], predictions[other], samples)
        differences[f"{one} - {other}"] = difference
    training = {}
    for name, found in runs.items():
        for run in found:
            add_scores(run.adapter, table[name])
        seconds = [run.result["seconds"]["steps"] for run in found]
        training[name] = {"pairs": found[0].result["pairs"], "seconds": seconds}
    return {"models": table, "differences": differences, "training": training}


def _label(profile: Profile, name: str, seed: int) -> str:
    """What the answers of one run are called: the profile's first seed bears the variant's name."""
    return name if seed == profile.evaluation.seeds[0] else f"{name}-seed{seed}"


def medklip_scores(profile: Profile, dataset: FilmDataset) -> dict[str, float]:
    """What the shipped MedKLIP finds, and what its maps are worth (`show.medklip_scores`), on the
    films of all splits. The pointing game, the area and what `score_maps` gives as shares are in
    percent.
    """
    names = [name for split in SPLITS for name in dataset.image_names(split)]
    images = [dataset.image(name) for name in names]
    masks = [dataset.masks(name) for name in names]
    model = load_medklip(profile.visual_tool.checkpoint)
    output = read_films(model, images)
    scores = score_medklip(output, masks)
    maps = score_maps(model, output, images, masks)
    shares = ("largest_part", "lesion_in_mask", "undecided")
    return {
        "pointing_game": round(100 * scores["pointing_game"], 1),
        "pointing_game_nodule": round(100 * scores["pointing_game_alone"]["nodule"], 1),
        "auc": round(100 * scores["auc"], 1),
        **{name: round(value * (100 if name in shares else 1), 3) for name, value in maps.items()},
        "films": len(names),
    }


def timed_tutorial(profile: Profile) -> dict[str, Any]:
    """Seconds and memory of the notebooks, from nothing and again on what they wrote, with the
    machine, the versions and the date.
    """
    shutil.rmtree(profile.output, ignore_errors=True)
    first = run_notebooks.run(profile, "phantom")
    again = run_notebooks.run(profile, "phantom")
    return {
        "seconds": first["total"],
        "cached_seconds": again["total"],
        "peak_gib": max(first["peak_gib"], again["peak_gib"]),
        "seconds_per_notebook": first,
        **provenance(),
    }


def scored_models(profile: Profile) -> dict[str, Any]:
    """Scores of every variant, of MedKLIP and of the ceiling, with the machine, the versions and
    the date.
    """
    dataset = prepare_dataset(profile)
    stored = PHANTOM_WEIGHTS / "scores.json"
    ceiling = json.loads(stored.read_text())["ceiling"]
    result = {
        **evaluate_seeds(profile, dataset, SEEDS, PAIRS),
        "medklip": medklip_scores(profile, dataset),
        "ceiling": {metric: ceiling[metric] for metric in ("closed_accuracy", "open_recall")},
        **provenance(),
    }
    print(run_notebooks.scores_as_text(result["models"]))
    return result


def main() -> int:
    """Measure what is asked for, and write it beside the rest of the file."""
    parser = argparse.ArgumentParser(description="Recompute the committed reference results.")
    parser.add_argument("--only", choices=("run", "scores"), help="this part alone")
    only = parser.parse_args().only
    profile = load_profile("phantom")
    target = repository_root() / "figures" / "reference" / "phantom_results.json"
    result = load_json(target, "the reference results") if target.is_file() else {}
    if only != "scores":
        result["run"] = timed_tutorial(profile)
    if only != "run":
        result |= scored_models(profile)
    write_json(target, result)
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
