"""The command that trains: how many processes, on which cores and port of this machine."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

from .base.environment import check_device, cores_for
from .base.errors import InputError
from .base.processes import free_port, shorten
from .profiles import Profile

PROGRAM = "mmedpo_utils.programs.train"
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]
LAUNCHED = ["--no_local_rank", "--quiet", "--module"]  # the launcher's last options


def process_count(profile: Profile, dry_run: bool = False) -> int:
    """How many processes train, over all nodes: the profile's number, one where DeepSpeed is not
    installed.

    On one node there is one process per GPU at most, or per core, and the number divides processes
    x accumulation steps, so that the global batch can stay the profile's. A dry run counts with the
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
    on_gpus = check_device(profile.lvlm.device) == "cuda"
    gpus = torch.cuda.device_count() if on_gpus else values.processes
    if values.nodes > 1:
        if gpus < values.processes // values.nodes:
            raise InputError(
                f"profile key `training.processes`: {values.processes} on {values.nodes} nodes "
                f"need {values.processes // values.nodes} GPUs on each, and this one has {gpus}"
            )
        return values.processes
    total = values.processes * values.gradient_accumulation_steps
    # Two on any CPU: it is how the notebooks show that processes share a batch.
    room = gpus if on_gpus else max(2, os.cpu_count() or 1)
    return next(count for count in range(min(values.processes, room), 0, -1) if total % count == 0)


def launch_command(
    profile: Profile, variant: str, seed: int, run_folder: Path, dry_run: bool = False
) -> list[str]:
    """What starts a training on this machine alone.

    One process is plain Python; more go through the deepspeed launcher on a free port. Paths inside
    the repository are relative to it, so run it there. ``run_folder`` holds the resolved
    profile.yaml.

    Raises:
        InputError: as `process_count`.
    """
    processes = process_count(profile, dry_run)
    program = program_arguments(variant, seed, run_folder, processes, cores_for(processes))
    if processes == 1:
        return [sys.executable, "-m", *program]
    port = ["--master_port", str(free_port())]
    here = [*_devices(processes), *port, "--hostfile", "none"]
    return [*LAUNCHER, *here, *LAUNCHED, *program]


def program_arguments(
    variant: str, seed: int, run_folder: Path, processes: int, cores: int
) -> list[str]:
    """The training program and its options, as each process gets them.

    Args:
        processes: over all nodes.
        cores: that all processes of one machine share.
    """
    folder = shorten(run_folder)
    return [
        PROGRAM,
        *("--profile", f"{folder}/profile.yaml"),
        *("--variant", variant),
        *("--seed", str(seed)),
        *("--run-folder", folder),
        *("--cores", str(cores)),
        *("--processes", str(processes)),
    ]


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
