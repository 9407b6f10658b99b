"""Bootstrap intervals over patients and training seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]


def mean_percent(sums: np.ndarray) -> np.ndarray:
    """Mean in percent from summed (score, one) pairs. Shape: [..., 2] to [...]; NaN where nothing
    was drawn.
    """
    return 100 * sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], np.nan)


def _draws(
    tables: Sequence[np.ndarray],
    patients: Sequence,
    seeds: Sequence | None,
    samples: int,
    rng: np.random.Generator | None,
    statistic: Statistic,
) -> list[np.ndarray]:
    """Scores of each table under the same draws; the first is the undrawn table's. Shape of each:
    [1 + samples].
    """
    rng = rng or np.random.default_rng(0)
    labels, weights = [], []
    for names in (patients, np.zeros(len(patients)) if seeds is None else seeds):
        _, label = np.unique([str(name) for name in names], return_inverse=True)
        size = label.max() + 1
        labels.append(label)
        weights.append(
            np.vstack([np.ones((1, size)), rng.multinomial(size, np.full(size, 1 / size), samples)])
        )
    scores = []
    for table in tables:
        rows = np.asarray(table, float)
        rows = np.stack([rows, np.ones(len(rows))], axis=1) if rows.ndim == 1 else rows
        cells = np.zeros((weights[0].shape[1], weights[1].shape[1], rows.shape[1]))
        np.add.at(cells, tuple(labels), rows)
        scores.append(
            statistic(np.einsum("bsk,bs->bk", np.tensordot(weights[0], cells, axes=1), weights[1]))
        )
    return scores


def _interval(scores: np.ndarray) -> tuple[float, float, float]:
    low, high = np.nanpercentile(scores[1:], [2.5, 97.5])
    return float(scores[0]), float(low), float(high)


def bootstrap_interval(
    scores: np.ndarray,
    patients: Sequence,
    seeds: Sequence | None = None,
    samples: int = 1000,
    rng: np.random.Generator | None = None,
    statistic: Statistic = mean_percent,
) -> tuple[float, float, float]:
    """Score with its 95% percentile interval, by a bootstrap over patients and over training seeds.

    A draw picks whole patients with replacement and, independently, whole seeds with replacement:
    answers about one patient are not independent, and neither are the answers of one trained model.
    With one seed the interval says nothing of training luck.

    Args:
        scores: Per-row scores in [0, 1]. Shape: [N]. Or per-row statistics, shape [N, K] (see
            `row_statistics`).
        patients: The patient of each row. Shape: [N].
        seeds: The training seed of each row. Shape: [N]; None for one seed.
        samples: Number of draws.
        rng: Source of the draws; a fixed one by default, so that a number can be had again.
        statistic: From the summed statistics, shape [B, K], to scores, shape [B].

    Returns:
        (score of the rows themselves, 2.5th percentile, 97.5th percentile).
    """
    return _interval(_draws([scores], patients, seeds, samples, rng, statistic)[0])


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    patients: Sequence,
    seeds: Sequence | None = None,
    samples: int = 1000,
    rng: np.random.Generator | None = None,
    statistic: Statistic = mean_percent,
) -> tuple[float, float, float]:
    """Score of ``first`` minus score of ``second`` with its 95% interval: each draw serves both
    models.

    Arguments are those of `bootstrap_interval`; row i of both tables answers the same question
    under the same seed.
    """
    one, other = _draws([first, second], patients, seeds, samples, rng, statistic)
    return _interval(one - other)
