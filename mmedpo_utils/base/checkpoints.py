"""Checkpoints of a run: whole or not, the newest whole one, and when older ones go."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .files import file_sha256, write_json

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
        except (OSError, ValueError, KeyError, TypeError):
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


def _flush(folder: Path) -> None:
    """Wait until every file under ``folder`` is on the disk. Raises OSError: the disk is full."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as stream:
                os.fsync(stream.fileno())


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, by its path in there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


class CheckpointKeeper(TrainerCallback):
    """Call a checkpoint whole once every process has written its part, and only then remove the
    older ones.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.digest = digest

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Log at each checkpoint, so that no logged mean spans one. The last step needs none: the
        adapter follows it.
        """
        control.should_save = control.should_save and state.global_step < state.max_steps
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Mark the checkpoint that was just written."""
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            written = checkpoints(self.folder)[state.global_step]
            _flush(written)
            marker = {"digest": self.digest, "step": state.global_step}
            marker |= {"processes": args.world_size, "files": _sums(written)}
            write_json(written / MARKER, marker)
            for path in checkpoints(self.folder).values():
                if path != written:
                    (path / MARKER).unlink(missing_ok=True)
                    shutil.rmtree(path, ignore_errors=True)
