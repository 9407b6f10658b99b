"""The one exception that bad input raises."""

from __future__ import annotations


class InputError(ValueError):
    """Something the reader gave us cannot be used.

    The message names the file, the row and the field, says what was expected and what to do.
    """
