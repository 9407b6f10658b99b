"""Start a training run from a cell or a terminal, follow it, stop it cleanly."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from IPython import get_ipython
from IPython.display import Image, Pretty, display

from .base.environment import check_device
from .base.errors import InputError
from .base.settings import repository_root
from .commands import check_hostfile, commands, printed, process_count, shorten, write_hostfile
from .curate import manifest_path
from .profiles import Profile
from .run_folder import (
    FAILED,
    finished_result,
    newest_checkpoint,
    read_events,
    remove_half_written,
    run_digest,
    run_lock,
)
from .show import plots

REFRESH_SECONDS = 1.5
PATIENCE_SECONDS = 10
PORT_ATTEMPTS = 3
PORT_TAKEN = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)
CAUSES = [  # what a dying process says, and what it means
    (
        r"No space left on device|File too large|Disk quota exceeded|disk is full"
        r"|os error (27|28)|unexpected pos",
        "the disk is full, or a file may not grow further; free some space",
    ),
    (
        r"return code = (-9|247|137)|Connection closed by peer|Connection reset by peer",
        "a process was killed from outside: by a person, or by the system where memory ran out",
    ),
]


class TrainingError(RuntimeError):
    """A training process failed. The message carries its own last lines."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: the run folder: profile.yaml, versions.json, events.jsonl, adapter/, train.log,
            result.json.
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


def train(profile: Profile, variant: str, seed: int = 0, live: bool = True) -> RunResult:
    """Train one variant, go on with it where it was interrupted, or read the finished run; for the
    same inputs each time.

    Args:
        profile: where the pairs are (``output``/pairs), and every value of training.
        variant: a name under ``training.variants``.
        seed: of the LoRA weights and of the order of the pairs.
        live: redraw the curves in the notebook, or print the logged steps in a terminal, while it
            trains.

    An interrupt stops every process and keeps the last checkpoint. Over several nodes that no
    hostfile names, it starts this one as the first and prints the commands of the others.

    Raises:
        InputError: no such variant, no manifest, a package or a GPU that is asked for is missing,
            or another process trains into the same run folder.
        TrainingError: a process failed; the message says why and carries its last lines.
    """
    digest = run_digest(profile, variant, seed, _checked_manifest(profile, variant))
    folder = folder_of(profile, variant, seed)
    found = load_run(folder, digest)
    if found:
        print(f"{shorten(folder)} is finished already, with the same inputs: loaded.")
        return found
    with run_lock(folder, "launch"):
        with run_lock(folder, "train"):
            profile.save(folder / "profile.yaml")
        _say_how_it_begins(profile, folder, digest)
        try:
            returned = _run_commands(profile, variant, seed, folder, live)
            found = load_run(folder, digest)
            if returned or found is None:
                raise TrainingError(_what_happened(folder, digest, returned))
        except KeyboardInterrupt:
            print(
                f"Interrupted. The same cell or command, run again, {_next_time(folder, digest)}."
            )
            raise
        finally:
            remove_half_written(folder)
    seconds = found.result["seconds"]
    print(
        f"{folder.name}: {found.result['last']['step']} steps in {seconds['steps']:.0f} s, "
        f"{seconds['total']:.0f} s in all."
    )
    return RunResult(folder, found.result, found.events, loaded=False)


def folder_of(profile: Profile, variant: str, seed: int) -> Path:
    """The folder of one run."""
    return profile.output / "train" / f"{variant}-seed{seed}"


def _checked_manifest(profile: Profile, variant: str) -> Path:
    check_variant(profile, variant)
    check_device(profile.lvlm.device)
    package, manifest = profile.training.report_to, manifest_path(profile, variant)
    if package != "none" and importlib.util.find_spec(package) is None:
        raise InputError(
            f"profile key `training.report_to`: the package {package} is not installed; run `pip "
            f"install {package}`, or write none"
        )
    if profile.training.hostfile and shutil.which("pdsh") is None:
        raise InputError(
            "profile key `training.hostfile`: the launcher reaches the nodes through pdsh, which "
            "is not installed; install it, or write null: then each node gets a command of its own"
        )
    check_hostfile(profile)
    if not manifest.is_file():
        how = (
            f"run notebook 03 with profile {profile.name}"
            if manifest.stem == "train"
            else f"run mmedpo baselines --profile {profile.name} --build-only"
        )
        raise InputError(f"{shorten(manifest)}: there are no preference pairs yet; {how}")
    return manifest


def check_variant(profile: Profile, variant: str) -> None:
    """Raises InputError: the profile has no such variant."""
    if variant not in profile.training.variants:
        raise InputError(
            f"variant {variant!r}: unknown; profile {profile.name} has "
            f"{', '.join(profile.training.variants)}"
        )


