"""The one exception that bad input raises, and how a program ends with it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable

# What a terminal takes for a command: colours and cursor, titles and links, shorter ones.
TERMINAL = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.")
LONGEST = 300
NAMED = 5  # rows that a warning names one by one


class ToldInFull:
    """An error whose message says all: a notebook shows it alone, without the lines of this package
    that led to it (``%debug`` still walks them).
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class Interrupted(ToldInFull, KeyboardInterrupt):
    """The reader has stopped what ran. The message says what the same call does next."""


class InputError(ToldInFull, ValueError):
    """Something the reader gave us cannot be used.

    The message names the file, the row and the field, says what was expected and what to do.
    """


class Unusable:
    """The rows of one file that cannot be used: left out, counted, and named in one warning.

    Args:
        source: the file.
        private: name rows by number and field alone, without ids and values: for credentialed data.
    """

    def __init__(self, source: object, private: bool = False) -> None:
        self.source = source
        self.private = private
        self.count = 0
        self.named: list[str] = []

    def note(self, error: InputError) -> None:
        """Leave a row out; ``error`` names it and says why.

        Its text alone is kept, and of the first few: the error itself holds on to all that was
        read, and a data set that is here in part lacks some hundred thousand images.
        """
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(self._without_values(str(error)) if self.private else str(error))

    def _without_values(self, text: str) -> str:
        """Of an error about a row: file, row number and field."""
        place = re.search(r"row \d+", text.removeprefix(f"{self.source}: "))
        field = re.search(r"`\w+`", text)
        known = [found[0] for found in (place, field) if found]
        return ": ".join([str(self.source), *known, "cannot be used (credentialed: not shown)"])

    def tell(self, used: int) -> None:
        """Warn once of what was left out of a file of which ``used`` rows are used.

        Raises:
            InputError: rows were left out and none is used: then the first one's error.
        """
        if not self.count:
            return
        if not used:
            raise InputError(self.named[0])
        named = "; ".join(self.named)
        more = f"; and {self.count - NAMED} more" if self.count > NAMED else ""
        warnings.warn(
            f"{self.source}: {self.count} of {used + self.count} rows left out, since they cannot "
            f"be used: {named}{more}",
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
    line = one_line(text.partition("\n")[0])
    if isinstance(error, KeyError) and line:  # it says the key alone
        return f"KeyError: {line}"
    return line or type(error).__name__


def cannot_write(path: object, error: OSError) -> InputError:
    """What is said of a file or folder that cannot be written."""
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); free some disk space, or choose "
        "another folder with the profile's `output` or the environment variable MMEDPO_OUTPUT"
    )


def one_line(text: str) -> str:
    """A foreign text for a message of ours: one line, cut, with nothing that steers a terminal."""
    text = TERMINAL.sub("", text)
    letters = [letter if letter.isprintable() else " " for letter in text]
    text = " ".join("".join(letters).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


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
