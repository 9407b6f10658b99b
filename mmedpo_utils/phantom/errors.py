"""What is wrong with an answer about a phantom film, and what each error costs.

The world states the cost of every kind of error, by finding: the truth that relevance scores are
meant to track, and that the members of the panel (`panel`) read with their own biases. The costs
are ours, made for teaching, and no clinical guideline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .world import FINDINGS, PLACES, SIDES

NEGATIONS = {"no", "not", "without", "normal", "absent"}
KINDS = (
    "missed",
    "invented",
    "wrong finding",
    "wrong side",
    "wrong level",
    "vague",
    "no answer",
)


@dataclass(frozen=True)
class Cost:
    """What errors about one finding cost, from 0 (nothing) to 1 (the gravest), and why.

    Attributes:
        missed: it is there and is not said.
        invented: it is said and is not there.
        side: it is placed on the wrong side.
        level: it is placed on the wrong level of the right side.
    """

    missed: float
    invented: float
    side: float
    level: float
    why: str


COSTS = {
    "pneumothorax": Cost(
        1.0, 0.8, 1.0, 0.3, "air under tension kills within the hour; a drain harms a sound lung"
    ),
    "pneumoperitoneum": Cost(
        1.0, 0.9, 0.2, 0.1, "free air calls for surgery today, from whichever side it is seen"
    ),
    "nodule": Cost(
        0.8, 0.5, 0.8, 0.5, "it may be a cancer; a needle has to find it; a second film is cheap"
    ),
    "opacity": Cost(
        0.7, 0.4, 0.4, 0.2, "pneumonia without treatment; antibiotics without need; place is minor"
    ),
    "effusion": Cost(
        0.6, 0.5, 0.9, 0.3, "the fluid can wait for a day; the needle goes into the side it names"
    ),
    "cardiomegaly": Cost(
        0.5, 0.3, 0.0, 0.0, "a weak heart is treated for years; an echo rules it out; one place"
    ),
    "atelectasis": Cost(
        0.3, 0.2, 0.2, 0.1, "most plates open by themselves, and no decision hangs on their place"
    ),
}
# Of what it would cost to miss the finding: whoever gets no answer looks again, which takes time.
NO_ANSWER_SHARE = 0.4
# Of what the wrong place would cost: part of the place is said, and none of it is wrong.
VAGUE_SHARE = 0.5


@dataclass(frozen=True)
class Claim:
    """What a text says of one finding."""

    present: bool
    side: str | None
    level: str | None


@dataclass(frozen=True)
class Error:
    """One way in which a response departs from the facts.

    Attributes:
        kind: one of ``KINDS``.
        finding: the finding that is there, or is invented; "" where the question names none.
        said: of a wrong finding, the one that the response names; else "".
    """

    kind: str
    finding: str
    said: str = ""

    @property
    def severity(self) -> float:
        """What the error costs, from 0 to 1 (`COSTS`)."""
        cost = COSTS.get(self.finding)
        if cost is None:
            # The question names no finding ("Write the report."): an answer that is none.
            return NO_ANSWER_SHARE * max(known.missed for known in COSTS.values())
        if self.kind == "wrong finding":
            # The one is missed and the other invented; the graver of the two decides.
            return max(cost.missed, COSTS[self.said].invented)
        return {
            "missed": cost.missed,
            "invented": cost.invented,
            "wrong side": cost.side,
            "wrong level": cost.level,
            "vague": VAGUE_SHARE * max(cost.side, cost.level),
            "no answer": NO_ANSWER_SHARE * cost.missed,
        }[self.kind]


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
        return _closed_errors(question, answer, response, asked)
    truth = claims(answer, asked)
    claimed = claims(response, asked)
    if not truth or not claimed:
        return [] if answer == response else [Error("no answer", asked)]
    missed = [name for name, fact in truth.items() if fact.present and name not in claimed]
    invented = [name for name, claim in claimed.items() if claim.present and name not in truth]
    if len(truth) == len(missed) == len(invented) == 1:
        return [Error("wrong finding", missed[0], invented[0])]
    wrong = [Error("invented", name) for name in invented]
    for name, fact in truth.items():
        kind = _compare(fact, claimed.get(name))
        if kind:
            wrong.append(Error(kind, name))
    return wrong


def _closed_errors(question: str, answer: str, response: str, asked: str) -> list[Error]:
    """The departure of a response from a yes or a no."""
    side = claims(question, asked)[asked].side if asked else None
    said = _said_of(response, asked, side)
    if said == answer:
        return []
    if said is None:
        return [Error("no answer", asked)]
    if side:
        return [Error("wrong side", asked)]
    return [Error("missed" if answer == "yes" else "invented", asked)]


def _said_of(response: str, asked: str, side: str | None) -> str | None:
    """The yes or no of a response to a question about a finding, or about its side; None for a
    third answer, as of another finding.
    """
    opening = polarity(response)
    first = re.findall(r"[a-z]+", response)[:1]
    # A place alone says where, and answers only the question about a side.
    claim = claims(response, asked if side else "").get(asked)
    if not asked or first in (["yes"], ["no"]) or (opening == "no" and not claims(response)):
        return opening
    if claim is None:
        return None
    if side and claim.present and claim.side:
        # "The nodule is on the left side." says no to "Is the nodule on the right?".
        return "yes" if claim.side == side else "no"
    return "yes" if claim.present else "no"


def _compare(fact: Claim, claim: Claim | None) -> str:
    """The kind of the departure of a claim from the fact about the same finding; "" for none."""
    if claim is None:
        return "missed" if fact.present else ""
    if fact.present != claim.present:
        return "missed" if fact.present else "invented"
    if not fact.present:
        return ""  # an absent finding has no place
    if fact.side and fact.side != claim.side:
        return "wrong side" if claim.side else "vague"
    if fact.level and fact.level != claim.level:
        return "wrong level" if claim.level else "vague"
    return ""


def polarity(text: str) -> str | None:
    """What a text answers to a yes/no question; None where it says neither."""
    words = re.findall(r"[a-z]+", text.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    if NEGATIONS & set(words):
        return "no"
    return "yes" if claims(text) else None


def severity(question: str, answer: str, response: str) -> float:
    """What the errors of a response cost together, from 0 (none) towards 1: each takes its share of
    what the others leave.
    """
    departures = errors(question, answer, response)
    return float(1 - np.prod([1 - error.severity for error in departures]))
