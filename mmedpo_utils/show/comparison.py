"""Models side by side: scores with intervals over patients and seeds, differences, and the two sets
of rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base.bootstrap import bootstrap_interval, paired_difference
from ..base.errors import InputError
from ..base.files import write_json
from ..base.rows import patient_of, question_text
from ..dataset import FilmDataset
from ..evaluate import asked_questions, predict_test_split, profile_decoding
from ..lvlm import image_attention, load_profile_lvlm
from ..metrics import RELEASED_SCORES, Row, row_statistics, score_predictions
from ..profiles import Profile

Scores = dict[str, dict[str, float]]  # by metric: mean, low, high, seeds
Models = Mapping[str, Sequence[Sequence[Row]]]  # by name, one table of rows per training seed
COMPARED = ("closed_accuracy", "open_recall", "bleu", "rouge_l")


def predict_models(
    profile: Profile,
    dataset: FilmDataset,
    adapters: Mapping[str, str | Path | None],
    shuffle: bool = False,
) -> dict[str, list[Row]]:
    """Every model's predictions on the test split (`evaluate.predict_test_split`), by name.

    Args:
        adapters: each model's adapter by name; None is the base model.
        shuffle: ask each question about another patient's film, under the name ``NAME_shuffled``.
    """
    found = {}
    for name, adapter in adapters.items():
        label = f"{name}_shuffled" if shuffle else name
        found[label] = predict_test_split(profile, dataset, label, adapter, shuffle)
    return found


def _joined(
    files: Sequence[Sequence[Row]], metric: str
) -> tuple[np.ndarray, Any, list[dict], list[int]]:
    """Statistics of all seeds' rows, the function from sums to score, the rows, and each row's
    seed.
    """
    statistics = []
    used: list[Row] = []
    seeds: list[int] = []
    for seed, rows in enumerate(files):
        of_seed, statistic, scored = row_statistics(rows, metric)
        statistics.append(of_seed)
        used += scored
        seeds += [seed] * len(scored)
    return np.concatenate(statistics), statistic, used, seeds


def compare(
    models: Models,
    samples: int,
    metrics: Sequence[str] = COMPARED,
) -> dict[str, Scores]:
    """Scores of several models with 95% intervals over patients and seeds.

    Args:
        models: For each name, one table of rows per training seed (`predict`'s, or
            `lesion_attention`'s with ``metrics=["attention_in_lesion"]``).
        samples: Bootstrap draws.

    Returns:
        ``{name: {metric: {"mean", "low", "high", "seeds"}}}`` in percent; a metric without rows is
        left out.
    """
    table: dict[str, Scores] = {}
    for name, files in models.items():
        table[name] = {}
        for metric in metrics:
            statistics, statistic, used, seeds = _joined(files, metric)
            if used:
                mean, low, high = bootstrap_interval(
                    statistics,
                    [patient_of(row) for row in used],
                    seeds,
                    samples,
                    statistic=statistic,
                )
                table[name][metric] = {"mean": mean, "low": low, "high": high, "seeds": len(files)}
    return table


def compare_pair(
    first: Sequence[Sequence[Row]],
    second: Sequence[Sequence[Row]],
    samples: int,
    metrics: Sequence[str] = COMPARED,
) -> dict[str, dict[str, float]]:
    """Score of ``first`` minus score of ``second``, question by question, with 95% intervals (see
    `compare`).

    A model with one table (one that is not trained) meets every seed of the other.

    Raises:
        InputError: the two do not answer the same questions, or their numbers of seeds differ.
    """
    seeds = max(len(first), len(second))
    sides = [list(side) * seeds if len(side) == 1 else list(side) for side in (first, second)]
    ids = [[[str(row["question_id"]) for row in rows] for rows in side] for side in sides]
    if ids[0] != ids[1]:
        raise InputError(
            "compare_pair: the two models need the same questions in the same order, and as many "
            "seeds; predict both on one split"
        )
    table = {}
    for metric in metrics:
        one, statistic, used, seed = _joined(sides[0], metric)
        if used:
            mean, low, high = paired_difference(
                one,
                _joined(sides[1], metric)[0],
                [patient_of(row) for row in used],
                seed,
                samples,
                statistic=statistic,
            )
            table[metric] = {"mean": mean, "low": low, "high": high, "seeds": seeds}
    return table


def score_table(
    predictions: Models,
    attention: Models,
    samples: int,
) -> dict[str, Scores]:
    """`compare` over predictions and over attention to the lesion, one row a model, in percent."""
    table = compare(predictions, samples)
    for name, scores in compare(attention, samples, ["attention_in_lesion"]).items():
        table[name] |= scores
    return table


def write_scores(
    profile: Profile,
    predictions: Models,
    attention: Models,
) -> dict[str, Scores]:
    """Score every model (see `score_table`), write ``evaluation/scores.json``, return the table."""
    table = score_table(predictions, attention, profile.evaluation.bootstrap_samples)
    write_json(
        profile.output / "evaluation" / "scores.json", {"profile": profile.name, "models": table}
    )
    return table


def both_rules(predictions: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The same predictions by our rules and by the authors' released ones, in percent: a row per
    model and score.
    """
    table = []
    for model, rows in predictions.items():
        ours = score_predictions(rows)
        released = score_predictions(rows, RELEASED_SCORES)
        for name in ("closed_accuracy", "open_recall", "bleu", "rouge_l", "meteor"):
            if ours[name]["score"] is None:
                continue
            line = {
                "model": model,
                "score": name.replace("_", " "),
                "n": ours[name]["n"],
                "our rule": ours[name]["score"],
                "released rule": released[f"released_{name}"]["score"],
            }
            table.append(line)
    return table


def attention_example(
    profile: Profile, dataset: FilmDataset, adapter: str | Path
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The first open test question, and the attention to its image without and with the adapter.

    Shape of each: [grid, grid].
    """
    rows = asked_questions(profile, dataset)
    row = next((row for row in rows if row["answer_type"] == "OPEN"), rows[0])
    template = profile_decoding(profile).template
    film = dataset.image(row["image"])

    def attention(place: str | Path | None) -> np.ndarray:
        lvlm = load_profile_lvlm(profile, place, template=template)
        return image_attention(lvlm, [film], [question_text(row)], 1)[0].numpy()

    return row, attention(None), attention(adapter)


def scores_by(rows: Sequence[Row], key: str) -> dict[str, dict[str, Row]]:
    """`score_predictions` for each value of ``key`` ("finding" or "question_type"); rows without it
    go to "(none)".
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get(key) or "(none)"), []).append(row)
    return {value: score_predictions(groups[value]) for value in sorted(groups)}
