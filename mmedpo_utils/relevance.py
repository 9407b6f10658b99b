"""Clinical relevance (arXiv 2412.06141, the method's second step): the panel's debate, and raw
scores to weights.

Pure functions: the panel's members come in as callables, with a language model behind them or
    rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .base.errors import InputError
from .base.images import open_image, resolve_image
from .base.rows import IMAGE_MARK, has_weight, question_text
from .base.sections import Variant
from .base.words import words
from .preference_rows import row_source
from .profiles import Profile


class Opinion(NamedTuple):
    """One member's turn. ``agrees``: adopts the previous score, so that ``score`` is not used."""

    score: float
    agrees: bool
    reason: str


@dataclass(frozen=True)
class Turn:
    """One entry of the history S: who spoke in which round (from 1), and the score that holds after
    it.
    """

    round: int
    member: str
    score: float
    agrees: bool
    reason: str


@dataclass(frozen=True)
class Debate:
    """A finished debate: the relevance ``score`` in [0, 1], every turn, and whether the panel
    agreed.
    """

    score: float
    history: tuple[Turn, ...]
    consensus: bool
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        """The debate as plain values, for JSON."""
        return asdict(self)


Member = Callable[[str, str, str, float | None], tuple[float, bool, str]]


def debate(
    question: str, answer: str, rejected: str, members: Sequence[Member], rounds: int = 5
) -> Debate:
    """Let a panel settle the clinical relevance of a rejected response, judged from its text.

    The first member gives a score. Each next one sees the previous score only, and adopts it or
    gives its own; every score goes into the history. The debate ends when as many turns in a row as
    there are members carry the same score, or after ``rounds`` rounds; without consensus the result
    is the mean of the history.

    Args:
        members: called as ``member(question, answer, rejected, previous)``, where ``previous`` is
            None at the first turn; each returns an ``Opinion``, or a tuple of its three values.
        rounds: rounds at most; a round is one turn of each member.

    Raises:
        InputError: no member, no round, a score outside [0, 1], or agreement where there is nothing
            to agree with.
    """
    if not members or rounds < 1:
        raise InputError("debate: expected one member or more and one round or more")
    history: list[Turn] = []
    for turn in range(rounds * len(members)):
        member = members[turn % len(members)]
        name = str(getattr(member, "name", getattr(member, "__name__", type(member).__name__)))
        previous = history[-1].score if history else None
        opinion = Opinion(*member(question, answer, rejected, previous))
        score = float(opinion.score)
        if opinion.agrees:
            if previous is None:
                raise InputError(f"debate: {name} speaks first and has nothing to agree with")
            score = previous
        if not 0 <= score <= 1:
            raise InputError(f"debate: {name} gave {score!r}; expected a score from 0 to 1")
        history.append(Turn(turn // len(members) + 1, name, score, opinion.agrees, opinion.reason))
        last = history[-len(members) :]
        if len(last) == len(members) and all(entry.score == score for entry in last):
            return Debate(score, tuple(history), True, history[-1].round)
    return Debate(float(np.mean([entry.score for entry in history])), tuple(history), False, rounds)


def normalise(
    scores: Sequence[float] | np.ndarray,
    method: str = "rescaled",
    mean: float = 1.0,
    variance: float = 0.1,
    low: float = 0.75,
    high: float = 1.25,
) -> np.ndarray:
    """Turn raw relevance scores into the weights of the loss. Call it once per source, over the
    training manifest.

    Args:
        scores: raw scores. Shape: [N].
        method: ``rescaled`` standardises with the scores' own mean and standard deviation, rescales
            to ``mean`` and ``variance``, and clips to [``low``, ``high``]; ``literal`` is appendix
            B as printed, (s - ``mean``) / sqrt(``variance``), clipped; ``none`` keeps the raw
            scores, as the released code does; ``uniform`` gives ones.

    Returns:
        weights, float64. Shape: [N]. Ones, with a warning, where ``rescaled`` meets scores without
            spread.

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
        warnings.warn(
            f"all {scores.size} relevance scores are {scores[0]:g}: every weight is 1", stacklevel=2
        )
        return np.ones_like(scores)
    return np.clip(mean + np.sqrt(variance) * (scores - scores.mean()) / scores.std(), low, high)


def training_weights(
    rows: Sequence[dict[str, Any]], variant: Variant, profile: Profile
) -> np.ndarray:
    """Normalised relevance s' of every row; each source (text, visual) is normalised over its own
    scores. Shape: [N].
    """
    sources = np.array([row_source(row) for row in rows])
    weights = np.ones(len(rows))
    bounds = {key: getattr(profile.relevance, key) for key in ("mean", "variance", "low", "high")}
    if variant.weights == "uniform" or variant.objective == "sft":
        return weights  # no score is read, so that pairs without one can be trained on
    absent = [row["id"] for row in rows if not has_weight(row)]
    if absent:
        raise InputError(
            f"`weighted_score` is missing in {len(absent)} of {len(rows)} preference rows (id "
            f"{absent[0]!r} first), and the variant's `weights` are {variant.weights}; write "
            "`weights: uniform` into the profile's variant, which uses no score, or give each row "
            "a score from 0 to 1"
        )
    for source in np.unique(sources):
        scores = [float(row["weighted_score"]) for row in rows if row_source(row) == source]
        weights[sources == source] = normalise(scores, variant.weights, **bounds)
    return weights


CHUNK = 64


class Judge(Protocol):
    """What compares a response with the reference answer: a language model, or rules that know the
    facts.
    """

    def conflict(self, question: str, answer: str, response: str) -> float:
        """How strongly ``response`` contradicts ``answer``, from 0 (agrees) to 1."""

    def write(self, question: str, answer: str, rng: np.random.Generator) -> str:
        """A hallucinated response: a wrong finding, place or diagnosis, made from ``answer``."""


@dataclass(frozen=True)
class Rejected:
    """A rejected response, where it comes from (``sampled`` or ``written``), and its conflict in
    [0, 1].
    """

    text: str
    origin: str
    conflict: float


def sample_candidates(
    generate: Callable[..., list[list[str]]],
    questions: Sequence[dict[str, Any]],
    image_root: str | Path,
    candidates: int,
    temperature: float,
    seed: int = 0,
) -> list[list[str]]:
    """Sample several responses per question from the target model.

    Args:
        generate: called as ``generate(images, texts, samples=, temperature=, seed=)`` for up to 64
            questions at a time; returns one list of responses per question (``lvlm.generate`` with
            the model bound).
        questions: rows of ``read_questions``.

    Returns:
        ``candidates`` responses per question, in order.
    """
    responses: list[list[str]] = []
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        images = [open_image(resolve_image(image_root, question["image"])) for question in chunk]
        texts = [question_text(question) for question in chunk]
        responses += generate(
            images, texts, samples=candidates, temperature=temperature, seed=seed + start
        )
    return responses


def choose_rejected(
    question: str,
    answer: str,
    candidates: Sequence[str],
    judge: Judge,
    threshold: float,
    rng: np.random.Generator,
) -> Rejected:
    """The candidate with the strongest conflict, or a written hallucination where none reaches
    ``threshold``.

    Raises:
        InputError: the judge's conflict lies outside [0, 1], or it writes the reference answer
            itself.
    """

    def graded(text: str, origin: str) -> Rejected:
        text = text.replace(
            IMAGE_MARK, " "
        ).strip()  # a model may write the mark, and no answer may hold it
        conflict = judge.conflict(question, answer, text)
        if not 0 <= conflict <= 1:
            raise InputError(
                f"judge: gave the conflict {conflict!r} for {text!r:.80}; expected a value from 0 "
                "to 1"
            )
        return Rejected(text, origin, conflict)

    best = max(
        (graded(text, "sampled") for text in candidates),
        key=lambda item: item.conflict,
        default=None,
    )
    if best is not None and best.text and best.conflict >= threshold:
        return best
    written = graded(judge.write(question, answer, rng), "written")
    if not written.text or words(written.text) == words(answer):
        raise InputError(
            f"judge: wrote {written.text!r} for the question {question!r:.80}, which rejects "
            "nothing"
        )
    return written
