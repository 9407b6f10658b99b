"""The one exception that bad input raises, and how a program ends with it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the reader gave us cannot be used.

    The message names the file, the row and the field, says what was expected and what to do.
    """


def first_line(error: Exception) -> str:
    """What an error says first; its kind where it says nothing.

    Libraries advise to switch a safeguard off; that advice is not passed on.
    """
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run here"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def exit_status(action: Callable[[], object]) -> int:
    """Run what a program does. An `InputError` is printed, not raised: then the status is 2, else 0."""
    try:
        action()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
