"""Is a map faithful? Deletion and insertion curves (Petsiuk et al., arXiv 1806.07421): hide the
cells of a film in the order of the map, and watch the probability of what the model said.

A map that shows what the answer rests on makes the probability fall early when its cells are
deleted, and rise early when they alone are shown. The same in a random order is the measure, since
any film with holes is stranger than one without. Attention is not explanation: here it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..base.bootstrap import bootstrap_interval, mean_percent, paired_difference
from ..base.rows import Row
from ..noise import global_noise
from ..pairs import generator

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # of the cells that are hidden, or shown
WAYS = ("deletion", "insertion")

# From films to the probability of what was said of each clean film. Shape: [N] to [N].
Probability = Callable[[Sequence[Image.Image], Sequence[int]], np.ndarray]


def orders_of(
    heat: np.ndarray, lesion: np.ndarray | None, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The orders in which cells are taken: the map's, a random one, and the true lesion's where it
    is known (by the share of each cell that it covers; the rest at random).

    Args:
        heat: the map. Shape: [g, g].
        lesion: bool. Shape: [H, W].

    Returns:
        permutations of the cells, by name. Shape of each: [g * g].
    """
    cells = heat.size
    orders = {
        "map": np.argsort(-heat.ravel(), kind="stable"),
        "random": rng.permutation(cells),
    }
    if lesion is not None:
        covered = np.asarray(_covered(lesion, len(heat))).ravel()
        shuffled = rng.permutation(cells)
        orders["lesion"] = shuffled[np.argsort(-covered[shuffled], kind="stable")]
    return orders


def _covered(lesion: np.ndarray, grid: int) -> np.ndarray:
    """Share of each cell that the lesion covers. Shape: [g, g]."""
    small = Image.fromarray(np.uint8(lesion) * 255)
    return np.asarray(small.resize((grid, grid), Image.Resampling.BOX), float) / 255


def curve_films(
    film: np.ndarray, hidden: np.ndarray, order: np.ndarray, way: str
) -> list[np.ndarray]:
    """The films of one curve, one for each of `SHARES`.

    Args:
        film: as it is. Shape: [H, W].
        hidden: the film as it is where it is hidden. Shape: [H, W].
        order: a permutation of the cells.
        way: ``deletion``: the first cells are hidden; ``insertion``: they alone are shown.
    """
    grid = int(len(order) ** 0.5)
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    height, width = film.shape
    down = np.arange(height) * grid // height
    across = np.arange(width) * grid // width
    ranks = rank.reshape(grid, grid)[down[:, None], across]
    taken = [ranks < round(share * len(order)) for share in SHARES]
    if way == "deletion":
        return [np.where(cells, hidden, film) for cells in taken]
    return [np.where(cells, film, hidden) for cells in taken]


def measure_faithfulness(
    films: Sequence[np.ndarray],
    maps: np.ndarray,
    lesions: Sequence[np.ndarray | None],
    keys: Sequence[Row],
    probability: Probability,
    seed: int = 0,
) -> list[Row]:
    """Deletion and insertion curves of every film, in every order.

    What is hidden is noise without any signal, the same for every order of one film.

    Args:
        films: uint8. Shape of each: [H, W].
        maps: one map a film. Shape: [N, g, g].
        lesions: of each film the true lesion, bool [H, W], or None.
        keys: what names each film, ``patient_id`` or ``image`` among it.
        probability: from films, and the number of the clean film that each of them comes from, to
            the probability of what was said about the clean one.
        seed: of the noise and of the random order.

    Returns:
        per film, order and way its keys, ``order``, ``way``, ``curve`` (a probability for each of
        `SHARES`) and ``area`` (under it, 0 to 1).
    """
    rows: list[Row] = []
    changed: list[Image.Image] = []
    sources: list[int] = []
    for number, film in enumerate(films):
        rng = generator(seed, str(keys[number]))
        hidden = np.rint(255 * global_noise(film / np.float32(255), 0.0, rng)).astype(np.uint8)
        for order, cells in orders_of(maps[number], lesions[number], rng).items():
            for way in WAYS:
                rows.append({**keys[number], "order": order, "way": way})
                changed += map(Image.fromarray, curve_films(film, hidden, cells, way))
                sources += [number] * len(SHARES)
    values = np.asarray(probability(changed, sources), float).reshape(len(rows), len(SHARES))
    for row, curve in zip(rows, values, strict=True):
        row["curve"] = curve.tolist()
        row["area"] = float(np.trapezoid(curve, SHARES))
    return rows


def faithfulness_table(rows: Sequence[Row], samples: int) -> list[dict[str, Any]]:
    """Mean areas under the curves of each order's films, and how far each lies from the same films'
    random order, with 95% intervals over patients.

    An order that some films lack (``lesion``) has fewer films than the others: compare areas where
    all have it. For a faithful map ``minus random`` is below zero under deletion and above it under
    insertion.

    Returns:
        one line for each way and order; areas as a percentage of the largest possible.
    """
    table = []
    for way in WAYS:
        of_way = {
            order: [row for row in rows if row["way"] == way and row["order"] == order]
            for order in ("map", "lesion", "random")
        }
        by_film = {_film(row): row for row in of_way["random"]}
        for order, own in of_way.items():
            if not own:
                continue
            patients = [row.get("patient_id") or row["image"] for row in own]
            areas = np.array([row["area"] for row in own])
            line: dict[str, Any] = {"": way, "order": order}
            interval = bootstrap_interval(areas, patients, samples=samples)
            line["area"] = dict(zip(("mean", "low", "high"), interval, strict=True))
            if order != "random":
                random = np.array([by_film[_film(row)]["area"] for row in own])
                apart = paired_difference(
                    areas, random, patients, samples=samples, statistic=mean_percent
                )
                line["minus random"] = dict(zip(("mean", "low", "high"), apart, strict=True))
            table.append(line)
    return table


def _film(row: Mapping[str, Any]) -> tuple:
    return row["image"], row.get("question_id")


def mean_curves(rows: Sequence[Row]) -> dict[str, dict[str, np.ndarray]]:
    """The mean curve of every way and order, as `plots.faithfulness_curves` draws them."""
    curves: dict[str, dict[str, np.ndarray]] = {}
    for way in WAYS:
        curves[way] = {}
        for order in ("map", "lesion", "random"):
            own = [row["curve"] for row in rows if row["way"] == way and row["order"] == order]
            if own:
                curves[way][order] = np.mean(own, axis=0)
    return curves
