"""Will it load? What a profile names, looked at before anything long starts.

    mmedpo check --profile paper-slake

Nothing is downloaded, converted, trained or asked of a judge: configurations, names and shapes are
read, and endpoints are asked which models they serve.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from ..base.cards import load_card
from ..base.environment import check_device
from ..base.errors import InputError, exit_status
from ..base.privacy import check_endpoint
from ..base.sections import LanguageModel
from ..convert.adapters import adapter_folder, put_on
from ..convert.cards import check_dataset
from ..convert.llava_med import (
    converted_before,
    fetch,
    inspect_original,
    original_config,
    weight_files,
)
from ..convert.model_folder import empty_model, prepare_processor, read_config, read_processor
from ..judges.chat import EndpointModel
from ..judges.language_models import speakers
from ..launch_command import process_count
from ..lvlm import PHANTOM_WEIGHTS
from ..profiles import Profile, load_profile
from ..scale.estimate import (
    GIB,
    NF4_BYTES,
    WORKING_SPACE,
    model_config,
    parameter_counts,
    profile_memory,
)


@dataclass(frozen=True)
class Finding:
    """One line of the check.

    Attributes:
        what: what was looked at.
        found: what is there; empty where it could not be read.
        to_do: what to do before a run; empty where it is right.
    """

    what: str
    found: str
    to_do: str = ""

    def __str__(self) -> str:
        mark = "to do" if self.to_do else "right"
        parts = [part for part in (self.found, self.to_do) if part]
        return f"{mark}  {self.what:<22}{'; '.join(parts)}"


@dataclass(frozen=True)
class BaseModel:
    """The base model without its weights: on the meta device, with what its folder is called."""

    model: LlavaForConditionalGeneration
    names: tuple[str, ...]


def check_profile(profile: Profile) -> list[Finding]:
    """Look at everything that a run of the profile loads or asks.

    Returns:
        class, base, tower, template, processor, tokens per image, adapters, data set, judges,
        device and memory, a line each or more; what could not be read is a line that says what to
        do.
    """
    lines, base = _model(profile)
    lines += _adapters(profile, base)
    lines += _guarded("data set", lambda: _dataset(profile))
    if profile.evaluation.adapters is None:  # else nothing is trained, so that no pairs are made
        lines += _judges(profile)
    lines += _guarded("device", lambda: _device(profile))
    lines += _guarded("memory", lambda: _memory(profile))
    return lines


def _guarded(what: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of ``look``, and an error that ends it as one more."""
    lines = []
    try:
        for line in look():
            lines.append(line)
    except InputError as error:
        lines.append(Finding(what, "", str(error)))
    return lines


# The findings of a base model, then the model itself, which the generator returns at its end.
ModelFindings = Generator[Finding, None, BaseModel]


def _model(profile: Profile) -> tuple[list[Finding], BaseModel | None]:
    """Class, base, tower, template, processor and tokens per image; the model, where it can be
    read.
    """
    base: BaseModel | None = None

    def look() -> Iterator[Finding]:
        nonlocal base
        base = yield from _base_model(profile)

    lines = _guarded("base model", look)
    return lines, base


def _base_model(profile: Profile) -> ModelFindings:
    """What the profile's base model is: in our layout, converted before, or to be converted."""
    values = profile.lvlm
    source = PHANTOM_WEIGHTS if values.model == "phantom" else Path(values.model)
    if not source.is_dir():
        source = fetch(values.model, cached=True)
    names = (values.model, source.name)
    original = original_config(source)
    if original is None:
        kind = "LlavaForConditionalGeneration"
        return (yield from _hugging_face(profile, source, kind, "in the folder", names))
    before = converted_before(source, original, values.vision_tower, values.model)
    if before is None:
        return (yield from _original(profile, source, original, names))
    kind = f"{_called(original)}, converted before"
    return (yield from _hugging_face(profile, before, kind, _origin(profile), names))


def _hugging_face(
    profile: Profile, source: Path, kind: str, tower_origin: str, names: tuple[str, ...]
) -> ModelFindings:
    """The lines for a folder in the Hugging Face layout."""
    config = read_config(source)
    yield Finding("class", kind)
    model = empty_model(source)
    yield Finding("base", _size(weight_files(source), len(model.state_dict())))
    yield Finding("vision tower", _tower(config, tower_origin))
    yield from _processor(profile, source, config, read_processor(source))
    return BaseModel(model, names)


