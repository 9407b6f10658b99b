"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError, cannot_write, first_line
from .locks import HAS_LOCKS, NO_LINK, is_still, locked, turn


@contextmanager
def atomic_write(path: str | os.PathLike, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends, remove it when the
    block fails. What a process leaves that is killed, the next one to write the file takes over.

    Args:
        mode: permissions of the file, before the reader's umask takes its part away.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, handle = _reserved(path, mode)
        allowed = os.fstat(handle).st_mode & 0o777
        if not HAS_LOCKS:
            os.close(handle)
        try:
            yield temporary
            os.chmod(temporary, allowed)  # safetensors gives its files a mode of its own
            os.replace(temporary, path)
        finally:
            if HAS_LOCKS:
                os.close(handle)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


OURS = ".mmedpo"  # in the name of a temporary file of ours, and of no file of a reader


def _reserved(path: Path, mode: int) -> tuple[Path, int]:
    """An empty temporary file beside ``path`` that nobody else writes, and its open handle."""
    temporary = path.with_name(f".{path.name}{OURS}{path.suffix}")
    while True:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | NO_LINK, mode)
        if locked(handle) and is_still(temporary, handle):
            os.ftruncate(handle, 0)  # a process that was killed may have left half of it
            return temporary, handle
        os.close(handle)
        # Another process or thread writes the same file now.
        temporary = path.with_name(f".{path.name}{OURS}-{secrets.token_hex(4)}{path.suffix}")


def remove_temporaries(folder: str | os.PathLike) -> None:
    """Remove what ``atomic_write`` left anywhere under ``folder`` when its process was killed."""
    for path in Path(folder).rglob(f".*{OURS}*"):
        left = re.fullmatch(rf"\.(.+?){OURS}(-[0-9a-f]{{8}})?(\.\w+)?", path.name)
        if left and Path(left[1]).suffix == (left[3] or "") and path.is_file():
            path.unlink(missing_ok=True)


def refuse_link(path: Path) -> None:
    """Raises InputError: ``path`` is a link, so that writing there would write somewhere else."""
    if path.is_symlink():
        raise InputError(
            f"{path}: is a link, and what is written here stays here; remove the link, or set the "
            "profile's `output` to the folder that is meant"
        )


def write_json(path: str | os.PathLike, value: Any, mode: int = 0o666) -> None:
    """Write ``value`` as JSON (UTF-8, one-space indent), atomically. NaN and infinity are
    refused.
    """
    with atomic_write(path, mode) as temporary:
        temporary.write_text(
            json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )


def write_sealed(path: str | os.PathLike, values: dict[str, Any]) -> None:
    """Write ``values`` as JSON with their SHA-256, so that `read_sealed` knows them again."""
    write_json(path, {"sha256": _seal(values), "values": values})


def read_sealed(path: str | os.PathLike) -> dict[str, Any] | None:
    """What `write_sealed` has written; None where the file is missing, damaged or changed."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        values = stored["values"]
        return values if stored["sha256"] == _seal(values) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _seal(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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


def load_object(path: str | os.PathLike, expected: str) -> dict[str, Any]:
    """The keys and values of a JSON file. Raises InputError: as `load_json`, or it holds something
    else.
    """
    value = load_json(path, expected)
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: expected {expected}, as keys and values, found {type(value).__name__}; fetch "
            "the file again"
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


def read_or_compute(
    path: str | os.PathLike,
    inputs: str,
    compute: Callable[[], object],
    parts: Sequence[Path] = (),
    whole: Callable[[], bool] = lambda: True,
) -> bool:
    """The one way to ask: is it there already, made from the same inputs?

    Where the file beside ``path`` (``.sha256``) holds ``inputs``, and ``path`` and its parts are
    what was written then, nothing happens. Else ``compute`` is called, which writes them, and the
    sums are written last: a run that is killed before computes again. Either way one line says what
    happened. Of two processes, the second waits for the first, and reads.

    A file that was not written here, or was changed since, is kept under another name (``.kept``).

    Args:
        inputs: identifies all that ``path`` is made of, usually a SHA-256; one line.
        compute: writes ``path`` and ``parts``, whole or not at all, and whatever belongs to them.
        parts: other files, in the same folder, without which ``path`` is not whole.
        whole: whether what else belongs to it is there; asked once the files are.

    Returns:
        whether it was computed.
    """
    path = Path(path)
    files = [path, *parts]
    if not (_as_written(path, inputs, files) and whole()):
        with turn(path):
            if not (_as_written(path, inputs, files) and whole()):
                _compute(path, inputs, compute, files)
                return True
    print(f"{path.name}: read, made earlier from the same inputs")
    return False


def _compute(path: Path, inputs: str, compute: Callable[[], object], files: Sequence[Path]) -> None:
    kept = [pair for file in files for pair in _kept(file, _sums(path).get(file.name))]
    path.with_suffix(SUMS).unlink(missing_ok=True)
    try:
        compute()
    except BaseException:
        for file, aside in kept:
            if not file.exists():
                os.replace(aside, file)
        raise
    listed = [f"{file_sha256(file)}  {file.name}\n" for file in files]
    with atomic_write(path.with_suffix(SUMS)) as temporary:
        temporary.write_text(f"{inputs}\n{''.join(listed)}", encoding="utf-8")
    for file, aside in kept:
        if file.read_bytes() == aside.read_bytes():  # of a run that was killed before its sums
            aside.unlink()
        else:
            print(f"{file.name}: was not written here, or changed since; kept as {aside.name}")
    print(f"{path.name}: computed")


SUMS = ".sha256"


def _sums(path: Path) -> dict[str, str]:
    """SHA-256 of each file that was written with ``path``, by name; empty where nobody knows."""
    try:
        _, *lines = path.with_suffix(SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _as_written(path: Path, inputs: str, files: Sequence[Path]) -> bool:
    """Whether the files are those that were made from these inputs."""
    sums = _sums(path)
    if sums.keys() != {file.name for file in files}:
        return False
    first = path.with_suffix(SUMS).read_text(encoding="utf-8").partition("\n")[0]
    here = all(file.is_file() for file in files)
    return first == inputs and here and all(file_sha256(file) == sums[file.name] for file in files)


def _kept(file: Path, written: str | None) -> list[tuple[Path, Path]]:
    """Move a file aside that is not what was ``written``; it and its new name, where there is
    one.
    """
    if not file.is_file() or file_sha256(file) == written:
        return []
    aside = file.with_name(f"{file.name}.kept")
    number = 1
    while aside.exists():
        number += 1
        aside = file.with_name(f"{file.name}.kept{number}")
    os.replace(file, aside)
    return [(file, aside)]


def file_sha256(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
