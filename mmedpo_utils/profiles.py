"""Profiles: every value of one run, read from a commented YAML file and checked before anything starts."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from .errors import InputError
from .files import atomic_write

PROFILE_FOLDER = Path(__file__).with_suffix("")
KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a non-empty text", Path: "a path"}
IMAGE_FOLDERS = {"folder": "images", "vqa-rad": "VQA_RAD Image Folder", "slake": "imgs", "iu-xray": "images",
                 "mimic-cxr": "files"}


def _between(low: float = -math.inf, high: float = math.inf) -> Any:
    return field(metadata={"low": low, "high": high})


def _one_of(*choices: str) -> Any:
    return field(metadata={"choices": choices})


@dataclass(frozen=True)
class Data:
    """Where films, questions and text pairs come from."""

    source: str = _one_of("phantom", *IMAGE_FOLDERS)
    card: str
    root: Path | None
    train_patients: int = _between(0, 100_000)
    validation_patients: int = _between(0, 100_000)
    test_patients: int = _between(0, 100_000)


@dataclass(frozen=True)
class VisualTool:
    """MedKLIP: its checkpoint and the query whose attention is the heat map."""

    checkpoint: str = field(metadata={"path": True})
    query: str
    batch_size: int = _between(1)


@dataclass(frozen=True)
class Noise:
    """How the rejected image is made. ``signal`` is the square root of the schedule's product at step k."""

    kind: str = _one_of("localized", "released", "global")
    mask: str = _one_of("quantile", "mean_std", "otsu", "soft")
    quantile: float = _between(0, 1)
    signal: float = _between(0, 1)


@dataclass(frozen=True)
class LVLM:
    """The medical vision-language model that is trained."""

    model: str = field(metadata={"path": True})
    batch_size: int = _between(1)
    max_new_tokens: int = _between(1)
    device: str = _one_of("auto", "cpu", "cuda")
    quantization: str = _one_of("none", "nf4")


@dataclass(frozen=True)
class Curation:
    """Text pairs: how many, how many sampled answers each, and when a sampled answer counts as a conflict."""

    text_pairs: int = _between(1)
    candidates: int = _between(1)
    temperature: float = _between(0, 10)
    conflict_threshold: float = _between(0, 1)
    rounds: int = _between(1)


@dataclass(frozen=True)
class LanguageModel:
    """One language model: where it answers, and what it costs per million tokens (in the unit of ``max_cost``)."""

    backend: str = _one_of("openai", "transformers")
    model: str = field(metadata={"path": True})
    base_url: str | None
    api_key_env: str | None
    quantization: str = _one_of("none", "nf4")
    input_price: float = _between(0)
    output_price: float = _between(0)


@dataclass(frozen=True)
class Judges:
    """Who judges and debates: the phantom's rules, or language models within limits of time, rate and money."""

    backend: str = _one_of("phantom", "models")
    judge: LanguageModel | None
    panel: dict[str, LanguageModel] | None
    temperature: float = _between(0, 2)
    max_tokens: int = _between(16)
    timeout: float = _between(0.01)
    requests_per_minute: int = _between(1)
    max_requests: int = _between(0)
    max_cost: float = _between(0)
    agreement: str | None


@dataclass(frozen=True)
class Relevance:
    """How raw scores become weights."""

    mean: float
    variance: float = _between(0)
    low: float = _between(0)
    high: float = _between(0)


@dataclass(frozen=True)
class Variant:
    """One training run of the comparison: its objective, its pairs, its weights."""

    objective: str = _one_of("dpo", "sft")
    sources: tuple[str, ...] = _one_of("text", "visual")
    weights: str = _one_of("rescaled", "literal", "none", "uniform")


