"""Recompute the reference results that the README and the model cards quote: ``mmedpo results``.

The whole tutorial runs twice, from nothing and again on its own artefacts, and is timed. Then every
variant is trained with three seeds on the same pairs, evaluated, and written to
``figures/reference/phantom_results.json``.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from ..base.environment import provenance
from ..base.files import write_json
from ..base.settings import SPLITS, repository_root
from ..dataset import FilmDataset, prepare_dataset
from ..evaluate import lesion_attention_of_test_split, predict_test_split
from ..launch import train
from ..medklip import load_medklip, score_medklip
from ..profiles import Profile, load_profile
from ..show.comparison import compare_pair, score_table
from . import run_notebooks
from .export import add_scores

SEEDS = (0, 1, 2)
PAIRS = (
    ("mmedpo", "base"),
    ("mmedpo", "sft"),
    ("mmedpo", "dpo"),
    ("mmedpo", "stage1"),
    ("mmedpo", "stage2"),
    ("stage1", "dpo"),
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
            intervals over patients and
        seeds; ``training``: per variant the pairs and, per seed, the seconds of the steps.
    """
    shuffled = {
        name.removesuffix("_shuffled")
        for pair in pairs
        for name in pair
        if name.endswith("_shuffled")
    }
    runs = {
        name: [train(profile, name, seed, live=False) for seed in seeds]
        for name in profile.training.variants
    }
    predictions: dict[str, Any] = {}
    attention: dict[str, Any] = {}
    for name, adapters in {
        "base": [None],
        **{name: [run.adapter for run in found] for name, found in runs.items()},
    }.items():
        for seed, adapter in zip(seeds, adapters):
            label = (
                name
                if adapter is None or seed == profile.evaluation.seeds[0]
                else f"{name}-seed{seed}"
            )
            predictions.setdefault(name, []).append(
                predict_test_split(profile, dataset, label, adapter)
            )
            attention.setdefault(name, []).append(
                lesion_attention_of_test_split(profile, dataset, adapter)
            )
            if name in shuffled:
                rows = predict_test_split(
                    profile, dataset, f"{label}_shuffled", adapter, shuffle=True
                )
                predictions.setdefault(f"{name}_shuffled", []).append(rows)
    samples = profile.evaluation.bootstrap_samples
    table = score_table(predictions, attention, samples)
    for name, found in runs.items():
        for run in found:
            add_scores(run.adapter, table[name])
    return {
        "models": table,
        "differences": {
            f"{a} - {b}": compare_pair(predictions[a], predictions[b], samples) for a, b in pairs
        },
        "training": {
            name: {
                "pairs": found[0].result["pairs"],
                "seconds": [run.result["seconds"]["steps"] for run in found],
            }
            for name, found in runs.items()
        },
    }


def medklip_scores(profile: Profile, dataset: FilmDataset) -> dict[str, float]:
    """Pointing game and presence of the shipped MedKLIP on the films of all splits, in percent."""
    names = [name for split in SPLITS for name in dataset.image_names(split)]
    scores = score_medklip(
        load_medklip(profile.visual_tool.checkpoint),
        [dataset.image(name) for name in names],
        [dataset.masks(name) for name in names],
    )
    return {
        "pointing_game": round(100 * scores["pointing_game"], 1),
        "pointing_game_nodule": round(100 * scores["pointing_game_alone"]["nodule"], 1),
        "auc": round(100 * scores["auc"], 1),
        "films": len(names),
    }


def main() -> int:
    """Run the tutorial twice, evaluate three seeds, write the file."""
    root, profile = repository_root(), load_profile("phantom")
    shutil.rmtree(profile.output, ignore_errors=True)
    first = run_notebooks.run(profile, "phantom")
    again = run_notebooks.run(profile, "phantom")
    dataset = prepare_dataset(profile)
    card = json.loads(
        (root / "mmedpo_utils" / "phantom" / "weights" / "lvlm" / "scores.json").read_text()
    )
    result = {
        **evaluate_seeds(profile, dataset, SEEDS, PAIRS),
        "medklip": medklip_scores(profile, dataset),
        "ceiling": {
            metric: card["ceiling"][metric] for metric in ("closed_accuracy", "open_recall")
        },
        "run": {
            "seconds": first["total"],
            "cached_seconds": again["total"],
            "peak_gib": max(first["peak_gib"], again["peak_gib"]),
            "seconds_per_notebook": first,
        },
        **provenance(),
    }
    target = root / "figures" / "reference" / "phantom_results.json"
    write_json(target, result)
    print(run_notebooks.results_table(result["models"]))
    print(f"written: {target.relative_to(root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
