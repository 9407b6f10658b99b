"""Which kinds of error a model makes, and what they cost together, in the phantom world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..base.rows import Row
from ..phantom.errors import KINDS, errors


def errors_by_kind(predictions: Mapping[str, Sequence[Row]]) -> list[Row]:
    """How many of a model's closed and open answers hold an error of each kind.

    Args:
        predictions: rows of `evaluate.predict` by model, about phantom films.

    Returns:
        a row per model: ``model``, ``questions``, a count for each of `phantom.errors.KINDS`, and
        ``cost``, what all errors cost together. "no answer" is the third answer of likelihood
        displacement: neither of the two that a pair was about.
    """
    table = []
    for model, rows in predictions.items():
        counts: Counter[str] = Counter()
        cost = 0.0
        asked = [row for row in rows if row["answer_type"] != "REPORT"]
        for row in asked:
            for error in errors(row["question"], str(row["answer"]), str(row["prediction"])):
                counts[error.kind] += 1
                cost += error.severity
        kinds = {kind: counts[kind] for kind in KINDS}
        table.append({"model": model, "questions": len(asked), **kinds, "cost": round(cost, 1)})
    return table