def _original(
    profile: Profile, source: Path, config: dict[str, Any], names: tuple[str, ...]
) -> ModelFindings:
    """The same lines for a checkpoint in the original layout that is not converted yet."""
    yield Finding("class", f"{_called(config)}, converted on first use")
    original = inspect_original(source, config, profile.lvlm.vision_tower, download=False)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(original.config)
    yield Finding("base", _size(list(original.shards), len(model.state_dict())))
    yield Finding("vision tower", _tower(original.config, _origin(profile, original.tower)))
    yield from _processor(profile, source, original.config, original.processor)
    return BaseModel(model, names)


def _called(config: dict[str, Any]) -> str:
    """The name of an original checkpoint's class, as its configuration says it."""
    names = config.get("architectures") or [config.get("model_type")]
    return f"{names[0]} in the original layout"


def _size(files: list[Path], tensors: int) -> str:
    total = sum(file.stat().st_size for file in files)
    size = f"{total / 1e9:.1f} GB" if total > 1e9 else f"{total / 1e6:.1f} MB"
    return f"{tensors} tensors, each in its shape; files: {len(files)}, {size}"


def _tower(config: LlavaConfig, origin: str) -> str:
    tower: Any = config.vision_config
    layers = tower.num_hidden_layers
    return f"{tower.model_type}, {layers} layers, {tower.image_size} pixels; {origin}"


def _origin(profile: Profile, tower: Path | None = None) -> str:
    """Where the vision tower of an original checkpoint comes from."""
    if profile.lvlm.vision_tower == "checkpoint":
        return "the one inside the checkpoint"
    origin = "the one that its configuration names"
    return origin if tower is None else f"{origin}, in {tower.name}"


def _processor(
    profile: Profile, source: Path, config: LlavaConfig, processor: Any
) -> Iterator[Finding]:
    """Template, processor and tokens per image."""
    template = profile.lvlm.template
    tokens = prepare_processor(source, config, processor, template)
    yield Finding(
        "template", f"{template or 'the model folder: its own'}, one image mark for one image"
    )
    size = processor.image_processor.crop_size
    yield Finding("processor", f"{type(processor.image_processor).__name__}, {size.height} pixels")
    yield Finding("tokens per image", f"{tokens}, image token {config.image_token_id}")


def _adapters(profile: Profile, base: BaseModel | None) -> list[Finding]:
    """A line for each adapter that the profile names."""
    named: dict[str, str] = {}
    if profile.lvlm.base_adapter:
        named["base_adapter"] = profile.lvlm.base_adapter
    named |= profile.evaluation.adapters or {}
    lines = []
    for name, place in named.items():
        what = f"adapter {name}"
        lines += _guarded(what, partial(_adapter, what, place, base))
    return lines


def _adapter(what: str, place: str, base: BaseModel | None) -> Iterator[Finding]:
    folder = adapter_folder(place, cached=True)
    if base is None:
        yield Finding(what, "", "whether it fits cannot be seen before the base model is here")
        return
    # A copy of the empty model: putting an adapter on changes it in place.
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(base.model.config)
    _, report = put_on(empty, folder, base.names)
    yield Finding(what, str(report))


def _dataset(profile: Profile) -> Iterator[Finding]:
    """What of the data set is missing, what is not as its card says, and what is right."""
    card = load_card(profile.data.card)
    what = f"data set {card.name}"
    if profile.data.source == "phantom" or profile.data.root is None:
        yield Finding(what, "drawn by code when notebook 00 runs")
        return
    right: list[str] = []
    missing: dict[str, list[str]] = {}
    counted: list[Finding] = []
    for row in check_dataset(card, profile.data.root):
        if row["what to do"] == "nothing":
            right.append(f"{row['what']} {row['found']}")
        elif row["found"] == "missing":
            missing.setdefault(row["what to do"], []).append(row["what"])
        else:
            differs = f"{row['what']}: {row['found']}, the card says {row['expected']}"
            counted.append(Finding(what, differs, row["what to do"]))
    for to_do, names in missing.items():
        yield Finding(what, f"missing in {profile.data.root}: {'; '.join(names)}", to_do)
    if missing and not right:
        return  # that its questions cannot be read says no more
    yield from counted
    if right:
        yield Finding(what, "; ".join(right))


