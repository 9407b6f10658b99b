"""What of a list of preference pairs deserves a look, and what to drop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..base.errors import InputError
from ..base.rows import Row, question_text
from ..base.words import opener
from ..preference_rows import answer_text, is_identical, row_source

COLUMNS = [
    "source",
    "origin",
    "id",
    "image",
    "prompt",
    "score",
    "identical",
    "chosen_words",
    "rejected_words",
    "chosen_opener",
    "rejected_opener",
]
REPAIRS = ("drop_zero_weight", "drop_identical", "drop_duplicates")


def pair_table(rows: Sequence[Row]) -> pd.DataFrame:
    """One line a pair, with what an audit counts.

    Columns: ``source``, ``origin``, ``id``, ``image``, ``prompt`` (the question, whatever its case
    and spacing), ``score`` (NaN where there is none), ``identical``; of both sides ``_words`` (how
    many) and ``_opener`` (yes, no or empty).
    """
    lines = []
    for row in rows:
        chosen = answer_text(row)
        rejected = answer_text(row, rejected=True)
        lines.append(
            {
                "source": row_source(row),
                "origin": row.get("origin", "unknown"),
                "id": str(row["id"]),
                "image": row["image"],
                "prompt": " ".join(question_text(row).casefold().split()),
                "score": row.get("weighted_score"),
                "identical": is_identical(row),
                "chosen_words": len(chosen.split()),
                "rejected_words": len(rejected.split()),
                "chosen_opener": opener(chosen),
                "rejected_opener": opener(rejected),
            }
        )
    # The columns are named, so that a list without pairs has them too.
    table = pd.DataFrame(lines, columns=COLUMNS)
    return table.astype({"score": float, "identical": bool})


def audit_manifest(rows: Sequence[Row]) -> dict[str, Any]:
    """Count what deserves a look: rows by source and origin, images, scores, repeats, and what
    leaks the label.

    A pair leaks its label where something other than its content distinguishes the answers:
    ``rejected_longer`` and ``rejected_shorter`` (in words), ``opposite_openers`` (one side begins
    with yes, the other with no) and ``one_sided_openers`` (only one side begins with yes or no).
    ``without_weight`` rows have no score. ``duplicate_prompts`` are rows after the first that ask
    the same question about the same image within a source; ``duplicate_ids`` repeat an id within a
    source.
    """
    table = pair_table(rows)
    origins = table.loc[table["source"] == "text", "origin"]
    scores = table["score"].dropna()
    opens = (table["chosen_opener"] != "").astype(int) + (table["rejected_opener"] != "")
    differs = table["chosen_opener"] != table["rejected_opener"]
    return {
        "rows": len(table),
        "sources": table["source"].value_counts(sort=False).to_dict(),
        "origins": origins.value_counts(sort=False).to_dict(),
        "images": int(table["image"].nunique()),
        "zero_weights": int((scores == 0).sum()),
        "identical_pairs": int(table["identical"].sum()),
        "duplicate_ids": int(table.duplicated(["source", "id"]).sum()),
        "duplicate_prompts": int(table.duplicated(["source", "image", "prompt"]).sum()),
        "rejected_longer": int((table["rejected_words"] > table["chosen_words"]).sum()),
        "rejected_shorter": int((table["rejected_words"] < table["chosen_words"]).sum()),
        "opposite_openers": int(((opens == 2) & differs).sum()),
        "one_sided_openers": int((opens == 1).sum()),
        "without_weight": len(table) - len(scores),
        "score_mean": float(scores.mean()) if len(scores) else None,
        "score_range": [float(scores.min()), float(scores.max())] if len(scores) else None,
    }


def repair_manifest(
    rows: Sequence[Row], choices: Sequence[str]
) -> tuple[list[Row], dict[str, int]]:
    """Drop what the audit found, by choice.

    Args:
        choices: any of ``drop_zero_weight`` (a weight of 0 teaches nothing under the released
            code's raw weights), ``drop_identical`` (both sides the same) and ``drop_duplicates``
            (keeps the first row of each prompt), applied in the order given.

    Returns:
        the rows that are left, in their order, and how many each choice dropped.

    Raises:
        InputError: an unknown choice.
    """
    left = pair_table(rows)
    counts = {}
    for choice in choices:
        if choice not in REPAIRS:
            raise InputError(f"repair {choice!r}: unknown; choose among {', '.join(REPAIRS)}")
        if choice == "drop_zero_weight":
            kept = left[left["score"] != 0]
        elif choice == "drop_identical":
            kept = left[~left["identical"]]
        else:
            kept = left.drop_duplicates(["source", "image", "prompt"])
        counts[choice] = len(left) - len(kept)
        left = kept
    return [rows[number] for number in left.index], counts
