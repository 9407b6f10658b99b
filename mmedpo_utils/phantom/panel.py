"""The phantom world's judge and panel: rules that know the facts through the question and the
reference answer.

They speak the interface of ``hallucinate.Judge`` and ``relevance.Member``, as language models do
for real films.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .texts import with_article
from .world import FINDINGS, LEVELS, SIDES

PLACES = (*LEVELS, "apex", "base", "diaphragm")
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
        side, level = (
            next((word for word in words if word in known), None) for known in (SIDES, PLACES)
        )
        if asked and not names and (side or level):
            names = [asked]
        found |= {name: Claim(not NEGATIONS & set(words), side, level) for name in names}
    return found


def errors(question: str, answer: str, response: str) -> list[Error]:
    """Every departure of ``response`` from the facts in ``answer``; empty where they agree."""
    asked = next(iter(claims(question)), "")
    answer, response = answer.strip().lower(), response.strip().lower()
    truth, told = claims(answer, asked), claims(response, asked)
    if answer in ("yes", "no"):
        said = _polarity(response)
        return [] if said == answer else [Error("polarity" if said else "evasive", asked)]
    if not truth or not told:
        return [] if answer == response else [Error("evasive", asked)]
    wrong = [Error("invented", name) for name in told if name not in truth and told[name].present]
    for name, fact in truth.items():
        kind = _compare(fact, told.get(name))
        wrong += [Error(kind, name)] if kind else []
    return wrong


def _compare(fact: Claim, claim: Claim | None) -> str:
    if claim is None:
        return "omitted" if fact.present else ""
    if fact.present != claim.present:
        return "polarity"
    for kind, true, said in (("side", fact.side, claim.side), ("level", fact.level, claim.level)):
        if fact.present and true and true != said:
            return kind if said else "vague"
    return ""


def _polarity(text: str) -> str | None:
    words = re.findall(r"[a-z]+", text.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    return "no" if NEGATIONS & set(words) else "yes" if claims(text) else None


class FactJudge:
    """Compares with the facts; each departure adds to the conflict, in the measure of
    ``SEVERITY``.
    """

    def conflict(self, question: str, answer: str, response: str) -> float:
        """0 for agreement, nearer to 1 the more and the graver the departures."""
        return float(
            1 - np.prod([1 - SEVERITY[error.kind] for error in errors(question, answer, response)])
        )

    def write(self, question: str, answer: str, rng: np.random.Generator) -> str:
        """The answer with one fact turned: yes for no, another finding, the other side, another
        level.
        """
        edits = [edit for edit in _edits(answer) if self.conflict(question, answer, edit) > 0]
        return edits[rng.integers(len(edits))] if edits else f"not {answer.strip()}"


def _edits(answer: str) -> list[str]:
    """Every text that differs from ``answer`` in one fact."""
    turns = {
        "yes": ["no"],
        "no": ["yes"],
        "enlarged": ["normal in size"],
        "normal in size": ["enlarged"],
        "size is normal": ["is enlarged"],
        "right": ["left"],
        "left": ["right"],
    }
    turns |= {level: [other for other in LEVELS if other != level] for level in LEVELS}
    lungs = [finding for finding in FINDINGS if finding != "cardiomegaly"]
    for name in lungs:
        others = [other for other in lungs if not re.search(rf"\b{other}\b", answer)]
        turns[name] = others
        turns[f"is {with_article(name)}"] = [f"is {with_article(other)}" for other in others]
        turns[f"shows {with_article(name)}"] = [f"shows {with_article(other)}" for other in others]
        turns[f"is no {name}"] = [f"is {with_article(name)}"]
    plain = "." not in answer
    edits = []
    for old, news in turns.items():
        if not plain and old in ("yes", "no", *lungs):
            continue
        edits += [
            re.sub(rf"\b{old}\b", new, answer, count=1)
            for new in news
            if re.search(rf"\b{old}\b", answer)
        ]
    return edits


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
        wrong = errors(question, answer, response)
        own, reason = 0.2, "says nothing wrong, so little is learnt from rejecting it"
        if not claims(response, "film") and not _polarity(response):
            own, reason = 0.0, "no clinical content"
        elif wrong:
            scored = [
                (self.grades.get(error.kind, 0.1) * URGENCY.get(error.finding, 0.8), error)
                for error in wrong
            ]
            own, gravest = max(scored, key=lambda item: item[0])
            own, reason = round(own, 1), f"{gravest.kind}: {gravest.finding or 'the question'}"
        if previous is not None and abs(previous - own) <= self.tolerance + 1e-9:
            return previous, True, f"agrees ({reason})"
        if previous is not None and self.yields:
            own = round((own + previous) / 2, 1)
        return own, False, reason


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
