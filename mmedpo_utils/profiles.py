"""Profiles: every value of one run, read from a commented YAML file and checked before anything
starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .base.errors import InputError
from .base.files import atomic_write
from .base.settings import (
    between,
    build_section,
    is_path,
    nearest,
    one_of,
    override,
    read_yaml,
    repository_root,
)

RETIRED_KEYS = [("training", "reuse_vision_features")]
PROFILE_FOLDER = Path(__file__).with_suffix("")
IMAGE_FOLDERS = {
    "folder": "images",
    "vqa-rad": "VQA_RAD Image Folder",
    "slake": "imgs",
    "iu-xray": "images",
    "mimic-cxr": "files",
}


@dataclass(frozen=True)
class Data:
    """Where films, questions and text pairs come from."""

    source: str = one_of("phantom", *IMAGE_FOLDERS)
    card: str
    root: Path | None
    train_patients: int = between(0, 100_000)
    validation_patients: int = between(0, 100_000)
    test_patients: int = between(0, 100_000)


@dataclass(frozen=True)
class VisualTool:
    """MedKLIP: its checkpoint and the query whose attention is the heat map."""

    checkpoint: str = field(metadata={"path": True})
    query: str
    batch_size: int = between(1)


@dataclass(frozen=True)
class Noise:
    """How the rejected image is made. ``signal`` is the square root of the schedule's product at
    step k.
    """

    kind: str = one_of("localized", "released", "global")
    mask: str = one_of("quantile", "mean_std", "otsu", "soft")
    quantile: float = between(0, 1)
    signal: float = between(0, 1)


@dataclass(frozen=True)
class LVLM:
    """The medical vision-language model that is trained."""

    model: str = field(metadata={"path": True})
    base_adapter: str | None = field(metadata={"path": True})
    vision_tower: str = one_of("checkpoint", "config")
    template: str | None = one_of("mistral_instruct", "v1")
    batch_size: int = between(1)
    max_new_tokens: int = between(1)
    device: str = one_of("auto", "cpu", "cuda")
    quantization: str = one_of("none", "nf4")


@dataclass(frozen=True)
class Curation:
    """Text pairs: how many, how many sampled answers each, and when a sampled answer counts as a
    conflict.
    """

    text_pairs: int = between(1)
    candidates: int = between(1)
    temperature: float = between(0, 10)
    conflict_threshold: float = between(0, 1)
    rounds: int = between(1)


@dataclass(frozen=True)
class LanguageModel:
    """One language model: where it answers, and what it costs per million tokens (in the unit of
    ``max_cost``).
    """

    backend: str = one_of("openai", "transformers")
    model: str = field(metadata={"path": True})
    base_url: str | None
    api_key_env: str | None
    quantization: str = one_of("none", "nf4")
    input_price: float = between(0)
    output_price: float = between(0)


@dataclass(frozen=True)
class Judges:
    """Who judges and debates: the phantom's rules, or language models within limits of time, rate
    and money.
    """

    backend: str = one_of("phantom", "models")
    judge: LanguageModel | None
    panel: dict[str, LanguageModel] | None
    temperature: float = between(0, 2)
    max_tokens: int = between(16)
    timeout: float = between(0.01)
    requests_per_minute: int = between(1)
    max_requests: int = between(0)
    max_cost: float = between(0)
    agreement: str | None


@dataclass(frozen=True)
class Relevance:
    """How raw scores become weights."""

    mean: float
    variance: float = between(0)
    low: float = between(0)
    high: float = between(0)


@dataclass(frozen=True)
class Variant:
    """One training run of the comparison: its objective, its pairs, their weights, and what it
    trains.

    ``pairs`` names the preference manifest: ``output``/pairs/NAME.json.
    """

    objective: str = one_of("dpo", "sft")
    pairs: str = field(metadata={"name": True})
    sources: tuple[str, ...] = one_of("text", "visual")
    weights: str = one_of("rescaled", "literal", "none", "uniform")
    trains: tuple[str, ...] = one_of("lora", "projector")


@dataclass(frozen=True)
class Training:
    """The objective, the optimiser, LoRA, the cluster, what is computed once, and the variants to
    compare.

    The global batch is ``per_device_batch_size`` x ``gradient_accumulation_steps`` x ``processes``.
    """

    beta: float = between(0)
    reference: str = one_of("initial", "released")
    learning_rate: float = between(0)
    projector_learning_rate: float = between(0)
    weight_decay: float = between(0)
    optimizer: str = one_of("adamw", "paged_adamw_8bit")
    warmup_ratio: float = between(0, 1)
    scheduler: str = one_of("cosine", "linear", "constant", "constant_with_warmup")
    lora_rank: int = between(1)
    lora_alpha: int = between(1)
    lora_dropout: float = between(0, 1)
    epochs: float | None = between(0.01)
    max_steps: int | None = between(1)
    per_device_batch_size: int = between(1)
    gradient_accumulation_steps: int = between(1)
    max_length: int = between(1)
    precision: str = one_of("fp32", "bf16")
    tf32: bool
    attention: str = one_of("sdpa", "eager", "flex_attention")
    gradient_checkpointing: bool
    group_by_length: bool
    shared_prefix: bool
    cache_reference: bool
    processes: int = between(1)
    nodes: int = between(1)
    hostfile: Path | None
    zero_stage: int = between(0, 3)
    offload: str = one_of("none", "cpu")
    validation_every: int = between(1)
    logging_steps: int = between(1)
    save_every: int = between(1)
    report_to: str = one_of("none", "tensorboard", "wandb", "trackio")
    variants: dict[str, Variant]


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, how it answers, and how intervals are drawn.

    ``adapters``: somebody's adapters by name, compared with the base model instead of the profile's
    own variants. ``decoding`` released is that of the authors' evaluation
    (`evaluate.RELEASED_DECODING`).
    """

    adapters: dict[str, str] | None = field(metadata={"path": True})
    decoding: str = one_of("greedy", "released")
    batch_size: int = between(1)
    questions: int | None = between(1)
    bootstrap_samples: int = between(1)
    seeds: tuple[int, ...] = between(0)


