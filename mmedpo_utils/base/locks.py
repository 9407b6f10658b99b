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
    file = lock_file(folder, kind)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            f"{folder}: {holder(folder, kind) or 'another process'} trains into this folder now; "
            "wait until it ends, stop it, or take another seed or another `output`"
        ) from error
    except OSError as error:  # a Timeout is one too
        raise cannot_write(folder, error) from error
    try:
        _sign(folder, kind)
        yield
    finally:
        lock.release()


@contextmanager
def turn(target: Path) -> Iterator[None]:
    """Hold the lock of what is computed into ``target``; where another process computes it now,
    wait for it and say so. The lock's file goes with the lock.

    Raises:
        InputError: the folder cannot be written to.
    """
    file = lock_file(target, "compute")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _waited_for(target, file)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        _sign(target, "compute")
        yield
    finally:
        if HAS_LOCKS:
            file.unlink(missing_ok=True)  # while it is held: see `is_still`
        os.close(handle)


def _waited_for(target: Path, file: Path) -> int:
    """The handle of a lock file that is held."""
    told = False
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        if not locked(handle) and not told:
            other = holder(target, "compute") or "another process"
            print(f"{target.name}: {other} computes it now; waiting for it", flush=True)
            told = True
        if locked(handle, wait=True) and is_still(file, handle):
            return handle
        os.close(handle)


NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# Windows has no lock of this kind, and neither moves nor removes a file that is open.
HAS_LOCKS = os.name != "nt"


def locked(handle: int, wait: bool = False) -> bool:
    """Take the lock of an open file, or say that somebody has it. The system frees it when the
    process dies.
    """
    if not HAS_LOCKS:
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_still(path: Path, handle: int) -> bool:
    """Whether ``path`` still names the open file: who had its lock before may have removed it, or
    moved it away.
    """
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _sign(target: Path, kind: str) -> None:
    """Write down who holds a lock. Raises InputError: the disk is full."""
    text = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        lock_file(target, kind).write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(target, error) from error
