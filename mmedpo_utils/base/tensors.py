"""Tensors of a checkpoint beside those that a network wants."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import InputError, first_line


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises InputError: missing or unreadable."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({first_line(error)}); expected MedKLIP weights"
        ) from error


def misfits(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What of ``state`` is missing, unexpected or misshapen beside ``wanted``; empty where all
    fit.
    """
    misshapen = []
    for key in sorted(wanted.keys() & state.keys()):
        if state[key].shape != wanted[key].shape:
            found = list(state[key].shape)
            expected = list(wanted[key].shape)
            misshapen.append(f"{key} {found} instead of {expected}")
    problems = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "misshapen": misshapen,
    }
    listed = []
    for kind, keys in problems.items():
        if keys:
            rest = ", ..." if len(keys) > 3 else ""
            listed.append(f"{len(keys)} {kind} ({', '.join(keys[:3])}{rest})")
    return "; ".join(listed)


def check_state(path: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """InputError where the keys or shapes of ``state`` are not the wanted ones."""
    problems = misfits(state, wanted)
    if problems:
        raise InputError(
            f"{path}: not the architecture of its configuration: tensors {problems}; check that "
            "weights and configuration belong together"
        )


def model_digest(model: torch.nn.Module) -> str:
    """SHA-256 over up to 1,024 evenly spaced values of every tensor of the model, with its name and
    shape.

    What DeepSpeed has divided among processes is gathered, one tensor at a time; all of them have
    to call.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with _whole(tensor):
            values = (
                tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)].float().cpu().numpy()
            )
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()


def _whole(tensor: torch.Tensor) -> AbstractContextManager:
    """Inside, a parameter that ZeRO stage 3 divided is whole."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])
