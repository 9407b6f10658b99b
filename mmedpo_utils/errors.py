"""The one exception that bad input raises, and how a program ends with it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable

TERMINAL = re.compile(
    r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x1f\x7f]"
)  # colour codes, and what moves a terminal's cursor
LONGEST = 300
NAMED = 5  # rows that a warning names one by one


class InputError(ValueError):
    """Something the reader gave us cannot be used.

    The message names the file, the row and the field, says what was expected and what to do.
    """


class Unusable:
    """The rows of one file that cannot be used: left out, counted, and named in one warning.

    Args:
        source: the file.
    """

    def __init__(self, source: object) -> None:
        self.source = source
        self.errors: list[InputError] = []

    def note(self, error: InputError) -> None:
        """Leave a row out; ``error`` names it and says why."""
        self.errors.append(error)

    def tell(self, used: int) -> None:
        """Warn once of what was left out of a file of which ``used`` rows are used.

        Raises:
            InputError: rows were left out and none is used: then the first one's error.
        """
        if not self.errors:
            return
        if not used:
            raise self.errors[0]
        count = len(self.errors)
        named = "; ".join(str(error) for error in self.errors[:NAMED])
        more = f"; and {count - NAMED} more" if count > NAMED else ""
        warnings.warn(
            f"{self.source}: {count} of {used + count} rows left out, since they cannot be used: "
            f"{named}{more}",
            stacklevel=4,
        )


def first_line(error: Exception) -> str:
    """What an error of another library says first, in one line that can be shown; its kind where it
    says nothing.

    Colour codes and control characters go, and a long line is cut. Libraries advise to switch a
    safeguard off; that advice is not passed on.
    """
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it brings code of its own, which is never run here"
    if "weights_only" in text:
        return "its content is damaged, or more than tensors, which is never loaded here"
    line = TERMINAL.sub("", text.partition("\n")[0]).strip()
    return (line if len(line) <= LONGEST else f"{line[:LONGEST]}...") or type(error).__name__


def exit_status(action: Callable[[], object]) -> int:
    """Run what a program does. An `InputError` is printed, not raised: then the status is 2, else
    0.
    """
    try:
        action()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
