"""Deletion and insertion curves against a model whose answer rests on a known place."""

from __future__ import annotations

import numpy as np
import pytest

from mmedpo_utils.show.faithful import (
    SHARES,
    WAYS,
    curve_films,
    faithfulness_table,
    mean_curves,
    measure_faithfulness,
    orders_of,
)
from mmedpo_utils.show.plots import faithfulness_curves

GRID = 5
SIZE = 40
RNG = np.random.default_rng(0)


def test_the_first_cells_of_the_order_are_hidden_or_alone_shown():
    film = np.full((SIZE, SIZE), 200)
    hidden = np.zeros((SIZE, SIZE), int)
    order = RNG.permutation(GRID * GRID)
    for way in WAYS:
        films = curve_films(film, hidden, order, way)
        assert len(films) == len(SHARES)
        for share, changed in zip(SHARES, films, strict=True):
            first = order[: round(share * len(order))]
            taken = np.zeros(GRID * GRID, bool)
            taken[first] = True
            cells = np.kron(taken.reshape(GRID, GRID), np.ones((8, 8), bool))
            expected = 0 if way == "deletion" else 200
            assert (changed[cells] == expected).all()
            assert (changed[~cells] == 200 - expected).all()


def test_the_lesions_order_begins_with_the_cells_that_it_covers_most():
    lesion = np.zeros((SIZE, SIZE), bool)
    lesion[8:16, 8:24] = True  # all of cells 6 and 7
    lesion[16:20, 8:16] = True  # half of cell 11
    heat = RNG.random((GRID, GRID))
    orders = orders_of(heat, lesion, RNG)
    assert set(orders["lesion"][:2]) == {6, 7} and orders["lesion"][2] == 11
    assert (np.diff(heat.ravel()[orders["map"]]) <= 0).all()
    for order in orders.values():
        assert sorted(order) == list(range(GRID * GRID))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """A model that is the surer, the more of one cell it sees; maps that peak there, or elsewhere.

    Its films are bright, so that hidden cells are those that differ from the film.
    """
    films, maps, lesions, keys = [], [], [], []
    for number in range(12):
        place = int(RNG.integers(GRID * GRID))
        heat = RNG.random((GRID, GRID))
        heat.flat[place] = 2.0 if number % 2 == 0 else -1.0
        lesion = np.zeros(GRID * GRID, bool)
        lesion[place] = True
        films.append(np.full((SIZE, SIZE), 100, np.uint8))
        maps.append(heat)
        lesions.append(np.kron(lesion.reshape(GRID, GRID), np.ones((8, 8), bool)))
        keys.append({"image": f"{number}.png", "patient_id": f"p{number}", "good": number % 2 == 0})

    def probability(changed, sources):
        return np.array(
            [
                (np.asarray(film)[lesions[source]] == 100).mean()
                for film, source in zip(changed, sources, strict=True)
            ]
        )

    return measure_faithfulness(films, np.stack(maps), lesions, keys, probability)


def test_areas_are_those_of_a_step_where_the_cell_is_taken(rows):
    """25 cells; the first falls at a share of 0.05 (one cell), so that the area is known."""
    step = (np.array(SHARES) >= 0.05).astype(float)
    for row in rows:
        if row["order"] == "lesion" or (row["order"] == "map" and row["good"]):
            curve = 1 - step if row["way"] == "deletion" else step
            assert row["area"] == pytest.approx(np.trapezoid(curve, SHARES), abs=0.02)
        if row["order"] == "map" and not row["good"]:
            last = [0] * (len(SHARES) - 1) + [1]
            curve = last if row["way"] == "insertion" else 1 - np.array(last)
            assert row["area"] == pytest.approx(np.trapezoid(curve, SHARES), abs=0.02)


def test_only_the_good_maps_are_better_than_a_random_order(rows):
    for good in (True, False):
        table = faithfulness_table([row for row in rows if row["good"] == good], 200)
        of_map = {line[""]: line["minus random"] for line in table if line["order"] == "map"}
        better = of_map["deletion"]["high"] < 0 and of_map["insertion"]["low"] > 0
        worse = of_map["deletion"]["low"] > 0 and of_map["insertion"]["high"] < 0
        assert (better, worse) == (good, not good)


def test_the_means_are_drawn_one_panel_a_way(rows):
    curves = mean_curves(rows)
    own = [row["curve"] for row in rows if (row["way"], row["order"]) == ("deletion", "map")]
    np.testing.assert_allclose(curves["deletion"]["map"], np.mean(own, axis=0))
    panels = faithfulness_curves(curves, SHARES).axes
    assert [axes.get_title() for axes in panels] == list(WAYS)
    assert all(len(axes.lines) == 3 for axes in panels)
