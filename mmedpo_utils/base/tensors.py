"""Tensors of a checkpoint beside those that a network wants."""

from __future__ import annotations

from pathlib import Path

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
            found, expected = list(state[key].shape), list(wanted[key].shape)
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
