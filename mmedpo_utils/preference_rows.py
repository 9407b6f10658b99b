"""Questions and preference pairs on disk (the released MMedPO formats): schema, read, check, audit,
write.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base.errors import InputError, Unusable, first_line
from .base.files import json_object, load_json, read_text, write_json
from .base.images import verify_image
from .base.privacy import is_mimic
from .base.rows import (
    IMAGE_MARK,
    Row,
    answer_text,
    check_pair,
    check_question,
    corrected_pair,
    corrected_question,
    image_names,
    place,
    question_text,
    row_source,
)
from .base.words import is_yes_no

OPTIONAL_KEYS = ("patient_id", "finding", "question_type")
PAIR_KEYS = (
    "id",
    "image",
    "rejected_image",
    "conversations",
    "rejected_conversations",
    "weighted_score",
    "source",
    "origin",
    "rejected_noised",
    *OPTIONAL_KEYS,
)


def read_manifest(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    rejected_root: str | os.PathLike | None = None,
    strict: bool = False,
) -> list[Row]:
    """Read preference pairs in the released MMedPO format and check every row.

    Args:
        path: JSON list of rows with ``id``, ``image``, ``conversations``,
            ``rejected_conversations`` and optionally ``weighted_score`` (raw relevance in [0, 1])
            and ``rejected_image``.
        image_root: folder of the images; given, every ``image`` is opened and verified.
        rejected_root: folder of the rejected images; given, every ``rejected_image`` is opened and
            verified.
        strict: a row that cannot be used is an error: for what the kit wrote itself, where it
            means damage, and its other files count on every row.

    A row that cannot be used is left out; one warning counts such rows and names them. What is
    clear is corrected: numbers among the answers become text, and a missing image mark is put
    first.

    Warns of keys that are not read, and where chosen and rejected are identical (these rows are
    kept), except in rows that have no rejected answer at all (``origin`` none, for the SFT
    objective). Where images are named like MIMIC-CXR's, no message shows an id or a value.

    Raises:
        InputError: the file is no list of pairs, or none of its rows can be used (``strict``: one
            cannot). It names the file, the row, its id and the field, and says what was expected.
    """
    stored = load_json(path, "a list of preference pairs")
    if not isinstance(stored, list) or not stored:
        raise InputError(
            f"{path}: expected a non-empty list of preference pairs, found "
            f"{'an empty list' if stored == [] else type(stored).__name__}"
        )
    verified: set[Path] = set()
    private = any(is_mimic(name) for name in image_names(stored))
    rows = []
    left_out = Unusable(path, private)
    for number, row in enumerate(stored):
        where = place(path, number, row, "id")
        try:
            row = corrected_pair(row)
            check_pair(row, where)
            for root, key in ((image_root, "image"), (rejected_root, "rejected_image")):
                if root is not None and row.get(key) is not None:
                    verify_image(root, row[key], f"{where}: `{key}`", verified)
        except InputError as error:
            left_out.note(error)
            if strict:
                left_out.tell(0)
        else:
            rows.append(row)
    left_out.tell(len(rows))
    _tell_unknown_keys(path, rows)
    _tell_repeated(path, rows)
    same = [row["id"] for row in rows if _teaches_nothing(row, image_root, rejected_root)]
    if same:
        _tell_identical(path, len(rows), same, private)
    return rows


def _tell_identical(path: str | os.PathLike, rows: int, same: list[Any], private: bool) -> None:
    named = ", ".join(repr(name) for name in same[:5])
    ids = f" (ids {named}{', ...' if len(same) > 5 else ''})"
    warnings.warn(
        f"{path}: {len(same)} of {rows} rows have identical chosen and rejected sides and "
        f"teach nothing{'' if private else ids}",
        stacklevel=3,
    )


def _teaches_nothing(
    row: Row, image_root: str | os.PathLike | None, rejected_root: str | os.PathLike | None
) -> bool:
    """Whether both sides of a pair are the same, though the row does not say that it has only
    one.
    """
    return row.get("origin") != "none" and is_identical(row, image_root, rejected_root)


def _tell_repeated(path: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Warn once of pairs that come more than once: training would see them more often."""
    different = {(row["id"], answer_text(row, rejected=True), row_source(row)) for row in rows}
    if len(different) < len(rows):
        warnings.warn(
            f"{path}: {len(rows) - len(different)} of {len(rows)} rows have the id, the source and "
            "the rejected answer of an earlier one, and are trained on again; take them out where "
            "that is not meant",
            stacklevel=3,
        )