def _judges(profile: Profile) -> list[Finding]:
    """A line for the judge and for each member of the panel."""
    if profile.judge.backend == "phantom":
        return [Finding("judge", "the phantom's rules")]
    first, members = speakers(profile)
    lines = _guarded("judge", partial(_speaker, profile, "judge", first))
    for name, model in members.items():
        role = f"panel {name}"
        lines += _guarded(role, partial(_speaker, profile, role, model))
    return lines


def _speaker(profile: Profile, role: str, model: LanguageModel) -> Iterator[Finding]:
    """Whether a language model is there: it is asked for nothing but a list of models."""
    if model.backend == "openai":
        # `load_profile` refuses an endpoint without an address.
        assert model.base_url is not None
        check_endpoint(model.base_url, load_card(profile.data.card), profile.judge.agreement)
        yield Finding(role, EndpointModel(model, profile.judge.timeout).reach())
        return
    folder = Path(model.model)
    here = folder if folder.is_dir() else fetch(model.model, cached=True)
    if not weight_files(here):
        raise InputError(f"{model.model}: its weights are not here; hf download {model.model}")
    yield Finding(role, f"{model.model}, on this machine")


def _device(profile: Profile) -> Iterator[Finding]:
    device = check_device(profile.lvlm.device)
    yield Finding("device", torch.cuda.get_device_name() if device == "cuda" else "CPU")
    if profile.lvlm.quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        yield Finding(
            "4 bits", "bitsandbytes is not installed", "install the package's extra `gpu`"
        )
    process_count(profile)  # raises where this machine cannot start them


def _memory(profile: Profile) -> Iterator[Finding]:
    """What training takes of each GPU or of this machine, or evaluation of one, beside what is free
    now.
    """
    each = _evaluation_memory(profile)  # GiB of each process
    cpu = 0.0  # GiB of this machine
    processes = 1
    needs = f"{each:.1f} GiB estimated to evaluate"
    if profile.evaluation.adapters is None:
        processes = process_count(profile, dry_run=True)
        training = 0.0
        for variant in profile.training.variants:
            parts, shared = profile_memory(profile, variant, processes=processes)
            training = max(training, sum(parts.values()))
            cpu = max(cpu, shared)
        needs += f", {training:.1f} GiB for each of {processes} training processes"
        each = max(each, training)
    if profile.lvlm.device != "cpu" and torch.cuda.is_available():
        gpus = range(torch.cuda.device_count())
        free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus) / GIB
        less = "try profile qlora-1gpu or zero3-offload, or a smaller training.max_length"
        yield Finding("GPU memory", f"{needs}, {free:.1f} GiB free", "" if each <= free else less)
    elif profile.lvlm.device == "cuda":
        yield Finding("GPU memory", needs, "there is no GPU here to compare with")
    else:
        # Without a GPU all of it is this machine's memory.
        cpu += each * processes
    if cpu:
        available = psutil.virtual_memory().available / GIB
        less = "close other programs, or take fewer processes"
        needs += f", {available:.1f} GiB available"
        yield Finding("CPU memory", needs, "" if cpu <= available else less)


def _evaluation_memory(profile: Profile) -> float:
    """GiB that one process takes to answer questions: the weights, an adapter, and working
    space.
    """
    config, _ = model_config(profile.lvlm.model)
    parts = parameter_counts(config, profile.training.lora_rank)
    on_gpu = profile.lvlm.device == "cuda" or (
        profile.lvlm.device == "auto" and torch.cuda.is_available()
    )
    width = 2 if on_gpu else 4  # bytes of a weight: bf16 on a GPU, float32 on the CPU
    # Only the matrices are quantised; embeddings, norms and the adapter are not.
    matrices = NF4_BYTES if profile.lvlm.quantization == "nf4" else width
    others = sum(parts.values()) - parts["matrices"]
    return (parts["matrices"] * matrices + others * width + WORKING_SPACE) / GIB


def main() -> int:
    """Print the check of a profile. The exit status is 1 where there is something to do."""
    parser = argparse.ArgumentParser(description="Say whether all that a profile names will load.")
    parser.add_argument(
        "--profile", required=True, help="a profile's name, or the path of a YAML file"
    )
    options = parser.parse_args()
    lines: list[Finding] = []

    def action() -> None:
        lines.extend(check_profile(load_profile(options.profile)))
        print("\n".join(map(str, lines)))

    return exit_status(action) or int(any(line.to_do for line in lines))


if __name__ == "__main__":
    sys.exit(main())
