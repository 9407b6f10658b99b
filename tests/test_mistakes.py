"""Severity-weighted error and errors by kind, against counts by hand."""

from __future__ import annotations

import pytest

from mmedpo_utils.metrics import score
from mmedpo_utils.show.mistakes import errors_by_kind


def answered(question: str, answer: str, prediction: str, kind: str) -> dict:
    return {
        "question_id": f"{question} {prediction}",
        "image": "a.png",
        "question": question,
        "answer": answer,
        "prediction": prediction,
        "answer_type": kind,
    }


ROWS = [
    answered("Is there a nodule?", "yes", "no", "CLOSED"),  # missed: 0.8
    answered("Is there a nodule?", "no", "no", "CLOSED"),
    answered("Is there a pneumothorax?", "no", "yes", "CLOSED"),  # invented: 0.8
    answered("Is there an effusion?", "yes", "opacity", "CLOSED"),  # says neither: 0.4 of 0.6
    answered("Where is the nodule?", "right upper", "left upper", "OPEN"),  # wrong side: 0.8
    answered("What is the abnormality?", "nodule", "atelectasis", "OPEN"),  # 0.8 is missed
    answered("Write the report.", "The heart is enlarged.", "", "REPORT"),
]


def test_the_score_is_the_mean_cost_over_questions_without_reports():
    costs = [0.8, 0, 0.8, 0.24, 0.8, 0.8]
    assert score(ROWS, "severity") == pytest.approx(100 * sum(costs) / 6)
    assert score(ROWS[-1:], "severity") is None


def test_errors_are_counted_by_kind():
    (line,) = errors_by_kind({"model": ROWS})
    assert line == {
        "model": "model",
        "questions": 6,
        "missed": 1,
        "invented": 1,
        "wrong finding": 1,
        "wrong side": 1,
        "wrong level": 0,
        "vague": 0,
        "no answer": 1,
        "cost": 3.4,
    }