def _tell_unknown_keys(path: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Warn once of keys that would be dropped in silence; another maker's key may change what a
    pair means.
    """
    unknown = Counter(key for row in rows for key in row if key not in PAIR_KEYS)
    if unknown:
        named = ", ".join(f"`{key}` ({count} rows)" for key, count in unknown.most_common(5))
        warnings.warn(
            f"{path}: keys that are not read: {named}; the keys that are: {', '.join(PAIR_KEYS)}",
            stacklevel=3,
        )


def _refuse_second(seen: set[Any], name: Any, where: str) -> None:
    """Note a question's id. Raises InputError: an earlier one has it, and the scores would count
    both.
    """
    if name in seen:
        raise InputError(
            f"{where}: `question_id`: an earlier question has the same one; give it one of its "
            "own, or leave the row out"
        )
    seen.add(name)


def write_manifest(path: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Check ``rows`` and write them as JSON, atomically. Raises InputError: a wrong row, no place
    to write.
    """
    if not rows:
        raise InputError(f"{path}: no preference pairs to write")
    for number, row in enumerate(rows):
        check_pair(row, place(path, number, row, "id"))
    write_json(path, list(rows))


def read_questions(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None
) -> list[Row]:
    """Read questions (JSON lines: question_id, image, text, gpt4_answer, answer_type) and check
    every line.

    A line that cannot be used is left out; one warning counts such lines and names them.
    `corrected_question` says what is corrected. Further keys are kept.

    Raises:
        InputError: no line can be used; it names the file, the line, the question and the field.
    """
    text = read_text(path)
    rows = []
    verified: set[Path] = set()
    left_out = Unusable(path, private=is_mimic(text))
    seen: set[Any] = set()
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            try:
                row = json.loads(line, object_pairs_hook=json_object)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}: row {number}: is not JSON ({first_line(error)}); expected one "
                    "question per line"
                ) from error
            where = place(path, number, row, "question_id")
            row = corrected_question(row)
            check_question(row, where)
            if image_root is not None:
                verify_image(image_root, row["image"], f"{where}: `image`", verified)
            _refuse_second(seen, row["question_id"], where)
        except InputError as error:
            left_out.note(error)
        else:
            rows.append(row)
    left_out.tell(len(rows))
    if not rows:
        raise InputError(f"{path}: holds no question; expected one JSON object per line")
    return rows


def is_identical(
    row: Row,
    image_root: str | os.PathLike | None = None,
    rejected_root: str | os.PathLike | None = None,
) -> bool:
    """Whether both sides of a pair say the same text about the same image."""
    if answer_text(row) != answer_text(row, rejected=True):
        return False
    if row.get("rejected_image") is None:
        return True
    if image_root is None or rejected_root is None:
        return False
    return (Path(image_root) / row["image"]).resolve() == (
        Path(rejected_root) / row["rejected_image"]
    ).resolve()


def pair_row(question: Row, rejected: str, score: float, **optional: Any) -> Row:
    """A preference row from a question, the rejected answer, the raw score in [0, 1] and optional
    keys.
    """

    def turns(answer: str) -> list[dict[str, str]]:
        prompt = f"{IMAGE_MARK}\n{question_text(question)}"
        return [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]

    carried = {key: question[key] for key in OPTIONAL_KEYS if key in question}
    return {
        "id": question["question_id"],
        "image": question["image"],
        "rejected_image": None,
        "conversations": turns(question["gpt4_answer"]),
        "rejected_conversations": turns(rejected),
        "weighted_score": float(score),
        **carried,
        **optional,
    }


def rows_to_questions(rows: Sequence[Row]) -> list[Row]:
    """The questions behind preference rows, in the format of ``read_questions``; yes/no answers
    count as closed.
    """
    questions = []
    for row in rows:
        answer = answer_text(row)
        carried = {key: row[key] for key in OPTIONAL_KEYS if key in row}
        questions.append(
            {
                "question_id": row["id"],
                "image": row["image"],
                "gpt4_answer": answer,
                "text": f"{question_text(row)}\n{IMAGE_MARK}",
                "answer_type": "CLOSED" if is_yes_no(answer) else "OPEN",
                **carried,
            }
        )
    return questions
