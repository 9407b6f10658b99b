"""Adapters that somebody trained: found, read, renamed, counted, and put on a LLaVA model.

Three layouts are read. PEFT's own names the modules of today's Hugging Face model; this kit's
training writes it. Earlier transformers named these modules otherwise. LLaVA's training scripts,
and so the authors' release, name those of the original model
(``base_model.model.model.layers.N...``) and leave the trained projector in
``non_lora_trainables.bin``. Whatever the layout, each tensor must find its place and each place its
tensor, or the adapter is refused: libraries only warn of that, and go on with the bare base model.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from ..base.errors import InputError, first_line, one_line
from ..base.files import load_object
from ..base.tensors import misfits
from .llava_med import ORIGINAL, file_record, read_tensors, renamed

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NOT_LORA = "non_lora_trainables.bin"
WRAPPER = "base_model.model."
PROJECTOR = "multi_modal_projector"
LANGUAGE_LAYER = re.compile(r"model\.language_model\.layers\.\d+\.(.+)")
TOWER = "model.vision_tower."
LARGEST_ALPHA = 1e6  # far above any that is trained with; a larger one makes weights infinite
LORA_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")
ADAPTER_FILES = [CONFIG, *WEIGHTS, NOT_LORA, "base.json", "README.md"]
# How each layout calls what begins like this in today's Hugging Face model.
LAYOUTS = {
    "PEFT": {},
    "LLaVA": ORIGINAL,
    "earlier Hugging Face": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
}
SIGNS = {
    "LLaVA": re.compile(r"(model\.)?layers\.|.*mm_projector\.|.*vision_tower\.vision_tower\."),
    "earlier Hugging Face": re.compile(r"language_model\.|vision_tower\.|multi_modal_projector\."),
}


@dataclass(frozen=True)
class AdapterReport:
    """What became of an adapter's tensors; none is unknown or missing, since that is refused.

    Attributes:
        layout: a name in `LAYOUTS`.
        lora: LoRA tensors that were applied.
        whole: tensors that replace the base model's own, such as the projector's.
        without_effect: LoRA tensors on the vision tower that were left out, because every B is
            zero.
        base: the base model's name in the adapter's configuration; None where it has none.
    """

    layout: str
    lora: int
    whole: int
    without_effect: int
    base: str | None

    def __str__(self) -> str:
        left_out = ""
        if self.without_effect:
            left_out = f", {self.without_effect} without effect (B is zero) left out"
        return (
            f"{self.layout} layout: {self.lora} LoRA tensors and {self.whole} whole ones applied"
            f"{left_out}, none unknown, none missing"
        )


def adapter_folder(name_or_path: str | Path, cached: bool = False) -> Path:
    """The folder of an adapter: a run folder's ``adapter``, any adapter folder, or one on the Hub.

    Args:
        name_or_path: a folder, or on the Hub ``owner/repository`` or ``owner/repository/folder``.
        cached: never download.

    Raises:
        InputError: no such folder, not to be had from the Hub, or no adapter in it.
    """
    folder = Path(name_or_path)
    if not folder.is_dir() and not folder.is_absolute():
        folder = _fetch(str(name_or_path), cached)
    if (folder / "adapter" / CONFIG).is_file():
        folder = folder / "adapter"
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder / CONFIG}: no such file; expected a PEFT adapter folder, as a training run "
            "writes it, or one of LLaVA's training scripts"
        )
    return folder


def adapter_record(folder: Path) -> dict[str, list[Any]]:
    """Which adapter it is: size and SHA-256 of the files that decide what it does."""
    files = [folder / name for name in (CONFIG, *WEIGHTS, NOT_LORA)]
    return file_record(file for file in files if file.is_file())


def _fetch(name: str, cached: bool) -> Path:
    """The local copy of an adapter on the Hub: a repository, or a folder in one."""
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    wanted = [f"{inside}/{file}" if inside else file for file in ADAPTER_FILES]
    source = f"{owner}/{repository}"
    try:
        if not repository:
            raise ValueError("a name on the Hub is owner/repository")
        copy = snapshot_download(source, allow_patterns=wanted, local_files_only=cached)
        return Path(copy) / inside
    except (OSError, ValueError, HfHubHTTPError) as error:
        if cached and repository:
            raise InputError(
                f"adapter {name}: is no folder, and was not downloaded yet; a run downloads it, or "
                f"`hf download {source}` does"
            ) from error
        raise InputError(
            f"adapter {name}: no such folder, and not to be had from the Hub "
            f"({first_line(error)}); give an adapter's folder, or its name on the Hub; without "
            "network, download it elsewhere (hf download NAME --local-dir FOLDER) and give that "
            "folder"
        ) from error


def with_adapter(model: nn.Module, name_or_path: str | Path, names: tuple[str, ...]) -> Any:
    """A Hugging Face LLaVA model with an adapter on top, found as `adapter_folder` does.

    Says in a line what became of an adapter in another layout than PEFT's.

    Raises:
        InputError: as `adapter_folder` and `put_on`.
    """
    folder = adapter_folder(name_or_path)
    model, report = put_on(model, folder, names)
    if report.layout != "PEFT":
        print(f"{folder.name}: {report}")
    return model


def put_on(model: nn.Module, folder: Path, names: tuple[str, ...]) -> tuple[Any, AdapterReport]:
    """Put the adapter in ``folder`` on a Hugging Face LLaVA model.

    Args:
        model: the base model; its layers are wrapped in place. A model on the meta device is enough
            to see whether the adapter fits: its tensors are then compared and not copied.
        folder: what `adapter_folder` found.
        names: how the base model is called; the adapter's own word for it is compared with these.

    Returns:
        the `PeftModel`, frozen, and what became of the tensors.

    Warns where the adapter names another base model, or its configuration holds a setting that PEFT
    does not know.

    Raises:
        InputError: a tensor is missing, has no place or another shape; unreadable files; not LoRA
            in LLaVA's layout. It calls the tensors as the files do.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    config = _read_config(folder)
    tensors, layout = _read_tensors(folder)
    _check_numbers(folder / CONFIG, config, tensors)
    without_effect: list[str] = []
    if layout != "PEFT":
        without_effect = _tower_without_effect(model, tensors, folder)
        tensors = {name: entry for name, entry in tensors.items() if name not in without_effect}
        _retarget(config, model, tensors, folder)
    config.inference_mode = True
    try:
        with warnings.catch_warnings():
            # Of deprecated names between the libraries, and of exclusions that exclude nothing.
            warnings.simplefilter("ignore")
            peft = PeftModel(model, config)
        # What is saved counts, and not whether PEFT would add embeddings: for that it asks the Hub.
        wanted = get_peft_model_state_dict(peft, save_embedding_layers=False)
        _check_fit(folder, layout, tensors, wanted, config, names)
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        if not on_meta:
            state = {WRAPPER + name: tensor for name, (_, tensor) in tensors.items()}
            set_peft_model_state_dict(peft, state)
    except InputError:
        raise
    except Exception as error:  # of odd settings PEFT raises whatever they lead to
        raise InputError(
            f"{folder}: the adapter does not fit {names[0]} ({first_line(error)}); load the model "
            "that it was trained on"
        ) from error
    lora = sum(LORA_TENSOR.fullmatch(name) is not None for name in tensors)
    base = config.base_model_name_or_path
    _compare_base(folder, base, names)
    report = AdapterReport(layout, lora, len(tensors) - lora, len(without_effect), base)
    return peft, report


