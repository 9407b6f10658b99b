"""One writer at a time. The system frees a lock when its process dies, whatever way."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InputError, cannot_write


def lock_file(target: Path, kind: str) -> Path:
    """Where the lock ``kind`` of a file or folder lies: hidden, beside it."""
    return target.with_name(f".{target.name}.{kind}.lock")


def holder(target: Path, kind: str) -> str:
    """Who took a lock last, in words; empty where nobody did."""
    file = lock_file(target, kind)
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


@contextmanager
def run_lock(folder: Path, kind: str) -> Iterator[None]:
    """Hold the lock ``kind`` of a run folder (``train``: its rank 0; ``launch``: the cell that
    started it).

    Raises:
        InputError: another process holds it.
    """
    lock = _opened(folder, kind)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            f"{folder}: {holder(folder, kind) or 'another process'} trains into this folder now; "
            "wait until it ends, stop it, or take another seed or another `output`"
        ) from error
    try:
        _sign(folder, kind)
        yield
    finally:
        lock.release()


@contextmanager
def turn(target: Path) -> Iterator[None]:
    """Hold the lock of what is computed into ``target``; where another process computes it now,
    wait for it and say so.
    """
    lock = _opened(target, "compute")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        other = holder(target, "compute") or "another process"
        print(f"{target.name}: {other} computes it now; waiting for it", flush=True)
        lock.acquire()
    try:
        _sign(target, "compute")
        yield
    finally:
        lock.release()


def _opened(target: Path, kind: str) -> FileLock:
    """The lock, not yet held. Raises InputError: its folder cannot be written to."""
    file = lock_file(target, kind)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise cannot_write(target, error) from error
    return FileLock(file)


def _sign(target: Path, kind: str) -> None:
    text = f"process {os.getpid()} on {socket.gethostname()}"
    lock_file(target, kind).write_text(text, encoding="utf-8")