@dataclass(frozen=True)
class Profile:
    """Every value of one run. Paths are absolute; relative ones in the file start at the repository
    root.
    """

    name: str
    description: str
    seed: int = between(0, 2**32 - 1)
    output: Path
    figures: Path
    data: Data
    visual_tool: VisualTool
    noise: Noise
    lvlm: LVLM
    curation: Curation
    judge: Judges
    relevance: Relevance
    training: Training
    evaluation: Evaluation

    @property
    def image_root(self) -> Path:
        """The folder that the ``image`` of questions and pairs is relative to."""
        return (
            self.data.root / IMAGE_FOLDERS[self.data.source]
            if self.data.root
            else self.output / "data" / "images"
        )

    def as_dict(self) -> dict[str, Any]:
        """The profile as plain values; paths inside the repository are relative to it."""
        return json.loads(json.dumps(asdict(self), default=_shorten))

    def save(self, path: str | os.PathLike) -> None:
        """Write the resolved profile as YAML that ``load_profile`` reads back. Raises InputError:
        cannot be written.
        """
        with atomic_write(path) as temporary:
            temporary.write_text(
                yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True),
                encoding="utf-8",
            )

    def digest(self, *sections: str) -> str:
        """SHA-256 (hexadecimal) of the named sections or keys, of all of them without arguments."""
        values = self.as_dict()
        chosen = {section: values[section] for section in sections or values}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def profile_names() -> list[str]:
    """The names of the profiles that the package ships."""
    return sorted(path.stem for path in PROFILE_FOLDER.glob("*.yaml"))


def load_profile(
    name_or_path: str | os.PathLike, overrides: dict[str, Any] | None = None
) -> Profile:
    """Read and check a profile.

    Args:
        name_or_path: a shipped profile's name, or the path of a YAML file (with its suffix, or a
            separator in it).
        overrides: values that replace the file's, by dotted key (``{"training.max_steps": 4}``).

    A file may name in ``extends`` a shipped profile whose values it starts from; its list of
    variants, or of the judge's panel, replaces the other one whole. The environment variable
    MMEDPO_DATA_ROOT replaces ``data.root`` where ``data.source`` is not ``phantom``.

    Raises:
        InputError: no such profile, not YAML, a key unknown or missing, a value of the wrong type
            or out of range.
    """
    path, values = _read_profile(name_or_path)
    for key, value in (overrides or {}).items():
        override(values, key, value, path.name)
    data = values.get("data")
    if (
        isinstance(data, dict)
        and str(data.get("source")) in IMAGE_FOLDERS
        and os.environ.get("MMEDPO_DATA_ROOT")
    ):
        data["root"] = os.environ["MMEDPO_DATA_ROOT"]
    _drop_retired(values, path.name)
    profile = build_section(Profile, values, path.name)
    _check_together(profile, path.name)
    return profile


