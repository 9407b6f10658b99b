"""Start a training run from a cell, follow it, and stop it cleanly."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from IPython import get_ipython
from IPython.display import Image, Pretty, display

from . import plots
from .errors import InputError
from .profiles import Profile, check_device
from .schema import repository_root
from .train import FAILED, manifest_path, run_digest

REFRESH_SECONDS = 1.5
PATIENCE_SECONDS = 10


class TrainingError(RuntimeError):
    """A training process failed. The message carries its own last lines."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: the run folder: profile.yaml, versions.json, events.jsonl, adapter/, train.log, result.json.
        result: what result.json holds: the last values, seconds, number of pairs.
        events: one dict per logged step, as `plots.training_curves` takes them.
        loaded: whether an earlier run with the same inputs was read instead of training.
    """

    folder: Path
    result: dict[str, Any]
    events: list[dict[str, Any]]
    loaded: bool

    @property
    def adapter(self) -> Path:
        """The PEFT adapter folder, for `lvlm.load_lvlm`."""
        return self.folder / "adapter"


def process_count(profile: Profile) -> int:
    """How many processes train: the profile's number, one per GPU at most, and one where DeepSpeed is not installed.

    The number divides processes x accumulation steps, so that the global batch can stay the profile's.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return 1
    cuda = check_device(profile.lvlm.device) == "cuda"
    most = min(profile.training.processes, torch.cuda.device_count()) if cuda else profile.training.processes
    total = profile.training.processes * profile.training.gradient_accumulation_steps
    return next(count for count in range(most, 0, -1) if total % count == 0)


def command(profile: Profile, variant: str, seed: int, run_folder: Path) -> list[str]:
    """The command that trains: the deepspeed launcher on a free port, or plain Python where one process is enough.

    Paths inside the repository are relative to it, so run it there. ``run_folder`` holds the resolved profile.yaml.
    """
    processes, folder = process_count(profile), _short(run_folder)
    program = ["mmedpo_utils.train", "--profile", f"{folder}/profile.yaml", "--variant", variant, "--seed", str(seed),
               "--run-folder", folder]
    if processes == 1:
        return [sys.executable, "-m", *program]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes), "--master_port", str(port),
            "--hostfile", "none", "--no_local_rank", "--quiet", "--module", *program]


def train(profile: Profile, variant: str, seed: int = 0, live: bool = True) -> RunResult:
    """Train one variant, or read the finished run where all its inputs are the same.

    Args:
        profile: where the pairs are (``output``/pairs/train.json), and every value of training.
        variant: a name under ``training.variants``.
        seed: of the LoRA weights and of the order of the pairs.
        live: redraw the curves in the notebook while it trains.

    An interrupt stops every process. A half-finished run folder is removed and trained again.

    Raises:
        InputError: no such variant, no manifest, or a GPU is asked for where there is none.
        TrainingError: a process failed; the message carries its last lines.
    """
    digest = run_digest(profile, variant, seed, _checked_manifest(profile, variant))
    folder = profile.output / "train" / f"{variant}-seed{seed}"
    found = load_run(folder, digest)
    if found:
        print(f"{_short(folder)} is finished already, with the same inputs: loaded.")
        return found
    if folder.exists():
        shutil.rmtree(folder)
    profile.save(folder / "profile.yaml")
    arguments = command(profile, variant, seed, folder)
    if process_count(profile) < profile.training.processes:
        print(f"{process_count(profile)} process trains instead of {profile.training.processes} (DeepSpeed is not installed, or "
              "there are fewer GPUs); the global batch stays the same.")
    print("$ " + shlex.join(["python", *arguments[1:]]))
    with _started(arguments, folder / "train.log") as process:
        _follow(process, folder, live)
    found = load_run(folder, digest)
    if process.returncode or found is None:
        raise TrainingError(f"training of {folder.name} failed (exit code {process.returncode}); its last lines "
                            f"(all of them: {_short(folder)}/train.log):\n{_last_words(folder / 'train.log')}")
    seconds = found.result["seconds"]
    print(f"{folder.name}: {found.result['last']['step']} steps in {seconds['steps']:.0f} s, {seconds['total']:.0f} s in all.")
    return RunResult(folder, found.result, found.events, loaded=False)


def _checked_manifest(profile: Profile, variant: str) -> Path:
    if variant not in profile.training.variants:
        raise InputError(f"variant {variant!r}: unknown; profile {profile.name} has {', '.join(profile.training.variants)}")
    check_device(profile.lvlm.device)
    manifest = manifest_path(profile, variant)
    if not manifest.is_file():
        raise InputError(f"{_short(manifest)}: there are no preference pairs yet; run notebook 03 with profile {profile.name}")
    return manifest


def load_run(folder: Path, digest: str) -> RunResult | None:
    """The finished run in ``folder``, or None where it is absent, unfinished, or made from other inputs."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if result.get("digest") != digest or not (folder / "adapter" / "adapter_config.json").is_file():
        return None
    return RunResult(folder, result, read_events(folder), loaded=True)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events that a run has written so far; a line that is still being written is left out."""
    try:
        text = (folder / "events.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _short(path: Path) -> str:
    """``path`` relative to the repository where it lies inside."""
    root = repository_root()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


@contextmanager
def _started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a command in a process group of its own; whatever happens, none of the group is left at the end."""
    with open(log, "wb") as stream:
        process = subprocess.Popen(arguments, cwd=repository_root(), stdout=stream, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True,
                                   env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"})
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
    """Whether a process of the group still runs; one that has ended and waits to be collected does not."""
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False


def _follow(process: subprocess.Popen, folder: Path, live: bool) -> None:
    """Wait for the process; in a notebook, redraw the curves as events arrive."""
    handle = display(Pretty("The processes are starting ..."), display_id=True) if live and get_ipython() else None
    running, drawn = True, 0
    while running:
        try:
            process.wait(REFRESH_SECONDS)
            running = False
        except subprocess.TimeoutExpired:
            pass
        events = read_events(folder) if handle else []
        if len(events) > drawn:
            drawing, drawn = io.BytesIO(), len(events)
            plots.training_curves(events).savefig(drawing, format="png", dpi=80, bbox_inches="tight")
            handle.update(Image(drawing.getvalue(), alt="Training curves so far: loss, log-probabilities, margin, accuracy"))


def _last_words(log: Path, lines: int = 15) -> str:
    """The end of the first traceback that a process wrote, or the log's last lines where none did."""
    text = log.read_text(encoding="utf-8", errors="replace")
    _, _, told = text.partition(FAILED)
    block = re.split(rf"^\[\d{{4}}-|{re.escape(FAILED)}", told, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join((block or text).strip().splitlines()[-lines:])