@dataclass(frozen=True)
class Training:
    """The optimiser, LoRA, the launcher, and the variants to compare."""

    beta: float = _between(0)
    learning_rate: float = _between(0)
    projector_learning_rate: float = _between(0)
    lora_rank: int = _between(1)
    lora_alpha: int = _between(1)
    lora_dropout: float = _between(0, 1)
    max_steps: int = _between(1)
    per_device_batch_size: int = _between(1)
    gradient_accumulation_steps: int = _between(1)
    processes: int = _between(1)
    zero_stage: int = _between(0, 3)
    warmup_ratio: float = _between(0, 1)
    scheduler: str = _one_of("cosine", "linear", "constant", "constant_with_warmup")
    max_length: int = _between(1)
    precision: str = _one_of("fp32", "bf16")
    validation_every: int = _between(1)
    variants: dict[str, Variant]


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how intervals are drawn."""

    batch_size: int = _between(1)
    questions: int | None = _between(1)
    bootstrap_samples: int = _between(1)
    seeds: tuple[int, ...] = _between(0)


@dataclass(frozen=True)
class Profile:
    """Every value of one run. Paths are absolute; relative ones in the file start at the repository root."""

    name: str
    description: str
    seed: int = _between(0, 2**32 - 1)
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
        return self.data.root / IMAGE_FOLDERS[self.data.source] if self.data.root else self.output / "data" / "images"

    def as_dict(self) -> dict[str, Any]:
        """The profile as plain values; paths inside the repository are relative to it."""
        return json.loads(json.dumps(asdict(self), default=_shorten))

    def save(self, path: str | os.PathLike) -> None:
        """Write the resolved profile as YAML that ``load_profile`` reads back. Raises InputError: cannot be written."""
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def digest(self, *sections: str) -> str:
        """SHA-256 (hexadecimal) of the named sections or keys, of all of them without arguments."""
        values = self.as_dict()
        chosen = {section: values[section] for section in sections or values}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def repository_root() -> Path:
    """The checkout that holds the package; for an installed package the working folder (above notebooks/)."""
    checkout = PROFILE_FOLDER.parents[1]
    if (checkout / "pyproject.toml").is_file():
        return checkout
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def profile_names() -> list[str]:
    """The names of the profiles that the package ships."""
    return sorted(path.stem for path in PROFILE_FOLDER.glob("*.yaml"))


def load_profile(name_or_path: str | os.PathLike, overrides: dict[str, Any] | None = None) -> Profile:
    """Read and check a profile.

    Args:
        name_or_path: a shipped profile's name, or the path of a YAML file.
        overrides: values that replace the file's, by dotted key (``{"training.max_steps": 4}``).

    The environment variable MMEDPO_DATA_ROOT replaces ``data.root`` where ``data.source`` is not ``phantom``.

    Raises:
        InputError: no such profile, not YAML, a key unknown or missing, a value of the wrong type or out of range.
    """
    path = Path(name_or_path)
    if not path.suffix and not path.is_file():
        path = PROFILE_FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            raise InputError(f"profile {str(name_or_path)!r}: unknown{nearest(str(name_or_path), profile_names())}")
    values = read_yaml(path, f"a YAML file or a profile's name: {', '.join(profile_names())}")
    for key, value in (overrides or {}).items():
        _override(values, key, value, path.name)
    data = values.get("data")
    if isinstance(data, dict) and str(data.get("source")) in IMAGE_FOLDERS and os.environ.get("MMEDPO_DATA_ROOT"):
        data["root"] = os.environ["MMEDPO_DATA_ROOT"]
    profile = build_section(Profile, values, path.name)
    _check_together(profile, path.name)
    return profile


def check_device(device: str) -> str:
    """Resolve ``lvlm.device`` to ``cpu`` or ``cuda``. Raises InputError: a GPU is asked for where torch sees none."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError("profile key `lvlm.device`: asks for cuda, but torch finds no GPU here; write auto or cpu, "
                         "or install a CUDA build of torch on a machine with a GPU")
    return ("cuda" if available else "cpu") if device == "auto" else device


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-5 as a number and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"key `{name}` is written twice")
        return super().construct_mapping(node, deep)


SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+0123456789"))


def read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises InputError: no such file (give ``expected``), or not keys and values."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give {expected}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: is not a YAML file of keys and values ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values at the top, found {type(values).__name__}")
    return values


