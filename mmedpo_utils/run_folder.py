"""What a training run keeps on disk: its events, its checkpoints; and how a run goes on from the
newest whole one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from .base.checkpoints import checkpoints, remove_half_written
from .base.files import file_sha256, remove_temporaries, write_json_lines
from .profiles import Profile

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What a run writes, beside its checkpoints; training anew removes these, and nothing else.
WRITTEN = ("events.jsonl", "result.json", "versions.json", "adapter", ".adapter", "tensorboard")


def finished_result(folder: Path, digest: str) -> dict[str, Any] | None:
    """What result.json holds, or None where the run is absent, unfinished, or made from other
    inputs. Of a run whose adapter has gone or is another one, a line says so.
    """
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if result["digest"] != digest:
            return None
        # Earlier runs have noted no sums.
        sums = {**dict.fromkeys(ADAPTER_FILES), **result.get("files", {})}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    for name, wanted in sums.items():
        file = folder / "adapter" / name
        if not file.is_file() or (wanted and file_sha256(file) != wanted):
            print(f"{file.parent}: {name} is missing, or not what the run wrote; it is made anew")
            return None
    return result


def adapter_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that make a run's adapter."""
    return {name: file_sha256(folder / "adapter" / name) for name in ADAPTER_FILES}


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events that a run has written so far; a line that is still being written, or is damaged,
    is left out.
    """
    try:
        text = (folder / "events.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    events = []
    for line in text.split("\n")[:-1]:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
    return events


def last_values(folder: Path) -> dict[str, float]:
    """The last logged value of each name; an event holds some of them."""
    values: dict[str, float] = {}
    for event in read_events(folder):
        values |= {name: value for name, value in event.items() if name != "samples"}
    return values


def prepare_folder(folder: Path, checkpoint: Path | None) -> None:
    """Make a run folder ready for its first step, or for the one after ``checkpoint``.

    Without a checkpoint all that an earlier run has left goes, but for the profile, the hostfile
    and the log; with one, later events and half-written checkpoints. A reader's own files stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    if checkpoint is None:
        left = [folder / name for name in WRITTEN]
        for path in [*left, *checkpoints(folder).values()]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
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


def manifest_path(profile: Profile, variant: str) -> Path:
    """The preference manifest that ``variant`` trains on; notebook 03 writes train.json."""
    return profile.output / "pairs" / f"{profile.training.variants[variant].pairs}.json"


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
