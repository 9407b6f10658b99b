"""What this machine has, and what that allows; where a result comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from typing import Any

import psutil
import torch

from .errors import InputError
from .settings import repository_root

PACKAGES = ("torch", "transformers", "trl", "peft", "deepspeed", "bitsandbytes")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run's numbers; None where one is not
    installed.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    return found


def provenance(**machine: Any) -> dict[str, Any]:
    """Machine, versions, date and commit (None outside a git checkout) of a result.

    Args:
        machine: what to say of the machine; its platform and cores where nothing is given.
    """
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=repository_root()
    )
    return {
        "machine": machine or {"platform": platform.platform(), "cores": os.cpu_count()},
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "commit": found.stdout.strip() or None,
    }


def check_environment() -> list[tuple[str, str, str]]:
    """One row per part of this machine: the part, what is there, what it allows."""
    found = versions()
    memory = psutil.virtual_memory()
    lines = [
        ("Python", platform.python_version(), f"{platform.system()} {platform.machine()}"),
        ("torch", torch.__version__, "every notebook"),
    ]
    libraries = [str(found[name]) for name in ("transformers", "trl", "peft")]
    lines.append(("transformers, trl, peft", ", ".join(libraries), "every notebook"))
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
        lines.append(("device", device, "the phantom profile, and 7B models through QLoRA"))
    else:
        lines.append(("device", "CPU", "the phantom profile, in minutes"))
    size = f"{memory.total / 2**30:.0f} GiB, {memory.available / 2**30:.0f} GiB free"
    if memory.available > 6 * 2**30:
        lines.append(("memory", size, "enough"))
    else:
        lines.append(("memory", size, "the notebooks need up to 6 GiB: close other programs"))
    lines.append(("cores", str(os.cpu_count()), "two or more keep both training processes busy"))
    if found["deepspeed"]:
        lines.append(("deepspeed", found["deepspeed"], "notebook 04 trains in two processes"))
    else:
        alone = "notebook 04 trains in one process; everything else is the same"
        lines.append(("deepspeed", "not installed", alone))
    if found["bitsandbytes"]:
        lines.append(("bitsandbytes", found["bitsandbytes"], "4-bit models"))
    else:
        without = "no 4-bit models; the phantom profile does not need them"
        lines.append(("bitsandbytes", "not installed", without))
    return lines


def check_device(device: str) -> str:
    """Resolve ``lvlm.device`` to ``cpu`` or ``cuda``. Raises InputError: a GPU is asked for where
    torch sees none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError(
            "profile key `lvlm.device`: asks for cuda, but torch finds no GPU here; write auto or "
            "cpu, or install a CUDA build of torch on a machine with a GPU"
        )
    return ("cuda" if available else "cpu") if device == "auto" else device


def cores_for(processes: int) -> int:
    """Processor cores that ``processes`` on this machine share; OMP_NUM_THREADS, where it is set,
    is the limit of each.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, _thread_limit(cores) * processes)


def _thread_limit(otherwise: int) -> int:
    """OMP_NUM_THREADS, of a list of them (one a nesting level) the first; ``otherwise`` where it is
    no number.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else otherwise
