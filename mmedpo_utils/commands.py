"""The command that trains: how many processes, on which cores, on which port, on which nodes."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import socket
import sys
from pathlib import Path

import psutil
import torch

from .base.environment import check_device
from .base.errors import InputError
from .base.files import read_text
from .base.settings import repository_root
from .profiles import Profile

PROGRAM = "mmedpo_utils.programs.train"
LAUNCHER = "deepspeed.launcher.runner"
HOST_LINE = re.compile(r"([A-Za-z0-9][\w.:-]*)\s+slots=(\d+)")


def process_count(profile: Profile, dry_run: bool = False) -> int:
    """How many processes train, over all nodes: the profile's number, one where DeepSpeed is not
    installed.

    On one node there is one process per GPU at most, and the number divides processes x
    accumulation steps, so that the global batch can stay the profile's. A dry run reckons with the
    GPUs that the profile asks for, whether they are here or not.

    Raises:
        InputError: several nodes without DeepSpeed or with too few GPUs here, or no GPU where one
            is asked for.
    """
    values = profile.training
    if importlib.util.find_spec("deepspeed") is None:
        if values.nodes > 1:
            raise InputError(
                "profile key `training.nodes`: several nodes need DeepSpeed; install the extra "
                "`gpu` on Linux"
            )
        return 1
    if dry_run and profile.lvlm.device == "cuda":
        return values.processes
    gpus = (
        torch.cuda.device_count()
        if check_device(profile.lvlm.device) == "cuda"
        else values.processes
    )
    if values.nodes > 1:
        if gpus < values.processes // values.nodes:
            raise InputError(
                f"profile key `training.processes`: {values.processes} on {values.nodes} nodes "
                f"need {values.processes // values.nodes} GPUs on each, and this one has {gpus}"
            )
        return values.processes
    total = values.processes * values.gradient_accumulation_steps
    return next(count for count in range(min(values.processes, gpus), 0, -1) if total % count == 0)


def free_cores(processes: int) -> int:
    """Processor cores that no training on this machine has taken, at least one; ``processes`` will
    share them.

    Each training says with ``--cores`` how many it took. OMP_NUM_THREADS, where it is set, is the
    limit of each process.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    taken: dict[int, int] = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if PROGRAM in words and "--cores" in words[:-1]:
            try:
                group = os.getpgid(process.pid) if hasattr(os, "getpgid") else process.pid
            except ProcessLookupError:
                continue
            taken[group] = int(words[words.index("--cores") + 1])
    left = max(1, cores - sum(taken.values()))
    return min(left, _thread_limit(left) * processes)


def _thread_limit(otherwise: int) -> int:
    """OMP_NUM_THREADS, of a list of them (one a nesting level) the first; ``otherwise`` where it is
    no number.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else otherwise


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


def write_hostfile(profile: Profile, run_folder: Path) -> None:
    """Write a list of nodes in which only their number counts: each node is started by a command of
    its own.
    """
    each = profile.training.processes // profile.training.nodes
    lines = [f"node{number} slots={each}\n" for number in range(profile.training.nodes)]
    (run_folder / "hostfile").write_text("".join(lines), encoding="utf-8")


def commands(
    profile: Profile, variant: str, seed: int, run_folder: Path, ssh: bool, dry_run: bool = False
) -> list[list[str]]:
    """What starts the training: one command, or one per node where the profile has several nodes
    that ``ssh`` does not reach.

    One process is plain Python; more go through the deepspeed launcher on a free port. Paths inside
    the repository are relative to it, so run them there. ``run_folder`` holds the resolved
    profile.yaml. Of several nodes, MASTER_ADDR and MASTER_PORT say where the first is found; else
    it is this machine, and FIRST_NODE in a dry run, which may be made anywhere.

    Raises:
        InputError: as `process_count`, or MASTER_PORT is no port.
    """
    values, processes, folder = (
        profile.training,
        process_count(profile, dry_run),
        shorten(run_folder),
    )
    program = [
        PROGRAM,
        "--profile",
        f"{folder}/profile.yaml",
        "--variant",
        variant,
        "--seed",
        str(seed),
        "--run-folder",
        folder,
        "--cores",
        str(free_cores(processes // values.nodes)),
        "--processes",
        str(processes),
    ]
    if processes == 1:
        return [[sys.executable, "-m", *program]]
    port = ["--master_port", _master_port() if values.nodes > 1 else str(free_port())]
    common = ["--no_local_rank", "--quiet", "--module", *program]
    start = [sys.executable, "-m", LAUNCHER]
    if values.nodes == 1:
        return [[*start, *_devices(processes), *port, "--hostfile", "none", *common]]
    hosts = ["--hostfile", shorten(values.hostfile or run_folder / "hostfile")]
    if ssh:
        return [[*start, *hosts, *port, *common]]
    address = [
        "--master_addr",
        os.environ.get("MASTER_ADDR") or ("FIRST_NODE" if dry_run else socket.gethostname()),
    ]
    return [
        [*start, *hosts, "--no_ssh", "--node_rank", str(rank), *address, *port, *common]
        for rank in range(values.nodes)
    ]


def _master_port() -> str:
    port = os.environ.get("MASTER_PORT", "").strip()
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise InputError(
            "environment variable MASTER_PORT: expected a port from 1 to 65535, found "
            f"{port!r:.40}; correct it, or unset it"
        )
    return port or str(free_port())


def check_hostfile(profile: Profile) -> None:
    """Compare DeepSpeed's list of machines with the profile; the launcher would follow the list,
    whatever it says.

    Raises:
        InputError: the file is not there, a line is none of `NAME slots=NUMBER`, or nodes and slots
            are not the profile's.
    """
    path, training = profile.training.hostfile, profile.training
    if path is None:
        return
    slots: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines()):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host = HOST_LINE.fullmatch(text)  # a name that begins with - would be an option of ssh
        if host is None:
            raise InputError(
                f"{path}: row {number}: expected NAME slots=NUMBER, found {text!r:.60}; correct it"
            )
        slots[host[1]] = int(host[2])
    if len(slots) != training.nodes or sum(slots.values()) != training.processes:
        raise InputError(
            f"{path}: lists {len(slots)} nodes with {sum(slots.values())} slots; expected the "
            f"profile's `training.nodes` ({training.nodes}) and `training.processes` "
            f"({training.processes}): make them the same"
        )


def _devices(processes: int) -> list[str]:
    """The launcher's option for this node; it would pass over CUDA_VISIBLE_DEVICES beside a bare
    number of processes.

    Raises:
        InputError: CUDA_VISIBLE_DEVICES names GPUs by something else than their numbers.
    """
    visible = [
        device.strip()
        for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if device.strip()
    ]
    if not visible or not torch.cuda.is_available():
        return ["--num_accelerators", str(processes)]
    if not all(device.isdecimal() for device in visible):
        raise InputError(
            f"CUDA_VISIBLE_DEVICES is {','.join(visible)!r}: the launcher takes numbers alone; "
            "write the GPUs' numbers, as `nvidia-smi --list-gpus` shows them"
        )
    return ["--include", "localhost:" + ",".join(visible[:processes])]


def printed(arguments: list[str]) -> str:
    """A command as it can be pasted into a terminal."""
    return shlex.join(["python", *arguments[1:]])
