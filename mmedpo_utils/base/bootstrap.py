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
    if seeds is None:
        seeds = [0] * len(patients)
    # Patients, not rows: answers about one patient are not independent.
    patient_numbers, patient_draws = _resamplings(patients, samples, rng)  # [N], [1 + S, P]
    seed_numbers, seed_draws = _resamplings(seeds, samples, rng)  # [N], [1 + S, T]
    scores = []
    for table in tables:
        rows = np.asarray(table, float)
        if rows.ndim == 1:  # a score counts once
            rows = np.stack([rows, np.ones(len(rows))], axis=1)
        # Sums of each patient's rows under each seed: a draw only weighs these.
        cells = np.zeros((patient_draws.shape[1], seed_draws.shape[1], rows.shape[1]))
        np.add.at(cells, (patient_numbers, seed_numbers), rows)  # [P, T, K]
        of_patients = np.tensordot(patient_draws, cells, axes=1)  # [1 + S, T, K]
        sums = np.einsum("dt,dtk->dk", seed_draws, of_patients)
        scores.append(statistic(sums))
    return scores


def _resamplings(
    names: Sequence, samples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Each row's number among the different ``names``, and how often each name is drawn.

    Shape: [N]; and [1 + samples, different names], of which row 0 is ones: nothing drawn, the score
    itself.
    """
    _, numbers = np.unique([str(name) for name in names], return_inverse=True)
    size = int(numbers.max()) + 1
    draws = rng.multinomial(size, np.full(size, 1 / size), samples)
    return numbers, np.vstack([np.ones((1, size)), draws])


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
