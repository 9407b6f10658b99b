"""Start a training run from a cell or a terminal, follow it, stop it cleanly."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from IPython import get_ipython
from IPython.display import Pretty, display

from .base.checkpoints import newest_checkpoint, remove_half_written
from .base.doors import open_door
from .base.environment import check_device
from .base.errors import InputError, Interrupted, ToldInFull
from .base.locks import run_lock
from .base.processes import cause_of_death, last_words, log_text, printed, shorten, started
from .launch_command import launch_command, process_count
from .profiles import Profile
from .run_folder import FAILED, finished_result, manifest_path, read_events, run_digest
from .show import plots
from .show.figures import ShownFigure

REFRESH_SECONDS = 1.5
PORT_ATTEMPTS = 3
PORT_TAKEN = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)


class TrainingError(ToldInFull, RuntimeError):
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

    Over several nodes that no hostfile names, it starts this one as the first and prints the
    commands of the others.

    Raises:
        Interrupted: the reader stopped it; every process is stopped, the last checkpoint is kept.
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
            next_time = _next_time(folder, digest)
            raise Interrupted(f"The same cell or command, run again, {next_time}.") from None
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
    package = profile.training.report_to
    manifest = manifest_path(profile, variant)
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
    if profile.training.hostfile:
        open_door("hostfile")(profile)
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
    values = profile.training
    processes = process_count(profile)
    checkpoint = newest_checkpoint(folder, digest, processes)
    if checkpoint:
        print(f"{shorten(folder)} goes on from step {checkpoint.name.rpartition('-')[2]}.")
    if processes < values.processes:
        print(
            f"{processes} process trains instead of {values.processes} (DeepSpeed is not "
            "installed, or there are fewer GPUs or cores); the global batch stays the same."
        )
    if values.optimizer == "paged_adamw_8bit" and check_device(profile.lvlm.device) == "cpu":
        print("paged_adamw_8bit needs a GPU: AdamW trains instead.")


def _commands(profile: Profile, variant: str, seed: int, folder: Path) -> list[list[str]]:
    """What starts the training: one command here, or several over nodes."""
    if profile.training.nodes == 1:
        return [launch_command(profile, variant, seed, folder)]
    ssh = profile.training.hostfile is not None
    return open_door("several nodes")(profile, variant, seed, folder, ssh)


def _run_commands(profile: Profile, variant: str, seed: int, folder: Path, live: bool) -> int:
    """Start the training here and follow it to its end. Returns its exit code.

    A port that was free may be taken a moment later: then another one is tried.
    """
    log = folder / "train.log"
    each = process_count(profile) // profile.training.nodes
    returned = 1
    for _ in range(PORT_ATTEMPTS):
        first, *others = _commands(profile, variant, seed, folder)
        print("$ " + printed(first))
        if others:
            print(
                "This node is the first one. Start on each other node, in the repository's folder:"
            )
            print("\n".join("$ " + printed(other) for other in others))
        cores = int(first[first.index("--cores") + 1])
        with started(first, log, threads=max(1, cores // each)) as process:
            _follow(process, folder, live)
        returned = process.returncode
        if returned == 0 or not PORT_TAKEN.search(log_text(log)):
            break
    return returned


def _what_happened(folder: Path, digest: str, returned: int) -> str:
    """One message: what failed, what the same call does next, and the process's own last lines."""
    log = log_text(folder / "train.log")
    last = last_words(log, FAILED)
    codes = "".join(re.findall(r"exits with return code = -\d+", log))
    cause = cause_of_death(f"{last}{codes}return code = {returned}")
    return (
        f"training of {folder.name} failed (exit code {returned})"
        f"{f': {cause}' if cause else ''}. The same cell or command, run again, "
        f"{_next_time(folder, digest)}. Its last lines (all of them: "
        f"{shorten(folder)}/train.log):\n{last}"
    )


def _next_time(folder: Path, digest: str) -> str:
    checkpoint = newest_checkpoint(folder, digest)
    if checkpoint is None:
        return "starts anew"
    return f"goes on from step {checkpoint.name.rpartition('-')[2]}, whose checkpoint is whole"


def load_run(folder: Path, digest: str) -> RunResult | None:
    """The finished run in ``folder``, or None where it is absent, unfinished, or made from other
    inputs.
    """
    result = finished_result(folder, digest)
    return RunResult(folder, result, read_events(folder), loaded=True) if result else None


def _follow(process: subprocess.Popen, folder: Path, live: bool) -> None:
    """Wait for the process; as events arrive, redraw the curves in a notebook, or print the steps
    in a terminal.
    """
    handle = None
    if live and get_ipython() is not None:
        handle = display(Pretty("The processes are starting ..."), display_id=True)
    running = True
    # A run that goes on shows its earlier steps at once; a terminal has printed them.
    shown = 0 if handle else len(read_events(folder))
    while running:
        try:
            process.wait(REFRESH_SECONDS)
            running = False
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:
            if handle and shown:
                handle.update(_curves(read_events(folder), stopped=True))
            raise
        events = read_events(folder) if live else []
        if len(events) == shown:
            continue
        if handle:
            handle.update(_curves(events))
        else:
            for event in events[shown:]:
                print(_progress(event), flush=True)
        shown = len(events)


def _curves(events: list[dict[str, Any]], stopped: bool = False) -> ShownFigure:
    alt = "Training curves so far: loss, log-probabilities, margin, accuracy"
    return ShownFigure(plots.training_curves(events, stopped), alt, dpi=80)


def _progress(event: dict[str, Any]) -> str:
    values = []
    for name in ("loss", "validation_loss", "pairs_per_second", "seconds_left"):
        if name in event:
            values.append(f"{name} {event[name]:.4g}")
    return f"step {event['step']}/{event['total_steps']}  {'  '.join(values)}"
