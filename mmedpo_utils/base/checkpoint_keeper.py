"""When a checkpoint is whole, and when older ones go. Apart from `checkpoints`, which what starts a
training needs: transformers takes ten seconds to import.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .checkpoints import MARKER, checkpoints
from .files import file_sha256, write_json


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
