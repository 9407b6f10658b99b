"""The one exception that bad input raises."""

from __future__ import annotations


class InputError(ValueError):
    """Something the reader gave us cannot be used.

    The message names the file, the row and the field, says what was expected and what to do.
    """


def first_line(error: Exception) -> str:
    """What an error says first; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
