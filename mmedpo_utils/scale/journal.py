"""An append-only journal of a long run: JSON lines, on disk before the run goes on, whole again
after a kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..base.errors import cannot_write
from ..base.files import refuse_link


class Journal:
    """Entries of one run, in order. The first line of the file says which inputs the run has.

    Attributes:
        entries: what was written so far, by this process or earlier ones with the same inputs.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        digest: str,
        keep: Callable[[int, Any], bool] = lambda number, entry: True,
    ) -> None:
        """Read what is there. A torn last line is dropped, and all of it where the inputs are not
        those of ``digest``.

        Args:
            keep: whether the entry of a number, from 0, still holds; from the first one that
                doesn't on, all are dropped.

        Raises:
            InputError: the file cannot be read or written, or is a link to somewhere else.
        """
        self.path = Path(path)
        refuse_link(self.path)
        self.entries: list[Any] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            length = self._read({"inputs": digest}, keep)
            with open(self.path, "ab") as stream:
                stream.truncate(length)
            if not length:
                self._write({"inputs": digest})
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def append(self, entry: Any) -> None:
        """Write an entry; it is on disk when the call returns. Raises InputError: it cannot be
        written.
        """
        try:
            self._write(entry)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.entries.append(entry)

    def _read(self, head: dict[str, str], keep: Callable[[int, Any], bool]) -> int:
        """Fill ``entries``, and return how many bytes of the file hold."""
        if not self.path.is_file():
            return 0
        length = 0
        with open(self.path, "rb") as stream:
            for line in stream:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    entry = None
                if entry is None:
                    break
                if not (keep(len(self.entries), entry) if length else entry == head):
                    break
                if length:
                    self.entries.append(entry)
                length += len(line)
        return length

    def _write(self, entry: Any) -> None:
        with open(self.path, "ab") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
