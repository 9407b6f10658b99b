"""The phantom world's judge and panel: rules that know the facts through the question and the
reference answer.

They speak the interface of ``relevance.Judge`` and ``relevance.Member``, as language models do
for real films.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..base.rows import Row, question_text, with_rejected
from .errors import Error, claims, errors, polarity
from .texts import with_article
from .world import FINDINGS, LEVELS, SIDES

# How plainly an error of each kind contradicts the facts, whatever it costs.
CONFLICT = {
    "missed": 0.9,
    "invented": 0.9,
    "wrong finding": 0.9,
    "wrong side": 0.8,
    "wrong level": 0.6,
    "vague": 0.2,
    "no answer": 0.2,
}


class FactJudge:
    """Compares with the facts; each departure adds to the conflict, in the measure of
    ``CONFLICT``.
    """

    def conflict(self, question: str, answer: str, response: str) -> float:
        """0 for agreement, nearer to 1 the more and the graver the departures."""
        departures = errors(question, answer, response)
        return float(1 - np.prod([1 - CONFLICT[error.kind] for error in departures]))

    def write(self, question: str, answer: str, rng: np.random.Generator) -> str:
        """The answer with one fact turned: yes for no, another finding, the other side, another
        level.
        """
        edits = [edit for edit in _edits(answer) if self.conflict(question, answer, edit) > 0]
        if not edits:
            return f"not {answer.strip()}"
        return edits[rng.integers(len(edits))]


LUNG_FINDINGS = [finding for finding in FINDINGS if finding != "cardiomegaly"]


def _edits(answer: str) -> list[str]:
    """Every text that differs from ``answer`` in one fact."""
    is_sentence = "." in answer
    edits = []
    for old, replacements in _turns(answer).items():
        # In a sentence these words alone say nothing: "is no nodule" is turned as a whole.
        if is_sentence and old in ("yes", "no", *LUNG_FINDINGS):
            continue
        if not re.search(rf"\b{old}\b", answer):
            continue
        for new in replacements:
            edits.append(re.sub(rf"\b{old}\b", new, answer, count=1))
    return edits


def _turns(answer: str) -> dict[str, list[str]]:
    """What each word, or group of words, may become so that one fact of ``answer`` is another."""
    turns = {
        "yes": ["no"],
        "no": ["yes"],
        "enlarged": ["normal in size"],
        "normal in size": ["enlarged"],
        "size is normal": ["is enlarged"],
        "right": ["left"],
        "left": ["right"],
    }
    for level in LEVELS:
        turns[level] = [other for other in LEVELS if other != level]
    # A finding that the text names already is no other one.
    others = [name for name in LUNG_FINDINGS if not re.search(rf"\b{name}\b", answer)]
    for name in LUNG_FINDINGS:
        turns[name] = others
        turns[f"is {with_article(name)}"] = [f"is {with_article(other)}" for other in others]
        turns[f"shows {with_article(name)}"] = [f"shows {with_article(other)}" for other in others]
        turns[f"is no {name}"] = [f"is {with_article(name)}"]
    return turns


def as_sentence(question: str, response: str) -> str:
    """What a short response claims, in a whole sentence, as language models word their
    hallucinations; a report, and what claims nothing, stay as they are.
    """
    asked = next(iter(claims(question)), "")
    said = claims(response, asked)
    zone = _zone(question)
    if "." in response or not (said or polarity(response)):
        return response
    if polarity(response) and not said:
        return _closed_sentence(question, asked, polarity(response) == "yes")
    name, claim = next(iter(said.items()))
    if not claim.present:
        return f"There is no {name}."
    if claim.side and claim.level:
        return f"The {name} is in the {claim.side} {claim.level} zone."
    if claim.side:
        return f"The {name} is on the {claim.side} side."
    if zone:
        return f"There is {with_article(name)} in the {zone} zone."
    return f"The film shows {with_article(name)}."


def wording(share: float, seed: int) -> Callable[[str, str, str], str]:
    """How the judge words the rejected answers of a set of pairs: a share of them as whole
    sentences, whatever they claim.

    Returns:
        called with a question's id, its text and the rejected answer, it gives the answer as it is
        worded. A larger share rewords the same answers and more.
    """

    def word(question_id: str, question: str, response: str) -> str:
        rng = np.random.default_rng([seed, zlib.crc32(f"wording {question_id}".encode())])
        return as_sentence(question, response) if rng.random() < share else response

    return word


def reworded(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Text pairs with a share of their rejected answers as whole sentences (see `wording`)."""
    word = wording(share, seed)
    changed = []
    for row in rows:
        text = word(str(row["id"]), question_text(row), row["rejected_conversations"][-1]["value"])
        changed.append(with_rejected(row, text))
    return changed