def _override(values: dict[str, Any], key: str, value: Any, file: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.get(parent)
        if not isinstance(values, dict):
            raise InputError(f"{file}: override `{key}`: no section `{parent}`")
    values[last] = value


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown ``name``: the nearest valid one, and all of them."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, 1, 0)
    return f"; the nearest valid one is `{close[0]}` (valid: {', '.join(valid)})" if close else ""


def build_section(kind: type, values: Any, file: str, prefix: str = "") -> Any:
    """Make the dataclass ``kind`` from a mapping whose keys must be exactly its fields.

    Raises:
        InputError: names the ``file``, the key (after ``prefix``) and what was expected.
    """
    section = f"section `{prefix[:-1]}`" if prefix else "the file"
    if not isinstance(values, dict):
        raise InputError(f"{file}: {section}: expected keys and values, found {values!r}")
    hints, known = get_type_hints(kind), {item.name: item for item in fields(kind)}
    for key in values:
        if key not in known:
            raise InputError(f"{file}: unknown key `{prefix}{key}`{nearest(str(key), known)}")
    for key in known:
        if key not in values:
            raise InputError(f"{file}: missing key `{prefix}{key}`; {section} needs every one of {', '.join(known)}")
    return kind(**{key: _convert(hints[key], values[key], known[key].metadata, file, prefix + key) for key in known})


def _convert(hint: Any, value: Any, rule: Any, file: str, key: str) -> Any:
    """Check ``value`` against a type hint and a rule (choices, or low and high), and return it converted."""
    parts = get_args(hint)
    if NoneType in parts:
        return None if value is None else _convert(parts[0], value, rule, file, key)
    if is_dataclass(hint):
        return build_section(hint, value, file, f"{key}.")
    if get_origin(hint) is dict:
        names = r"[\w-]+" if is_dataclass(parts[1]) else r".+"
        if not isinstance(value, dict) or not value or any(not re.fullmatch(names, str(name)) for name in value):
            expected = "named sections (letters, digits, _, -)" if is_dataclass(parts[1]) else "keys and values"
            raise InputError(f"{file}: key `{key}`: expected {expected}, found {value!r}")
        return {str(name): _convert(parts[1], item, {}, file, f"{key}.{name}") for name, item in value.items()}
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not value or len(set(map(str, value))) < len(value):
            raise InputError(f"{file}: key `{key}`: expected a list of different values, found {value!r}")
        return tuple(_convert(parts[0], item, rule, file, f"{key}[{index}]") for index, item in enumerate(value))
    return _check_value(hint, value, rule, f"{file}: key `{key}`")


def _check_value(hint: type, value: Any, rule: Any, where: str) -> Any:
    if hint is float and type(value) is int and abs(value) < 10**300:
        value = float(value)
    if hint is Path and value and isinstance(value, str | Path):
        return Path(os.path.normpath(repository_root() / Path(value).expanduser()))
    if type(value) is not hint or value == "" or (hint is float and not math.isfinite(value)):
        raise InputError(f"{where}: expected {KINDS[hint]}, found {value!r:.80}")
    choices = rule.get("choices")
    if choices and value not in choices:
        raise InputError(f"{where}: {value!r} is not among the choices{nearest(value, choices)}")
    if rule.get("path") and (repository_root() / value).exists():
        return os.path.normpath(repository_root() / value)
    if not choices and "low" in rule and not rule["low"] <= value <= rule["high"]:
        raise InputError(f"{where}: expected a value from {rule['low']:g} to {rule['high']:g}, found {value!r}")
    return value


def _check_together(profile: Profile, file: str) -> None:
    """Rules between keys."""
    data, relevance, phantom = profile.data, profile.relevance, profile.data.source == "phantom"
    problems = {
        "data.card: expected the source's own name, for every source but folder": data.source not in ("folder", data.card),
        "data.root: expected the data set's folder, for every source but phantom": not phantom and not data.root,
        "data.root: expected null, for the source phantom": phantom and data.root,
        "data.train_patients: expected 1 or more, for the source phantom": phantom and not data.train_patients,
        "data.test_patients: expected 1 or more, for the source phantom": phantom and not data.test_patients,
        "relevance.low: expected at most relevance.high": relevance.low > relevance.high,
    } | _judge_problems(profile.judge)
    for problem, holds in problems.items():
        if holds:
            key, expected = problem.split(": ", 1)
            raise InputError(f"{file}: key `{key}`: {expected}")


def _judge_problems(judge: Judges) -> dict[str, bool]:
    """The rules between the keys of ``judge``, and whether each is broken."""
    judged, panel = judge.backend == "models", judge.panel or {}
    models = {"judge.judge": judge.judge, **{f"judge.panel.{name}": model for name, model in panel.items()}}
    problems = {"judge.judge: expected a language model, for the backend models": judged and judge.judge is None,
                "judge.panel: expected one language model or more, by name, for the backend models": judged and not panel}
    for key, model in models.items():
        if model is not None:
            endpoint, variable = model.backend == "openai", model.api_key_env or "UNUSED"
            problems[f"{key}.base_url: expected the endpoint's address, for the backend openai"] = (
                endpoint and model.base_url is None)
            problems[f"{key}.api_key_env: expected the NAME (A-Z, 0-9, _) of the environment variable that holds the "
                     "key, never the key itself"] = re.fullmatch(r"[A-Z][A-Z0-9_]*", variable) is None
    return problems


def _shorten(path: Path) -> str:
    """Relative to the repository for a path in or beside it, so that digests and saved profiles travel."""
    root = repository_root()
    return Path(os.path.relpath(path, root)).as_posix() if path.is_relative_to(root.parent) else str(path)
