"""Checks that every row of a foreign file passes: its place in a message, its keys, its texts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from .errors import InputError
from .files import WrittenTwice


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
