"""Judge, panel and the choice of the rejected response, against facts written out by hand and drawn
films.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.rows import question_text
from mmedpo_utils.phantom.errors import COSTS, KINDS, Error, claims, errors, severity
from mmedpo_utils.phantom.panel import CONFLICT, FactJudge, as_sentence, fact_panel, wording
from mmedpo_utils.phantom.texts import questions
from mmedpo_utils.phantom.world import FINDINGS, films
from mmedpo_utils.relevance import choose_rejected, debate, sample_candidates

JUDGE = FactJudge()
WHERE, IS_THERE, ON_RIGHT, WHAT = (
    "Where is the nodule?",
    "Is there a nodule?",
    "Is the nodule on the right?",
    "What is seen in the right upper zone?",
)
REPORT = (
    "The heart is normal in size. There is a nodule in the right upper zone. There is no "
    "effusion or pneumothorax."
)


@pytest.fixture(scope="module")
def asked() -> list[dict]:
    return questions(films(40, seed=3), np.random.default_rng(3))


@pytest.mark.parametrize(
    ("question", "answer", "response", "kinds"),
    [
        (IS_THERE, "yes", "yes", []),
        (IS_THERE, "yes", "no", ["missed"]),
        (IS_THERE, "no", "Yes, a nodule.", ["invented"]),
        (IS_THERE, "no", "There is no nodule", []),
        (IS_THERE, "yes", "right upper", ["no answer"]),
        (IS_THERE, "yes", "", ["no answer"]),
        (ON_RIGHT, "yes", "yes", []),
        (ON_RIGHT, "yes", "no", ["wrong side"]),
        (ON_RIGHT, "no", "yes", ["wrong side"]),
        (ON_RIGHT, "no", "The nodule is on the left side.", []),
        (ON_RIGHT, "yes", "The nodule is on the left side.", ["wrong side"]),
        (WHERE, "right upper", "right upper", []),
        (WHERE, "right upper", "left upper", ["wrong side"]),
        (WHERE, "right upper", "right lower", ["wrong level"]),
        (WHERE, "right upper", "right", ["vague"]),
        (WHERE, "right upper", "banana", ["no answer"]),
        (WHERE, "right upper", "the nodule is in the left lower zone", ["wrong side"]),
        (WHAT, "nodule", "opacity", ["wrong finding"]),
        (WHAT, "nodule", "a nodule", []),
        ("report", REPORT, REPORT, []),
        ("report", REPORT, REPORT.replace("right", "left"), ["wrong side"]),
        ("report", REPORT, REPORT.replace("normal in size", "enlarged"), ["invented"]),
        ("report", REPORT, REPORT.replace("no effusion", "an effusion"), ["invented", "invented"]),
        ("report", REPORT, "There is no effusion.", ["missed"]),
        ("Which organ?", "Respiratory", "respiratory", []),
        ("Which organ?", "Respiratory", "the heart", ["no answer"]),
    ],
)
def test_errors_are_named(question: str, answer: str, response: str, kinds: list[str]) -> None:
    assert [error.kind for error in errors(question, answer, response)] == kinds
    assert (JUDGE.conflict(question, answer, response) > 0) == bool(kinds)


def test_claims_of_a_report() -> None:
    found = claims(REPORT)
    assert {name: claim.present for name, claim in found.items()} == {
        "cardiomegaly": False,
        "nodule": True,
        "effusion": False,
        "pneumothorax": False,
    }
    assert (found["nodule"].side, found["nodule"].level) == ("right", "upper")


def test_conflict_grows_with_departures() -> None:
    one = JUDGE.conflict("report", REPORT, REPORT.replace("right", "left"))
    two = JUDGE.conflict(
        "report", REPORT, REPORT.replace("right", "left").replace("normal in size", "enlarged")
    )
    assert 0 < JUDGE.conflict(WHERE, "right upper", "right") < one < two <= 1


def test_every_written_answer_contradicts_its_film(asked: list[dict]) -> None:
    rng = np.random.default_rng(0)
    for question in asked:
        text, answer = question_text(question), question["gpt4_answer"]
        assert JUDGE.conflict(text, answer, answer) == 0
        assert JUDGE.conflict(text, answer, JUDGE.write(text, answer, rng)) >= 0.5


def test_strongest_conflict_is_chosen_first() -> None:
    candidates = ["right upper", "right lower", " left lower", "left upper"]
    chosen = choose_rejected(WHERE, "right upper", candidates, JUDGE, 0.5, np.random.default_rng(0))
    assert (chosen.text, chosen.origin) == (
        "left lower",
        "sampled",
    ) and chosen.conflict == pytest.approx(0.8)


@pytest.mark.parametrize("candidates", [[], ["yes"], ["", "banana"]])
def test_without_conflict_a_hallucination_is_written(candidates: list[str]) -> None:
    chosen = choose_rejected(IS_THERE, "yes", candidates, JUDGE, 0.5, np.random.default_rng(0))
    assert (chosen.text, chosen.origin) == ("no", "written")


def test_unusable_judges_are_refused() -> None:
    class Echo:
        def conflict(self, question: str, answer: str, response: str) -> float:
            return 2.0 if response == "loud" else 0.0

        def write(self, question: str, answer: str, rng: np.random.Generator) -> str:
            return answer

    with pytest.raises(InputError, match="conflict 2.0"):
        choose_rejected("q", "a", ["loud"], Echo(), 0.5, np.random.default_rng(0))
    with pytest.raises(InputError, match="rejects nothing"):
        choose_rejected("q", "a", ["quiet"], Echo(), 0.5, np.random.default_rng(0))


def test_candidates_come_in_order_and_in_chunks(tmp_path: Path, asked: list[dict]) -> None:
    for name in {question["image"] for question in asked}:
        Image.new("L", (8, 8)).save(tmp_path / name)
    calls = []

    def generate(
        images: list, texts: list[str], samples: int, temperature: float, seed: int
    ) -> list[list[str]]:
        calls.append((len(images), temperature, seed))
        return [[text] * samples for text in texts]

    found = sample_candidates(generate, asked[:130], tmp_path, 3, 0.7, seed=5)
    assert found == [[question_text(question)] * 3 for question in asked[:130]]
    assert calls == [(64, 0.7, 5), (64, 0.7, 69), (2, 0.7, 133)]


def test_panel_is_deterministic_in_tenths_and_biased_differently(asked: list[dict]) -> None:
    strict, lenient, _ = fact_panel()
    rng = np.random.default_rng(1)
    for question in asked:
        text, answer = question_text(question), question["gpt4_answer"]
        written = JUDGE.write(text, answer, rng)
        for member in fact_panel():
            score, agrees, reason = member(text, answer, written, None)
            assert (score, agrees, reason) == member(text, answer, written, None)
            assert (
                0 <= score <= 1
                and round(score * 10) == pytest.approx(score * 10)
                and not agrees
                and reason
            )
    assert (
        strict(WHERE, "right upper", "right lower", None)[0]
        > lenient(WHERE, "right upper", "right lower", None)[0]
    )
    assert strict(IS_THERE, "yes", "no", None)[0] < lenient(IS_THERE, "yes", "no", None)[0]


def test_anchored_member_adopts_a_near_score_and_leans_on_a_far_one() -> None:
    anchored = fact_panel()[2]
    own = anchored(IS_THERE, "yes", "no", None)[0]
    assert anchored(IS_THERE, "yes", "no", own - 0.2)[:2] == (own - 0.2, True)
    assert anchored(IS_THERE, "yes", "no", 0.1)[:2] == (round((own + 0.1) / 2, 1), False)


def test_relevance_orders_errors_as_a_clinician_would() -> None:
    def score(question: str, answer: str, response: str) -> float:
        return debate(question, answer, response, fact_panel()).score

    assert score(IS_THERE, "yes", "the of the") == 0, "no clinical content"
    assert score(IS_THERE, "yes", "yes") == pytest.approx(0.2), "nothing wrong"
    missed = [
        score(f"Is there {finding}?", "yes", "no")
        for finding in ("pneumothorax", "effusion", "atelectasis")
    ]
    assert missed == sorted(missed, reverse=True) and missed[0] > missed[-1]
    assert score(WHERE, "right upper", "left upper") > score(WHERE, "right upper", "right lower")


def test_costs_are_stated_for_every_finding_and_lie_in_the_unit_interval() -> None:
    assert set(COSTS) == set(FINDINGS) and set(CONFLICT) == set(KINDS)
    for finding, cost in COSTS.items():
        assert len(cost.why.split()) > 5
        for kind in KINDS:
            assert 0 <= Error(kind, finding, "nodule").severity <= 1, (finding, kind)


@pytest.mark.parametrize(
    ("question", "answer", "response", "cost"),
    [
        (IS_THERE, "yes", "yes", 0.0),
        (IS_THERE, "yes", "no", 0.8),
        (IS_THERE, "no", "yes", 0.5),
        (WHERE, "right upper", "left upper", 0.8),
        (WHERE, "right upper", "right lower", 0.5),
        (WHERE, "right upper", "right", 0.4),
        (WHERE, "right upper", "banana", 0.32),
        # A missed nodule is graver than an invented opacity; an invented pneumothorax is graver.
        (WHAT, "nodule", "opacity", 0.8),
        (WHAT, "opacity", "pneumothorax", 0.8),
        # A heart that is not enlarged, and two findings that are not there: 1 - 0.7 * 0.5 * 0.2.
        (
            "report",
            REPORT,
            REPORT.replace("normal in size", "enlarged").replace("no effusion", "an effusion"),
            1 - 0.7 * 0.5 * 0.2,
        ),
    ],
)
def test_severity_is_what_the_table_says(
    question: str, answer: str, response: str, cost: float
) -> None:
    assert severity(question, answer, response) == pytest.approx(cost)


def test_a_whole_sentence_makes_the_same_claim(asked: list[dict]) -> None:
    rng = np.random.default_rng(5)
    longer = 0
    for question in asked:
        text, answer = question_text(question), question["gpt4_answer"]
        wrong = JUDGE.write(text, answer, rng)
        sentence = as_sentence(text, wrong)
        if question["answer_type"] == "REPORT":
            assert sentence == wrong
            continue
        assert claims(sentence, question["finding"]), (text, wrong, sentence)
        assert sentence.endswith(".")
        longer += len(sentence.split()) > len(wrong.split())
        assert errors(text, answer, sentence) == errors(text, answer, wrong)
        assert errors(text, answer, as_sentence(text, answer)) == []
    assert longer > 100


@pytest.mark.parametrize(
    ("question", "response", "sentence"),
    [
        (IS_THERE, "yes", "The film shows a nodule."),
        (IS_THERE, "no", "There is no nodule."),
        (ON_RIGHT, "yes", "The nodule is on the right side."),
        (ON_RIGHT, "no", "The nodule is on the left side."),
        (WHERE, "left upper", "The nodule is in the left upper zone."),
        ("On which side is the effusion?", "left", "The effusion is on the left side."),
        (WHAT, "opacity", "There is an opacity in the right upper zone."),
        ("What is the abnormality?", "opacity", "The film shows an opacity."),
        (WHERE, "banana", "banana"),
    ],
)
def test_sentences_by_hand(question: str, response: str, sentence: str) -> None:
    assert as_sentence(question, response) == sentence


def test_a_larger_share_rewords_the_same_answers_and_more() -> None:
    def reworded(share: float) -> set[int]:
        word = wording(share, seed=3)
        return {number for number in range(400) if word(str(number), IS_THERE, "no") != "no"}

    none, some, more, every = (reworded(share) for share in (0.0, 0.3, 0.7, 1.0))
    assert not none and some < more < every == set(range(400))
    assert 0.2 < len(some) / 400 < 0.4