def _read_profile(name_or_path: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """The file of a profile and its values, on top of those of the profile that it extends."""
    path = Path(name_or_path)
    if not is_path(name_or_path):
        path = PROFILE_FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            raise InputError(
                f"profile {str(name_or_path)!r}: "
                f"unknown{nearest(str(name_or_path), profile_names())}"
            )
    values = read_yaml(path, f"a YAML file or a profile's name: {', '.join(profile_names())}")
    if "extends" not in values:
        return path, values
    parent, others = values.pop("extends"), [name for name in profile_names() if name != path.stem]
    if parent not in others:
        raise InputError(
            f"{path.name}: key `extends`: expected a shipped profile, found "
            f"{parent!r}{nearest(str(parent), others)}"
        )
    return path, _merged(_read_profile(parent)[1], values)


def _drop_retired(values: dict[str, Any], file: str) -> None:
    """Leave out keys that profiles have no more, and say so: run folders of then still hold
    them.
    """
    for section, key in RETIRED_KEYS:
        if isinstance(values.get(section), dict) and key in values[section]:
            del values[section][key]
            print(f"{file}: key `{section}.{key}` is read no more, and left out")


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``values`` on top, section by section; sections whose keys are free names are
    replaced whole.
    """
    both = {
        key: _merged(base[key], value)
        for key, value in values.items()
        if key not in ("variants", "panel")
        and isinstance(value, dict)
        and isinstance(base.get(key), dict)
    }
    return base | values | both


def _check_together(profile: Profile, file: str) -> None:
    """Rules between keys."""
    data, relevance, training, phantom = (
        profile.data,
        profile.relevance,
        profile.training,
        profile.data.source == "phantom",
    )
    problems = {
        "data.card: expected the source's own name, for every source but folder": data.source
        not in ("folder", data.card),
        "data.root: expected the data set's folder, for every source but phantom": not phantom
        and not data.root,
        "data.root: expected null, for the source phantom": phantom and data.root,
        "data.train_patients: expected 1 or more, for the source phantom": phantom
        and not data.train_patients,
        "data.test_patients: expected 1 or more, for the source phantom": phantom
        and not data.test_patients,
        "relevance.low: expected at most relevance.high": relevance.low > relevance.high,
        "training.max_steps: expected a number here or in training.epochs, and null in the other": (
            training.max_steps is None
        )
        == (training.epochs is None),
        "training.processes: expected a multiple of training.nodes": training.processes
        % training.nodes,
        "training.hostfile: expected null on one node": training.nodes == 1 and training.hostfile,
        "training.offload: expected none where training.zero_stage is below 2": training.offload
        == "cpu"
        and training.zero_stage < 2,
        "training.zero_stage: expected 2 or less where several processes train on an nf4 "
        "model": profile.lvlm.quantization == "nf4"
        and training.zero_stage == 3
        and training.processes > 1,
        "training.cache_reference: expected false where training.reference is released, since that "
        "reference drifts": training.reference == "released" and training.cache_reference,
    } | _judge_problems(profile.judge)
    problems |= {
        f"evaluation.adapters.{name}: expected another name (letters, digits, _, -), not base": name
        == "base"
        or not re.fullmatch(r"[\w-]+", name)
        for name in profile.evaluation.adapters or {}
    }
    problems |= {
        f"training.variants.{name}.objective: expected sft for the pairs `truth`, which have no "
        "rejected answers": variant.pairs == "truth" and variant.objective != "sft"
        for name, variant in training.variants.items()
    }
    for problem, holds in problems.items():
        if holds:
            key, expected = problem.split(": ", 1)
            raise InputError(f"{file}: key `{key}`: {expected}")


def _judge_problems(judge: Judges) -> dict[str, bool]:
    """The rules between the keys of ``judge``, and whether each is broken."""
    judged, panel = judge.backend == "models", judge.panel or {}
    models = {
        "judge.judge": judge.judge,
        **{f"judge.panel.{name}": model for name, model in panel.items()},
    }
    problems = {
        "judge.judge: expected a language model, for the backend models": judged
        and judge.judge is None,
        "judge.panel: expected one language model or more, by name, for the backend models": judged
        and not panel,
    }
    for key, model in models.items():
        if model is not None:
            endpoint, variable = model.backend == "openai", model.api_key_env or "UNUSED"
            problems[f"{key}.base_url: expected the endpoint's address, for the backend openai"] = (
                endpoint and model.base_url is None
            )
            problems[
                f"{key}.api_key_env: expected the NAME (A-Z, 0-9, _) of the environment variable "
                "that holds the key, never the key itself"
            ] = re.fullmatch(r"[A-Z][A-Z0-9_]*", variable) is None
    return problems


def _shorten(path: Path) -> str:
    """Relative to the repository for a path in or beside it, so that digests and saved profiles
    travel.
    """
    root = repository_root()
    return (
        Path(os.path.relpath(path, root)).as_posix()
        if path.is_relative_to(root.parent)
        else str(path)
    )
