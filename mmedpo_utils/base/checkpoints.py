"""Checkpoints of a run: whole or not, and the newest whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .files import file_sha256

MARKER = "complete.json"


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by step, half-written ones among them, oldest first."""
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in folder.glob("checkpoint-*")
        if path.name[11:].isdigit()
    }
    return dict(sorted(found.items()))


def newest_checkpoint(folder: Path, digest: str, processes: int | None = None) -> Path | None:
    """The newest whole checkpoint of a run with these inputs, or None. Of one that lost a file, or
    has another one than the run wrote, a line says so, and it is passed over.

    Args:
        processes: how many processes go on from it; each needs a part of its own. None: as many as
            wrote it.
    """
    for path in reversed(checkpoints(folder).values()):
        try:
            marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
            fits = marker["digest"] == digest and processes in (None, marker["processes"])
            sums = dict(marker["files"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if not fits:
            continue
        changed = [name for name, wanted in sums.items() if _sum(path / name) != wanted]
        if not changed:
            return path
        print(
            f"{path.name}: {changed[0]} is missing, or not what the run wrote; the run does not go "
            "on from there"
        )
    return None


def _sum(file: Path) -> str | None:
    return file_sha256(file) if file.is_file() else None


def remove_half_written(folder: Path) -> None:
    """Remove the checkpoints that no marker calls whole, so that they take no space."""
    for path in checkpoints(folder).values():
        if not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)