def _read_config(folder: Path) -> Any:
    """The adapter's `PeftConfig`. Warns of settings that PEFT does not know and that are set."""
    from peft import PeftConfig

    values = load_object(folder / CONFIG, "the configuration of a PEFT adapter")
    try:
        with warnings.catch_warnings():
            # Ours below names the settings, and only those that are set.
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / CONFIG}: cannot be read as the configuration of a PEFT adapter "
            f"({first_line(error)}); fetch the adapter again"
        ) from error
    known = {item.name for item in fields(config)}
    unknown = sorted(key for key, value in values.items() if key not in known and value)
    if unknown:
        warnings.warn(
            f"{folder / CONFIG}: the installed PEFT does not know {', '.join(unknown)} and ignores "
            "it; the adapter may need a newer PEFT",
            stacklevel=5,
        )
    return config


Tensors = dict[str, tuple[str, Tensor]]


def _check_numbers(file: Path, config: Any, tensors: Tensors) -> None:
    """Raises InputError: a rank of LoRA that no tensor of the adapter has, before anything of its
    size is allocated; or an alpha that is no number, or too large. Other methods count otherwise.
    """
    if config.peft_type != "LORA":
        return
    largest = max((max(tensor.shape, default=0) for _, tensor in tensors.values()), default=0)
    for name, rank in _with_pattern(config, "r", "rank_pattern").items():
        if type(rank) is not int or not 0 < rank <= largest:
            raise InputError(
                f"{file}: `{one_line(name)}`: {one_line(repr(rank))} is no rank; expected a whole "
                f"number from 1 to {largest}, the largest side of the adapter's tensors; fetch the "
                "adapter again"
            )
    for name, alpha in _with_pattern(config, "lora_alpha", "alpha_pattern").items():
        if type(alpha) not in (int, float) or not abs(alpha) < LARGEST_ALPHA:
            raise InputError(
                f"{file}: `{one_line(name)}`: {one_line(repr(alpha))} is no scale; expected a "
                f"number below {LARGEST_ALPHA:g}; fetch the adapter again"
            )