def _closed_sentence(question: str, asked: str, yes: bool) -> str:
    """A yes or a no to a question about a finding, or about its side, in a whole sentence."""
    side = claims(question, asked)[asked].side if asked else None
    if not asked:
        return "Yes." if yes else "No."
    if side:
        where = side if yes else SIDES[1 - SIDES.index(side)]
        return f"The {asked} is on the {where} side."
    return f"The film shows {with_article(asked)}." if yes else f"There is no {asked}."


def _zone(question: str) -> str:
    """The zone that a question names ("right upper"), or an empty text."""
    found = re.search(rf"({'|'.join(SIDES)}) ({'|'.join(LEVELS)})", question)
    return found[0] if found else ""


@dataclass(frozen=True)
class FactMember:
    """A panel member: it grades the gravest departure, and adopts a previous score near enough to
    its own.

    Attributes:
        bias: factor on the true cost of an error, by kind; 1 where none is named.
        tolerance: largest distance to a previous score that it adopts.
        yields: moves half way to a previous score that it does not adopt.
    """

    name: str
    bias: Mapping[str, float]
    tolerance: float
    yields: bool = False

    def __call__(
        self, question: str, answer: str, response: str, previous: float | None
    ) -> tuple[float, bool, str]:
        """Score the clinical relevance of ``response`` in steps of 0.1; 0 for a text without any
        clinical content.
        """
        own, reason = self._own_score(question, answer, response)
        if previous is None:
            return own, False, reason
        # Scores are steps of 0.1, which floating point holds only nearly.
        if abs(previous - own) <= self.tolerance + 1e-9:
            return previous, True, f"agrees ({reason})"
        if self.yields:
            own = round((own + previous) / 2, 1)
        return own, False, reason

    def _own_score(self, question: str, answer: str, response: str) -> tuple[float, str]:
        """The score that this member would give alone, and why."""
        if not claims(response, "film") and not polarity(response):
            return 0.0, "no clinical content"
        wrong = errors(question, answer, response)
        if not wrong:
            return 0.2, "says nothing wrong, so little is learnt from rejecting it"
        gravest = max(wrong, key=self._grade)
        return round(
            self._grade(gravest), 1
        ), f"{gravest.kind}: {gravest.finding or 'the question'}"

    def _grade(self, error: Error) -> float:
        # No member sees what an error costs as it is: strict ones round up, lenient ones down.
        return min(1.0, self.bias.get(error.kind, 1.0) * error.severity)


def fact_panel() -> list[FactMember]:
    """Three members with different biases: strict on the place, lenient, and leaning on the
    previous score.
    """
    strict = {"missed": 0.9, "wrong side": 1.2, "wrong level": 1.6, "invented": 0.8, "vague": 1.5}
    lenient = {"wrong side": 0.6, "wrong level": 0.4, "vague": 0.2, "no answer": 0.5}
    anchored = {"missed": 0.8, "invented": 1.2, "no answer": 0.8}
    return [
        FactMember("strict on place", strict, 0.2),
        FactMember("lenient", lenient, 0.1),
        FactMember("anchored", anchored, 0.2, yields=True),
    ]
