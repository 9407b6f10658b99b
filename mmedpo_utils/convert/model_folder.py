"""The door for Med-LVLMs: whatever a profile names becomes a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from ..lvlm import PHANTOM_WEIGHTS, MedLVLM, load_lvlm, quiet_loading, read_config
from .adapters import adapter_folder, adapter_record
from .llava_med import cache_folder, cached, converted, fetch, folder_record, original_config


def model_folder(
    name_or_path: str | Path, vision_tower: str, base_adapter: str | Path | None = None
) -> Path:
    """The Hugging Face folder to load a Med-LVLM from.

    A model in the original layout is converted first, one on the Hub fetched. With ``base_adapter``
    the two are merged; the merged folder is kept beside the converted ones, and used again as long
    as its model and its adapter are the same files.

    Raises:
        InputError: as `load_lvlm`, or no room on the disk.
    """
    source = _hugging_face_folder(name_or_path, vision_tower)
    if base_adapter is None:
        return source
    adapter = adapter_folder(base_adapter)
    record = {"model": folder_record(source), "adapter": adapter_record(adapter)}
    name = f"{Path(name_or_path).name}-with-{Path(base_adapter).name}"

    def write(draft: Path) -> None:
        save_merged(load_lvlm(name_or_path, "auto", adapter, vision_tower=vision_tower), draft)

    target = cache_folder(name, f"{source} {adapter.resolve()}")
    cached(target, record, write)
    return target


def save_merged(lvlm: MedLVLM, folder: Path) -> None:
    """Write a model with its adapter merged, and its processor, into ``folder``. Raises OSError: no
    room.
    """
    with quiet_loading():
        lvlm.model.merge_and_unload().save_pretrained(folder, max_shard_size="5GB")
        lvlm.processor.save_pretrained(folder)


def _hugging_face_folder(name_or_path: str | Path, vision_tower: str) -> Path:
    """The folder to load from: an original checkpoint is converted first, a Hub repository
    fetched.
    """
    source = PHANTOM_WEIGHTS if str(name_or_path) == "phantom" else Path(name_or_path)
    if not source.is_dir():
        source = fetch(str(name_or_path))
    original = original_config(source)
    if original is not None:
        with quiet_loading():
            source = converted(source, original, vision_tower, str(name_or_path))
    read_config(source)  # raises where it is no LLaVA
    return source
