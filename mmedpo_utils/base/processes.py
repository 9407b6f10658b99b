"""A program in a process group of its own: started, stopped with all that it started, and asked why
it died.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from .settings import repository_root

PATIENCE_SECONDS = 10
CAUSES = [  # what a dying process says, and what it means
    (
        r"No space left on device|File too large|Disk quota exceeded|disk is full"
        r"|os error (27|28)|unexpected pos",
        "the disk is full, or a file may not grow further; free some space",
    ),
    (
        r"\[Errno (13|30)\]|os error (13|30)\b",
        "a folder cannot be written to; set the profile's `output`, or the environment variable "
        "MMEDPO_OUTPUT, to one that can",
    ),
    (
        r"Weights only load failed",
        "the checkpoint is damaged, or holds more than data, which is never loaded here; remove "
        "the run's folders checkpoint-*, and it starts anew",
    ),
    (
        r"return code = (-9|247|137)|Connection closed by peer|Connection reset by peer",
        "a process was killed from outside: by a person, or by the system where memory ran out",
    ),
]


@contextmanager
def started(arguments: list[str], log: Path, threads: int) -> Iterator[subprocess.Popen]:
    """Run a command in a process group of its own; whatever happens, none of the group is left at
    the end.

    Args:
        log: receives what it prints.
        threads: OMP_NUM_THREADS of each process.
    """
    environment = {
        **os.environ,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            arguments,
            cwd=repository_root(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """Ask the whole group to end, then end it; return when none of it runs."""
    if os.name == "nt":
        process.kill()
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):  # nobody is left in the group
            return
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            process.poll()
            if not _runs(process.pid):
                return
            time.sleep(0.05)


def _runs(group: int) -> bool:
    """Whether a process of the group still runs; one that has ended and waits to be collected does
    not.
    """
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False


def log_text(log: Path) -> str:
    """What a program has printed so far."""
    return log.read_text(encoding="utf-8", errors="replace")


def last_words(log: str, mark: str, lines: int = 15) -> str:
    """The end of the first traceback that a process wrote after ``mark``, or the log's last lines
    where none did.
    """
    _, _, told = log.partition(mark)
    # It ends where a launcher's own lines begin, or another process's traceback.
    block = re.split(rf"^\[\d{{4}}-|{re.escape(mark)}", told, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join((block or log).strip().splitlines()[-lines:])


def cause_of_death(evidence: str) -> str:
    """What a program's last words and exit codes mean; empty where they say nothing known."""
    for pattern, meaning in CAUSES:
        if re.search(pattern, evidence):
            return meaning
    return ""


def free_port() -> int:
    """A port of this machine that nobody listens on now; another process may take it before it is
    used.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shorten(path: Path) -> str:
    """``path`` relative to the repository where it lies inside."""
    root = repository_root()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def printed(arguments: list[str]) -> str:
    """A command as it can be pasted into a terminal."""
    return shlex.join(["python", *arguments[1:]])
