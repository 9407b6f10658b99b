"""Doors: what only some readers need, opened by name when they do.

A student's run reads the kit's own formats and imports the core alone. Foreign files, language
models as judges and the faster ways of a cluster have rooms of their own, which import the core.
The core opens them here, by name, as a launch names the program that it starts.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

DOORS = {
    "adapter": "convert.adapters:with_adapter",
    "data set": "convert.layouts:read_layout",
    "DICOM": "convert.dicom:open_dicom",
    "Med-LVLM": "convert.model_folder:model_folder",
    "hostfile": "scale.nodes:check_hostfile",
    "several nodes": "scale.nodes:node_commands",
    "visual curation": "scale.resumable_curation:curate_folder",
    "processor": "convert.model_folder:prepared_processor",
    "MedKLIP": "convert.medklip_official:official_checkpoint",
}


def open_door(name: str) -> Callable[..., Any]:
    """The function behind a door in `DOORS`; its room is imported now."""
    module, _, function = DOORS[name].partition(":")
    return getattr(import_module(f"mmedpo_utils.{module}"), function)
