"""What a training run keeps on disk: its events, its checkpoints; and how a run goes on from the
newest whole one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from .base.checkpoints import remove_half_written
from .base.files import write_json_lines
from .profiles import Profile

KEPT = ("profile.yaml", "hostfile", "train.log")


def finished_result(folder: Path, digest: str) -> dict[str, Any] | None:
    """What result.json holds, or None where the run is absent, unfinished, or made from other
    inputs.
    """
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = (
        result.get("digest") == digest and (folder / "adapter" / "adapter_config.json").is_file()
    )
    return result if whole else None


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events that a run has written so far; a line that is still being written is left out."""
    try:
        text = (folder / "events.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_values(folder: Path) -> dict[str, float]:
    """The last logged value of each name; an event holds some of them."""
    values: dict[str, float] = {}
    for event in read_events(folder):
        values |= {name: value for name, value in event.items() if name != "samples"}
    return values


def prepare_folder(folder: Path, checkpoint: Path | None) -> None:
    """Make a run folder ready for its first step, or for the one after ``checkpoint``.

    Without a checkpoint only the profile, the hostfile and the log stay. With one, later events and
    half-written checkpoints go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in KEPT:
                path.unlink()
        return
    remove_half_written(folder)
    step = int(checkpoint.name.rpartition("-")[2])
    write_json_lines(
        folder / "events.jsonl", [event for event in read_events(folder) if event["step"] <= step]
    )


# Keys that the profile has no more, with the value that they had: runs of then are still known.
RETIRED = {"reuse_vision_features": True}
NOT_DECIDING = ("logging_steps", "samples", "save_every", "report_to", "nodes", "hostfile")


FAILED = "=== a training process failed ==="


def run_digest(profile: Profile, variant: str, seed: int, manifest: Path) -> str:
    """SHA-256 (hexadecimal) of all that decides a run: the profile's sections, the one variant, the
    seed, the manifest's bytes.

    What is logged, what is saved on the way, and which machines do the work is left out.
    """
    values = profile.as_dict()
    training = {key: value for key, value in values["training"].items() if key not in NOT_DECIDING}
    deciding = {
        key: values[key] for key in ("seed", "data", "visual_tool", "noise", "lvlm", "relevance")
    }
    training |= RETIRED
    deciding |= {
        "training": training | {"variants": {variant: training["variants"][variant]}},
        "training_seed": seed,
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
