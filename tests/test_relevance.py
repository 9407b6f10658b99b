"""Relevance: debates worked out by hand, and the properties of each normalisation."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.relevance import Opinion, debate, normalise


def says(*scores: float | None):
    """A member that gives these scores turn by turn (the last one for ever), None meaning that it
    agrees.
    """
    left = list(scores)

    def member(question: str, answer: str, response: str, previous: float | None) -> Opinion:
        score = left.pop(0) if len(left) > 1 else left[0]
        return Opinion(0.0 if score is None else score, score is None, "as told")

    return member


def scores(result) -> list[float]:
    return [turn.score for turn in result.history]


def test_all_agree_in_the_first_round() -> None:
    result = debate("q", "a", "r", [says(0.8), says(None), says(None)])
    assert (result.score, result.consensus, result.rounds, scores(result)) == (
        0.8,
        True,
        1,
        [0.8, 0.8, 0.8],
    )
    assert [turn.agrees for turn in result.history] == [False, True, True]


def test_agreement_may_span_two_rounds() -> None:
    result = debate("q", "a", "r", [says(0.2, None), says(0.6), says(None)])
    assert (result.score, result.consensus, result.rounds) == (0.6, True, 2)
    assert scores(result) == [0.2, 0.6, 0.6, 0.6], "three turns in a row, the adopted ones counted"


def test_own_score_equal_to_the_previous_counts_as_the_same() -> None:
    result = debate("q", "a", "r", [says(0.6), says(0.6)])
    assert result.consensus and scores(result) == [0.6, 0.6]


def test_without_consensus_the_mean_of_the_history() -> None:
    result = debate("q", "a", "r", [says(0.2), says(0.8), says(None)], rounds=5)
    assert (len(result.history), result.consensus, result.rounds) == (15, False, 5)
    assert result.score == pytest.approx((0.2 + 0.8 + 0.8) / 3)


def test_one_member_decides_alone() -> None:
    assert debate("q", "a", "r", [says(0.3)]).score == 0.3


def test_members_see_the_texts_and_the_previous_score_only() -> None:
    seen = []

    def member(*arguments):
        seen.append(arguments)
        return Opinion(len(seen) / 10, False, "")

    result = debate("q", "a", "r", [member, member], rounds=2)
    assert seen == [
        ("q", "a", "r", None),
        ("q", "a", "r", 0.1),
        ("q", "a", "r", 0.2),
        ("q", "a", "r", 0.3),
    ]
    record = json.loads(json.dumps(result.as_dict()))
    assert [turn["round"] for turn in record["history"]] == [1, 1, 2, 2] and record["history"][0][
        "member"
    ] == "member"


@pytest.mark.parametrize(
    ("members", "rounds", "word"),
    [
        ([], 5, "one member"),
        ([says(0.5)], 0, "one round"),
        ([says(1.2)], 5, "from 0 to 1"),
        ([says(float("nan"))], 5, "from 0 to 1"),
        ([says(None)], 5, "nothing to agree"),
    ],
)
def test_bad_debates(members: list, rounds: int, word: str) -> None:
    with pytest.raises(InputError, match=word):
        debate("q", "a", "r", members, rounds)


def test_rescaled_has_mean_one_and_variance_a_tenth_before_the_clip() -> None:
    raw = np.random.default_rng(0).beta(5, 2, 1000)
    free = normalise(raw, "rescaled", low=-np.inf, high=np.inf)
    assert free.mean() == pytest.approx(1) and free.var() == pytest.approx(0.1)
    weights = normalise(raw, "rescaled")
    np.testing.assert_allclose(weights, np.clip(free, 0.75, 1.25))
    assert (np.diff(weights[np.argsort(raw)]) >= 0).all(), "order is kept"


def test_rescaled_of_a_bell_meets_a_bound_in_four_of_ten() -> None:
    weights = normalise(np.random.default_rng(0).normal(size=100_000))
    assert np.mean((weights == 0.75) | (weights == 1.25)) == pytest.approx(0.43, abs=0.01)


def test_rescaled_ignores_scale_and_shift() -> None:
    raw = np.random.default_rng(1).random(50)
    np.testing.assert_allclose(normalise(raw), normalise(raw * 0.1 + 0.4))


def test_literal_puts_every_score_on_the_lower_bound() -> None:
    assert (normalise(np.linspace(0, 1, 11), "literal") == 0.75).all()


def test_none_and_uniform() -> None:
    raw = np.array([0.0, 0.4, 1.0])
    assert (normalise(raw, "none") == raw).all() and (normalise(raw, "uniform") == 1).all()


@pytest.mark.parametrize("raw", [[0.8], [0.8] * 5, [0.1 + 0.2, 0.3]])
def test_zero_spread_gives_ones_and_a_warning(raw: list[float]) -> None:
    with pytest.warns(UserWarning, match="every weight is 1"):
        assert (normalise(raw) == 1).all()


@pytest.mark.parametrize("raw", [[], [0.5, float("nan")], [[0.5]]])
def test_bad_scores(raw: list) -> None:
    with pytest.raises(InputError, match="scores"):
        normalise(raw)
    with pytest.raises(InputError, match="rescaled, literal, none or uniform"):
        normalise([0.5], "zscore")


def test_released_scores_spread_over_the_bounds(shared: Path) -> None:
    rows = json.loads(
        (shared / "data/released/vqa-rad_dpo_weighted.json").read_text(encoding="utf-8")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = normalise([row["weighted_score"] for row in rows])
    assert weights.min() == 0.75 and weights.max() > 1.2
