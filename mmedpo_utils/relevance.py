"""Clinical relevance (arXiv 2412.06141, the method's second step): the panel's debate, and raw scores to weights.

Pure functions: the panel's members come in as callables, with a language model behind them or rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError


class Opinion(NamedTuple):
    """One member's turn. ``agrees``: adopts the previous score, so that ``score`` is not used."""

    score: float
    agrees: bool
    reason: str


@dataclass(frozen=True)
class Turn:
    """One entry of the history S: who spoke in which round (from 1), and the score that holds after it."""

    round: int
    member: str
    score: float
    agrees: bool
    reason: str


@dataclass(frozen=True)
class Debate:
    """A finished debate: the relevance ``score`` in [0, 1], every turn, and whether the panel agreed."""

    score: float
    history: tuple[Turn, ...]
    consensus: bool
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        """The debate as plain values, for JSON."""
        return asdict(self)


Member = Callable[[str, str, str, float | None], tuple[float, bool, str]]


def debate(question: str, answer: str, rejected: str, members: Sequence[Member], rounds: int = 5) -> Debate:
    """Let a panel settle the clinical relevance of a rejected response, judged from its text.

    The first member gives a score. Each next one sees the previous score only, and adopts it or gives its own; every
    score goes into the history. The debate ends when as many turns in a row as there are members carry the same
    score, or after ``rounds`` rounds; without consensus the result is the mean of the history.

    Args:
        members: called as ``member(question, answer, rejected, previous)``, where ``previous`` is None at the first
            turn; each returns an ``Opinion``, or a tuple of its three values.
        rounds: rounds at most; a round is one turn of each member.

    Raises:
        InputError: no member, no round, a score outside [0, 1], or agreement where there is nothing to agree with.
    """
    if not members or rounds < 1:
        raise InputError("debate: expected one member or more and one round or more")
    history: list[Turn] = []
    for turn in range(rounds * len(members)):
        member = members[turn % len(members)]
        name = getattr(member, "name", None) or getattr(member, "__name__", type(member).__name__)
        previous = history[-1].score if history else None
        opinion = Opinion(*member(question, answer, rejected, previous))
        if opinion.agrees and previous is None:
            raise InputError(f"debate: {name} speaks first and has nothing to agree with")
        score = previous if opinion.agrees else float(opinion.score)
        if not 0 <= score <= 1:
            raise InputError(f"debate: {name} gave {score!r}; expected a score from 0 to 1")
        history.append(Turn(turn // len(members) + 1, name, score, opinion.agrees, opinion.reason))
        last = history[-len(members):]
        if len(last) == len(members) and all(entry.score == score for entry in last):
            return Debate(score, tuple(history), True, history[-1].round)
    return Debate(float(np.mean([entry.score for entry in history])), tuple(history), False, rounds)


def normalise(
    scores: Sequence[float] | np.ndarray, method: str = "rescaled", mean: float = 1.0, variance: float = 0.1,
    low: float = 0.75, high: float = 1.25,
) -> np.ndarray:
    """Turn raw relevance scores into the weights of the loss. Call it once per source, over the training manifest.

    Args:
        scores: raw scores. Shape: [N].
        method: ``rescaled`` standardises with the scores' own mean and standard deviation, rescales to ``mean`` and
            ``variance``, and clips to [``low``, ``high``]; ``literal`` is appendix B as printed,
            (s - ``mean``) / sqrt(``variance``), clipped; ``none`` keeps the raw scores, as the released code does;
            ``uniform`` gives ones.

    Returns:
        weights, float64. Shape: [N]. Ones, with a warning, where ``rescaled`` meets scores without spread.

    Raises:
        InputError: no scores, a score that is not finite, or an unknown method.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise InputError(f"scores: expected one finite number or more, found {scores!r:.80}")
    if method == "none":
        return scores.copy()
    if method == "uniform":
        return np.ones_like(scores)
    if method == "literal":
        return np.clip((scores - mean) / np.sqrt(variance), low, high)
    if method != "rescaled":
        raise InputError(f"normalisation {method!r}: expected rescaled, literal, none or uniform")
    if np.ptp(scores) < 1e-12:
        warnings.warn(f"all {scores.size} relevance scores are {scores[0]:g}: every weight is 1", stacklevel=2)
        return np.ones_like(scores)
    return np.clip(mean + np.sqrt(variance) * (scores - scores.mean()) / scores.std(), low, high)
