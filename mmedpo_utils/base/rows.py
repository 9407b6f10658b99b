"""Checks that every row of a foreign file passes: its place in a message, its keys, its texts."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import WrittenTwice, load_json


def place(path: str | os.PathLike, number: int, row: Any, key: str) -> str:
    """File, row number from 0, and id: the start of every message about a row."""
    return (
        f"{path}: row {number} ({key} {row.get(key)!r})"
        if isinstance(row, dict)
        else f"{path}: row {number}"
    )


def check_fields(row: Any, where: str, keys: Sequence[str]) -> None:
    """Check that ``row`` is an object with all ``keys``, the first of which, the id, is a text or a
    whole number.

    Raises:
        InputError: begins with ``where``, names the key.
    """
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: expected an object with {', '.join(keys)}, found {type(row).__name__}"
        )
    if isinstance(row, WrittenTwice):
        raise InputError(
            f"{where}: `{row.key}` is written twice; expected each key once: take out the wrong one"
        )
    for key in keys:
        if row.get(key) is None:
            raise InputError(f"{where}: `{key}` is missing; every row needs {', '.join(keys)}")
    if not isinstance(row[keys[0]], str | int) or isinstance(row[keys[0]], bool):
        raise InputError(f"{where}: `{keys[0]}`: expected a text or a whole number")


def check_text(value: Any, where: str) -> None:
    """Check that ``value`` is a text with something in it. Raises InputError: begins with
    ``where``.
    """
    if not _is_text(value):
        raise InputError(f"{where}: expected a non-empty text, found {value!r:.80}")


def _is_text(value: Any) -> bool:
    """Whether ``value`` is a text with something in it that UTF-8 can hold (half a surrogate pair
    cannot be written).
    """
    return (
        isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)
    )


IMAGE_MARK = "<image>"


ANSWER_TYPES = ("CLOSED", "OPEN", "REPORT")


Row = dict[str, Any]


def corrected_text(value: Any) -> Any:
    """A number as the text that it means; anything else, NaN and true among it, as it is.

    A table program writes the whole numbers of a column that has gaps as 2.0: that is "2".
    """
    if type(value) is int:
        return str(value)
    if type(value) is not float or not math.isfinite(value):
        return value
    return str(int(value) if value.is_integer() else value)


def corrected_question(row: Any) -> Any:
    """A question with what other makers write otherwise put right: the one place that says what
    that is.

    Numbers among the answers become text; an answer type loses blanks and becomes upper case; a
    missing image mark is put last. A row that needs nothing, or is no object, comes back as it is.
    """
    if not isinstance(row, dict):
        return row
    row = dict(row) if type(row) is dict else row
    if "gpt4_answer" in row:
        row["gpt4_answer"] = corrected_text(row["gpt4_answer"])
    if isinstance(row.get("answer_type"), str):
        row["answer_type"] = row["answer_type"].strip().upper()
    text = row.get("text")
    if isinstance(text, str) and text.strip() and IMAGE_MARK not in text:
        row["text"] = f"{text.strip()}\n{IMAGE_MARK}"
    return row


def corrected_pair(row: Any) -> Any:
    """A preference row with the same put right as in `corrected_question`; both sides are corrected
    alike.
    """
    if not isinstance(row, dict):
        return row
    row = dict(row) if type(row) is dict else row
    for key in ("conversations", "rejected_conversations"):
        if not isinstance(row.get(key), list):
            continue
        turns = []
        for turn in row[key]:
            if type(turn) is dict and "value" in turn:
                turn = turn | {"value": corrected_text(turn["value"])}
            turns.append(turn)
        row[key] = turns
        texts = [
            turn["value"]
            for turn in turns
            if isinstance(turn, dict) and isinstance(turn.get("value"), str)
        ]
        marked = any(IMAGE_MARK in text for text in texts)
        if (
            turns
            and not marked
            and type(turns[0]) is dict
            and isinstance(turns[0].get("value"), str)
        ):
            turns[0] = turns[0] | {"value": f"{IMAGE_MARK}\n{turns[0]['value'].strip()}"}
    return row


def has_weight(row: Row) -> bool:
    """Whether a preference row has a raw relevance score of its own."""
    return row.get("weighted_score") is not None


def with_rejected(row: Row, text: str) -> Row:
    """The preference row with another rejected answer."""
    asked, said = row["rejected_conversations"]
    return row | {"rejected_conversations": [asked, said | {"value": text}]}


def question_text(item: Row | str) -> str:
    """The question of a preference row, a question or a text, without the image mark."""
    if isinstance(item, str):
        text = item
    elif "conversations" in item:
        text = item["conversations"][0]["value"]
    else:
        text = item["text"]
    return text.replace(IMAGE_MARK, "").strip()


def row_source(row: Row) -> str:
    """``visual`` for a pair with a rejected image of its own, else ``text``."""
    return "text" if row.get("rejected_image") is None else "visual"


def answer_text(row: Row, rejected: bool = False) -> str:
    """The preferred (or rejected) answer of a preference row, stripped."""
    return row["rejected_conversations" if rejected else "conversations"][-1]["value"].strip()


def check_pair(row: Any, where: str) -> None:
    """Check one preference row. Raises InputError: begins with ``where``, names the key."""
    check_fields(row, where, ("id", "image", "conversations", "rejected_conversations"))
    check_text(row["image"], f"{where}: `image`")
    if row.get("rejected_image") is not None:
        check_text(row["rejected_image"], f"{where}: `rejected_image`")
    elif row.get("rejected_noised"):
        raise InputError(
            f"{where}: `rejected_noised` is {row['rejected_noised']!r:.20}: the rejected side is a "
            "noised image, and no `rejected_image` names it; make the noised images (notebook 02) "
            "and name them there"
        )
    elif row.get("source") == "visual":
        raise InputError(
            f"{where}: `source` is visual, and no `rejected_image` names the rejected side's "
            "image; name it there, or take `source` out"
        )
    for key in ("conversations", "rejected_conversations"):
        _check_conversation(row[key], f"{where}: `{key}`")
    if question_text(row) != question_text(row["rejected_conversations"][0]["value"]):
        raise InputError(
            f"{where}: `rejected_conversations`: asks another question than `conversations`"
        )
    score = row.get("weighted_score")
    if has_weight(row) and (type(score) not in (int, float) or not 0 <= score <= 1):
        raise InputError(
            f"{where}: `weighted_score`: expected a number from 0 to 1, found {score!r:.80}"
        )


def _check_conversation(turns: Any, where: str) -> None:
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise InputError(
            f"{where}: expected an even number of turns, human then gpt, found "
            f"{len(turns) if isinstance(turns, list) else type(turns).__name__}"
        )
    for number, turn in enumerate(turns):
        speaker = ("human", "gpt")[number % 2]
        known = isinstance(turn, dict) and not isinstance(turn, WrittenTwice)
        if not known or turn.get("from") != speaker or not _is_text(turn.get("value")):
            raise InputError(
                f"{where}: turn {number}: expected {{from: {speaker}, value: text}}, found "
                f"{turn!r:.80}"
            )
    if len(turns) > 2:
        # The prompt holds one question: an earlier turn would be dropped, and the last answer
        # belong to another question.
        raise InputError(
            f"{where}: has {len(turns)} turns; expected one question and one answer: write the "
            "last turn's question and answer as a pair of its own, or leave the row out"
        )
    if not question_text(turns[0]["value"]):
        raise InputError(
            f"{where}: turn 0: asks nothing beside the {IMAGE_MARK} mark; expected a question"
        )
    marks = [turn["value"].count(IMAGE_MARK) for turn in turns]
    if marks[0] != 1 or sum(marks) != 1:
        raise InputError(
            f"{where}: expected one {IMAGE_MARK} mark, in the first turn, found {sum(marks)}"
        )


def check_question(row: Any, where: str) -> None:
    """Check one question in the format of ``read_questions``. Raises InputError: begins with
    ``where``, names the key.
    """
    check_fields(row, where, ("question_id", "image", "text", "gpt4_answer", "answer_type"))
    for key in ("image", "text", "gpt4_answer"):
        check_text(row[key], f"{where}: `{key}`")
    if row["text"].count(IMAGE_MARK) != 1:
        raise InputError(
            f"{where}: `text`: expected one {IMAGE_MARK} mark, found "
            f"{row['text'].count(IMAGE_MARK)}"
        )
    if not question_text(row["text"]):
        raise InputError(
            f"{where}: `text`: asks nothing beside the {IMAGE_MARK} mark; expected a question"
        )
    if IMAGE_MARK in row["gpt4_answer"]:
        raise InputError(
            f"{where}: `gpt4_answer`: holds the mark {IMAGE_MARK}, which belongs in questions "
            "alone; take it out"
        )
    kind = row["answer_type"]
    if kind not in ANSWER_TYPES:
        raise InputError(
            f"{where}: `answer_type`: expected one of {', '.join(ANSWER_TYPES)}, found {kind!r}"
        )


def check_prediction(row: Any, where: str) -> None:
    """Check one row of a predictions file. Raises InputError: begins with ``where``."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object but {type(row).__name__}; predict again")
    missing = [
        key
        for key in ("question_id", "image", "answer_type", "answer", "prediction")
        if key not in row
    ]
    if missing:
        raise InputError(f"{where}: a prediction needs {', '.join(missing)}; predict again")
    for key in ("image", "answer", "prediction"):
        if not isinstance(row[key], str):
            raise InputError(
                f"{where}: `{key}`: expected a text, found {row[key]!r:.80}; predict again"
            )
    if row["answer_type"] not in ANSWER_TYPES:
        raise InputError(
            f"{where}: `answer_type`: expected one of {', '.join(ANSWER_TYPES)}, found "
            f"{row['answer_type']!r:.80}; predict again"
        )


def patient_of(row: Row) -> str:
    """The patient of a row; the image's name stands for it where the row names none (no key, null,
    or a blank text).
    """
    patient = row.get("patient_id")
    return str(row["image"] if patient is None or not str(patient).strip() else patient)


def row_sha(rows: Sequence[Row]) -> str:
    """SHA-256 (hexadecimal) of rows, whatever the order of their keys."""
    return hashlib.sha256(
        json.dumps(list(rows), sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def pair_images(path: str | os.PathLike) -> list[str]:
    """The images that a preference file names, whatever else its rows hold. Raises InputError: not
    a JSON file.
    """
    if not Path(path).is_file():
        return []
    return image_names(load_json(path, "a list of preference pairs"))


def image_names(stored: Any) -> list[str]:
    """The images that the rows of a JSON file name, as far as it holds rows."""
    rows = [row for row in stored if isinstance(row, dict)] if isinstance(stored, list) else []
    return [row["image"] for row in rows if isinstance(row.get("image"), str)]
