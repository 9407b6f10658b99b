"""Checkpoints of a run: whole or not, the newest whole one, and when older ones go."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .files import write_json

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
    """The newest whole checkpoint of a run with these inputs, or None.

    Args:
        processes: how many processes go on from it; each needs a part of its own. None: as many as
            wrote it.
    """
    for path in reversed(checkpoints(folder).values()):
        try:
            marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if marker["digest"] == digest and processes in (None, marker["processes"]):
            return path
    return None


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
            write_json(
                written / MARKER,
                {"digest": self.digest, "step": state.global_step, "processes": args.world_size},
            )
            for path in checkpoints(self.folder).values():
                if path != written:
                    (path / MARKER).unlink(missing_ok=True)
                    shutil.rmtree(path, ignore_errors=True)
