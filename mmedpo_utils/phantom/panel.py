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

from ..base.rows import Row, question_text
from .texts import with_article
from .world import FINDINGS, LEVELS, PLACES, SIDES

NEGATIONS = {"no", "not", "without", "normal", "absent"}
SEVERITY = {
    "polarity": 0.9,
    "invented": 0.8,
    "side": 0.8,
    "level": 0.6,
    "omitted": 0.3,
    "vague": 0.2,
    "evasive": 0.2,
}
URGENCY = {
    "pneumothorax": 1.0,
    "pneumoperitoneum": 1.0,
    "nodule": 0.9,
    "opacity": 0.8,
    "effusion": 0.8,
    "cardiomegaly": 0.7,
    "atelectasis": 0.6,
}


@dataclass(frozen=True)
class Claim:
    """What a text says of one finding."""

    present: bool
    side: str | None
    level: str | None


@dataclass(frozen=True)
class Error:
    """One way in which a response departs from the facts: a key of ``SEVERITY``, and the finding
    (or "").
    """

    kind: str
    finding: str


def claims(text: str, asked: str = "") -> dict[str, Claim]:
    """What a text says, by finding; a place without a finding belongs to the finding ``asked``
    for.
    """
    found: dict[str, Claim] = {}
    for sentence in text.lower().split("."):
        words = re.findall(r"[a-z]+", sentence)
        names = [finding for finding in FINDINGS if finding in words]
        if "heart" in words and ("enlarged" in words or "normal" in words):
            names.append("cardiomegaly")
        side = next((word for word in words if word in SIDES), None)
        level = next((word for word in words if word in PLACES), None)
        if asked and not names and (side or level):
            names = [asked]
        present = not NEGATIONS & set(words)
        for name in names:
            found[name] = Claim(present, side, level)
    return found


def errors(question: str, answer: str, response: str) -> list[Error]:
    """Every departure of ``response`` from the facts in ``answer``; empty where they agree."""
    asked = next(iter(claims(question)), "")
    answer = answer.strip().lower()
    response = response.strip().lower()
    if answer in ("yes", "no"):
        said = _said_of_side(question, response, asked) or _polarity(response)
        if said == answer:
            return []
        return [Error("polarity" if said else "evasive", asked)]
    truth = claims(answer, asked)
    claimed = claims(response, asked)
    if not truth or not claimed:
        return [] if answer == response else [Error("evasive", asked)]
    wrong = []
    for name, claim in claimed.items():
        if name not in truth and claim.present:
            wrong.append(Error("invented", name))
    for name, fact in truth.items():
        kind = _compare(fact, claimed.get(name))
        if kind:
            wrong.append(Error(kind, name))
    return wrong


def _said_of_side(question: str, response: str, asked: str) -> str | None:
    """The yes or no that a named side is: "on the left side" says no to "Is it on the right?"."""
    claim = claims(response, asked).get(asked)
    side = claims(question, asked)[asked].side if asked else None
    if not side or claim is None or not claim.present or not claim.side:
        return None
    return "yes" if claim.side == side else "no"


def _compare(fact: Claim, claim: Claim | None) -> str:
    """The kind of the departure of a claim from the fact about the same finding; "" for none."""
    if claim is None:
        return "omitted" if fact.present else ""
    if fact.present != claim.present:
        return "polarity"
    if not fact.present:
        return ""  # an absent finding has no place
    if fact.side and fact.side != claim.side:
        return "side" if claim.side else "vague"
    if fact.level and fact.level != claim.level:
        return "level" if claim.level else "vague"
    return ""


def _polarity(text: str) -> str | None:
    """What a text answers to a yes/no question; None where it says neither."""
    words = re.findall(r"[a-z]+", text.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    if NEGATIONS & set(words):
        return "no"
    return "yes" if claims(text) else None


class FactJudge:
    """Compares with the facts; each departure adds to the conflict, in the measure of
    ``SEVERITY``.
    """

    def conflict(self, question: str, answer: str, response: str) -> float:
        """0 for agreement, nearer to 1 the more and the graver the departures."""
        departures = errors(question, answer, response)
        return float(1 - np.prod([1 - SEVERITY[error.kind] for error in departures]))

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
    if "." in response or not (said or _polarity(response)):
        return response
    if _polarity(response) and not said:
        return _closed_sentence(question, asked, _polarity(response) == "yes")
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
        asked, said = row["rejected_conversations"]
        text = word(str(row["id"]), question_text(row), said["value"])
        changed.append(row | {"rejected_conversations": [asked, said | {"value": text}]})
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
        grades: score of a departure by kind, for the most urgent finding; missing kinds score 0.1.
        tolerance: largest distance to a previous score that it adopts.
        yields: moves half way to a previous score that it does not adopt.
    """

    name: str
    grades: Mapping[str, float]
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
        if not claims(response, "film") and not _polarity(response):
            return 0.0, "no clinical content"
        wrong = errors(question, answer, response)
        if not wrong:
            return 0.2, "says nothing wrong, so little is learnt from rejecting it"
        gravest = max(wrong, key=self._grade)
        return round(
            self._grade(gravest), 1
        ), f"{gravest.kind}: {gravest.finding or 'the question'}"

    def _grade(self, error: Error) -> float:
        return self.grades.get(error.kind, 0.1) * URGENCY.get(error.finding, 0.8)


def fact_panel() -> list[FactMember]:
    """Three members with different biases: strict on the place, lenient, and leaning on the
    previous score.
    """
    strict = {"polarity": 0.9, "invented": 0.8, "side": 1.0, "level": 0.9, "omitted": 0.4}
    lenient = {"polarity": 1.0, "invented": 0.8, "side": 0.7, "level": 0.4, "omitted": 0.2}
    anchored = {"polarity": 1.0, "invented": 0.9, "side": 0.8, "level": 0.6, "omitted": 0.3}
    return [
        FactMember("strict on place", strict, 0.2),
        FactMember("lenient", lenient, 0.1),
        FactMember("anchored", anchored, 0.2, yields=True),
    ]