def _say_how_it_begins(profile: Profile, folder: Path, digest: str) -> None:
    processes, values = process_count(profile), profile.training
    checkpoint = newest_checkpoint(folder, digest, processes)
    if checkpoint:
        print(f"{shorten(folder)} goes on from step {checkpoint.name.rpartition('-')[2]}.")
    if processes < values.processes:
        print(
            f"{processes} process trains instead of {values.processes} (DeepSpeed is not "
            "installed, or there are fewer GPUs); the global batch stays the same."
        )
    if values.optimizer == "paged_adamw_8bit" and check_device(profile.lvlm.device) == "cpu":
        print("paged_adamw_8bit needs a GPU: AdamW trains instead.")


def _run_commands(profile: Profile, variant: str, seed: int, folder: Path, live: bool) -> int:
    """Start the training here and follow it to its end; try another port where the chosen one was
    taken meanwhile.
    """
    if profile.training.nodes > 1 and not profile.training.hostfile:
        write_hostfile(profile, folder)
    for _ in range(PORT_ATTEMPTS):
        first, *others = commands(
            profile, variant, seed, folder, ssh=bool(profile.training.hostfile)
        )
        print("$ " + printed(first))
        if others:
            print(
                "This node is the first one. Start on each other node, in the repository's folder:"
            )
            print("\n".join("$ " + printed(other) for other in others))
        with _started(
            first, folder / "train.log", process_count(profile) // profile.training.nodes
        ) as process:
            _follow(process, folder, live)
        if not process.returncode or not PORT_TAKEN.search(_text(folder / "train.log")):
            break
    return process.returncode


def _what_happened(folder: Path, digest: str, returned: int) -> str:
    """One message: what failed, what the same call does next, and the process's own last lines."""
    log = _text(folder / "train.log")
    last = _last_words(log)
    evidence = (
        last
        + "".join(re.findall(r"exits with return code = -\d+", log))
        + f"return code = {returned}"
    )
    cause = next((f": {told}" for pattern, told in CAUSES if re.search(pattern, evidence)), "")
    return (
        f"training of {folder.name} failed (exit code {returned}){cause}. The same cell or "
        f"command, run again, {_next_time(folder, digest)}. Its last lines (all of them: "
        f"{shorten(folder)}/train.log):\n{last}"
    )


def _next_time(folder: Path, digest: str) -> str:
    checkpoint = newest_checkpoint(folder, digest)
    return (
        f"goes on from step {checkpoint.name.rpartition('-')[2]}, whose checkpoint is whole"
        if checkpoint
        else "starts anew"
    )


def load_run(folder: Path, digest: str) -> RunResult | None:
    """The finished run in ``folder``, or None where it is absent, unfinished, or made from other
    inputs.
    """
    result = finished_result(folder, digest)
    return RunResult(folder, result, read_events(folder), loaded=True) if result else None


@contextmanager
def _started(arguments: list[str], log: Path, processes: int) -> Iterator[subprocess.Popen]:
    """Run a command in a process group of its own; whatever happens, none of the group is left at
    the end.
    """
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            arguments,
            cwd=repository_root(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"} | _threads(arguments, processes),
        )
    try:
        yield process
    finally:
        _stop(process)


def _threads(arguments: list[str], processes: int) -> dict[str, str]:
    """OMP_NUM_THREADS that shares the command's cores between its ``processes`` on this node."""
    return {
        "OMP_NUM_THREADS": str(max(1, int(arguments[arguments.index("--cores") + 1]) // processes))
    }


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


def _follow(process: subprocess.Popen, folder: Path, live: bool) -> None:
    """Wait for the process; as events arrive, redraw the curves in a notebook, or print the steps
    in a terminal.
    """
    notebook = live and get_ipython() is not None
    handle = (
        display(Pretty("The processes are starting ..."), display_id=True) if notebook else None
    )
    running, shown = True, len(read_events(folder))
    while running:
        try:
            process.wait(REFRESH_SECONDS)
            running = False
        except subprocess.TimeoutExpired:
            pass
        events = read_events(folder) if live else []
        if len(events) == shown:
            continue
        if handle:
            drawing = io.BytesIO()
            plots.training_curves(events).savefig(
                drawing, format="png", dpi=80, bbox_inches="tight"
            )
            handle.update(
                Image(
                    drawing.getvalue(),
                    alt="Training curves so far: loss, log-probabilities, margin, accuracy",
                )
            )
        else:
            for event in events[shown:]:
                names = ("loss", "validation_loss", "pairs_per_second", "seconds_left")
                values = "  ".join(f"{name} {event[name]:.4g}" for name in names if name in event)
                print(f"step {event['step']}/{event['total_steps']}  {values}", flush=True)
        shown = len(events)


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _last_words(log: str, lines: int = 15) -> str:
    """The end of the first traceback that a process wrote, or the log's last lines where none
    did.
    """
    _, _, told = log.partition(FAILED)
    block = re.split(rf"^\[\d{{4}}-|{re.escape(FAILED)}", told, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join((block or log).strip().splitlines()[-lines:])