def _with_pattern(config: Any, name: str, pattern: str) -> dict[str, Any]:
    """A number of an adapter and those that hold for some modules alone, each by its field."""
    others = getattr(config, pattern)
    others = others if isinstance(others, dict) else {}
    return {name: getattr(config, name)} | {f"{pattern}.{key}": others[key] for key in others}


def _read_tensors(folder: Path) -> tuple[Tensors, str]:
    """Tensors by their place in the Hugging Face model, each with its name in the file; the
    layout.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder}: holds no {' or '.join(WEIGHTS)}; fetch the adapter again")
    stored = read_tensors(file)
    beside = folder / NOT_LORA
    layout = "LLaVA" if beside.is_file() else _layout(stored)
    if layout == "LLaVA":
        if not beside.is_file():
            raise InputError(
                f"{folder}: is in LLaVA's layout and holds no {NOT_LORA}, the trained projector, "
                "which LLaVA's scripts write beside the adapter; fetch it too"
            )
        stored |= read_tensors(beside)
    # The longest beginning first: in LLaVA's layout `model.` begins all the others too.
    spelled = sorted(LAYOUTS[layout].items(), key=lambda item: -len(item[1]))
    prefixes = {old: new for new, old in spelled}
    tensors: Tensors = {}
    for name, tensor in stored.items():
        plain = _plain(name)
        if layout == "LLaVA" and not plain.startswith(("model.", "lm_head.")):
            plain = f"model.{plain}"  # some scripts leave the outer `model.` away
        place = renamed(plain, prefixes)
        if place in tensors:
            raise InputError(
                f"{folder}: holds {name} and {tensors[place][0]}, which are one tensor"
            )
        tensors[place] = (name, tensor)
    return tensors, layout


def _layout(stored: dict[str, Tensor]) -> str:
    """The layout that the names of an adapter's tensors are in."""
    names = [_plain(name) for name in stored]
    for layout, sign in SIGNS.items():
        if any(sign.match(name) for name in names):
            return layout
    return "PEFT"


def _plain(name: str) -> str:
    """A tensor's name without PEFT's wrapper and without the adapter's own name."""
    name = re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name)
    return name.removeprefix(WRAPPER)


