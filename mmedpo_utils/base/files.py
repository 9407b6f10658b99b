"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError, first_line


@contextmanager
def atomic_write(path: str | os.PathLike, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends, remove it when the
    block fails.

    Args:
        mode: permissions of the finished file; the temporary one is the owner's alone.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free some disk space, or "
            "choose "
            "another folder with the profile's `output`"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: str | os.PathLike) -> None:
    """Remove what ``atomic_write`` left anywhere under ``folder`` when its process was killed."""
    for path in Path(folder).rglob(".*"):
        left = re.fullmatch(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?P<suffix>\.\w+)?", path.name)
        if left and Path(left["name"]).suffix == (left["suffix"] or "") and path.is_file():
            path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any, mode: int = 0o644) -> None:
    """Write ``value`` as JSON (UTF-8, one-space indent), atomically. NaN and infinity are
    refused.
    """
    with atomic_write(path, mode) as temporary:
        temporary.write_text(
            json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )


def write_json_lines(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file. Raises InputError: missing, or in another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read as UTF-8 text ({first_line(error)}); check the path, or save "
            "the file as UTF-8"
        ) from error


def load_json(path: str | os.PathLike, expected: str) -> Any:
    """The value of a JSON file.

    Raises:
        InputError: cannot be read, is not JSON (it says what was ``expected``), or names a key of
            the whole file twice. A key that a row names twice is for `check_fields` to find.
    """
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=json_object)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is not JSON ({first_line(error)}); expected {expected}"
        ) from error
    if isinstance(value, WrittenTwice):
        raise InputError(
            f"{path}: `{value.key}` is written twice; expected each key once: take out the wrong "
            "one"
        )
    return value


class WrittenTwice(dict):
    """An object of a JSON file in which a key is written twice: which of the values was meant,
    nobody knows.
    """

    key = ""


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, marked where a key is written twice."""
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    marked = WrittenTwice(values)
    names = [key for key, _ in pairs]
    marked.key = next(name for name in names if names.count(name) > 1)
    return marked


def read_or_compute(path: str | os.PathLike, inputs: str, compute: Callable[[], object]) -> bool:
    """The one way to ask: is it there already, made from the same inputs?

    Where ``path`` is there and the file beside it (``.sha256``) holds ``inputs``, nothing happens.
    Else ``compute`` is called, which writes ``path``, and ``inputs`` is written beside it last: a
    run that is killed before computes again. Either way one line says what happened.

    Args:
        inputs: identifies all that ``path`` is made of, usually a SHA-256.
        compute: writes ``path``, whole or not at all, and whatever belongs to it.

    Returns:
        whether it was computed.
    """
    path = Path(path)
    stamp = path.with_suffix(".sha256")
    if path.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == inputs:
        print(f"{path.name}: read, made earlier from the same inputs")
        return False
    stamp.unlink(missing_ok=True)
    compute()
    with atomic_write(stamp) as temporary:
        temporary.write_text(inputs + "\n", encoding="utf-8")
    print(f"{path.name}: computed")
    return True