def _tower_without_effect(model: nn.Module, tensors: Tensors, folder: Path) -> list[str]:
    """The LoRA tensors on the vision tower, where every B is zero; else none: then they are
    applied.

    LLaVA's scripts put LoRA on modules by their bare names, which the tower has too. It runs
    without gradient there, so that B stays as it began. The shapes are checked all the same.
    """
    modules = dict(model.named_modules())
    found = []
    has_effect = False
    for place, (name, tensor) in tensors.items():
        match = LORA_TENSOR.fullmatch(place)
        if match is None or not place.startswith(TOWER):
            continue
        module = modules.get(match[1])
        if not isinstance(module, nn.Linear):
            raise InputError(
                f"{folder}: the adapter does not fit: {name} has no place in the base model's "
                "vision tower; load the model that it was trained on"
            )
        # A is [rank, in], B is [out, rank].
        is_b = match[2] == "B"
        side = 0 if is_b else 1
        expected = module.out_features if is_b else module.in_features
        if tensor.ndim != 2 or tensor.shape[side] != expected:
            raise InputError(
                f"{folder}: the adapter does not fit: {name} {list(tensor.shape)} is for another "
                f"width than the vision tower's {expected}; load the model that it was trained on"
            )
        if is_b and bool(tensor.any()):
            has_effect = True
        found.append(place)
    return [] if has_effect else found


def _retarget(config: Any, model: nn.Module, tensors: Tensors, folder: Path) -> None:
    """Write into the LoRA configuration of another layout which modules of our model it is on.

    It is on every language layer, on each kind of module (``self_attn.q_proj``) that the tensors or
    the configuration name: so a tensor that is missing in one layer is missed.
    """
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        raise InputError(
            f"{folder / CONFIG}: `peft_type` is {config.peft_type!r}; in this layout only LORA is "
            "read"
        )
    kinds = _listed_kinds(config, model)
    others = set()
    for name in tensors:
        match = LORA_TENSOR.fullmatch(name)
        if match is None:
            continue
        layer = LANGUAGE_LAYER.fullmatch(match[1])
        if layer:
            kinds.add(layer[1])
        else:
            others.add(re.escape(match[1]))
    choices = sorted(others)
    for kind in sorted(kinds):
        choices.append(rf"model\.language_model\.layers\.\d+\.{re.escape(kind)}")
    config.target_modules = "|".join(choices)
    config.exclude_modules = None
    config.task_type = None  # PEFT would wrap a causal language model otherwise
    whole = any(name.startswith(f"model.{PROJECTOR}.") for name in tensors)
    config.modules_to_save = [PROJECTOR] if whole else None


def _listed_kinds(config: Any, model: nn.Module) -> set[str]:
    """The kinds of modules in a language layer (``self_attn.q_proj``) that a LoRA configuration
    lists by their bare names.
    """
    listed = config.target_modules
    if not isinstance(listed, list | set | tuple):
        return set()  # a pattern, in the names of another layout
    bare_names = {name.rpartition(".")[2] for name in listed}
    kinds = set()
    for name, module in model.named_modules():
        layer = LANGUAGE_LAYER.fullmatch(name)
        if layer and isinstance(module, nn.Linear) and layer[1].rpartition(".")[2] in bare_names:
            kinds.add(layer[1])
    return kinds


def _check_fit(
    folder: Path,
    layout: str,
    tensors: Tensors,
    wanted: dict[str, Tensor],
    config: Any,
    names: tuple[str, ...],
) -> None:
    """Compare names and shapes, in the words of the adapter's own files."""
    found = dict(tensors.values())
    expected = {}
    for key, tensor in wanted.items():
        place = key.removeprefix(WRAPPER)
        if place in tensors:
            name, _ = tensors[place]
        else:
            name = WRAPPER + renamed(place, LAYOUTS[layout])  # as the file would call it
        expected[name] = tensor
    problems = misfits(found, expected)
    if problems:
        raise InputError(
            f"{folder}: the adapter ({layout} layout) does not fit {names[0]}: tensors {problems}; "
            f"load the model that it was trained on (it names {config.base_model_name_or_path}), "
            "or fetch it again"
        )


def _compare_base(folder: Path, base: str | None, names: tuple[str, ...]) -> None:
    """Warn where the adapter was trained on a model of another name. Folders are moved, so no
    more.
    """
    known = {Path(name).name.casefold() for name in names}
    if base and Path(base).name.casefold() not in known:
        warnings.warn(
            f"{folder}: the adapter was trained on {base}, and the shapes fit {names[0]} too; its "
            "answers mean something only where both are the same model",
            stacklevel=5,
        )
