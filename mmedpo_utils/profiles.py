"""Profiles: every value of one run, read from a commented YAML file and checked before anything
starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, StrictInt, StrictStr, model_validator

from .base.errors import InputError
from .base.files import atomic_write
from .base.older_profiles import ADDED_KEYS, bring_up_to_date
from .base.sections import (
    IMAGE_FOLDERS,
    LVLM,
    Curation,
    Data,
    Evaluation,
    Judges,
    Noise,
    Relevance,
    Training,
    VisualTool,
)
from .base.settings import (
    AbsolutePath,
    Name,
    build_section,
    is_path,
    move_outputs,
    nearest,
    override,
    read_yaml,
    repository_root,
    require,
    section,
)

PROFILE_FOLDER = Path(__file__).with_suffix("")


@section
class Profile:
    """Every value of one run. Paths are absolute; relative ones in the file start at the repository
    root.
    """

    name: Name
    description: StrictStr
    seed: Annotated[StrictInt, Field(ge=0, le=2**32 - 1)]
    output: AbsolutePath
    figures: AbsolutePath
    data: Data
    visual_tool: VisualTool
    noise: Noise
    lvlm: LVLM
    curation: Curation
    judge: Judges
    relevance: Relevance
    training: Training
    evaluation: Evaluation

    @model_validator(mode="after")
    def _weights_of_four_bits_are_not_sharded(self) -> Self:
        sharded = self.training.zero_stage == 3 and self.training.processes > 1
        several = "2 or less where several processes train on an nf4 model"
        require(not sharded or self.lvlm.quantization == "none", "training.zero_stage", several)
        return self

    @model_validator(mode="after")
    def _literal_weights_have_a_variance(self) -> Self:
        literal = any(variant.weights == "literal" for variant in self.training.variants.values())
        above = "a value above 0, by whose root the weights `literal` are divided"
        require(self.relevance.variance > 0 or not literal, "relevance.variance", above)
        return self

    @property
    def image_root(self) -> Path:
        """The folder that the ``image`` of questions and pairs is relative to."""
        if self.data.root:
            return self.data.root / IMAGE_FOLDERS[self.data.source]
        return self.output / "data" / "images"

    def as_dict(self) -> dict[str, Any]:
        """The profile as plain values; paths inside the repository are relative to it."""
        return json.loads(json.dumps(asdict(self), default=_shorten))

    def save(self, path: str | os.PathLike) -> None:
        """Write the resolved profile as YAML that ``load_profile`` reads back. Raises InputError:
        cannot be written.
        """
        text = yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def digest(self, *sections: str) -> str:
        """SHA-256 (hexadecimal) of the named sections or keys, of all of them without arguments."""
        values = self.as_dict()
        for (outer, key), before in ADDED_KEYS.items():
            if values[outer][key] == before:
                del values[outer][key]
        chosen = {key: values[key] for key in sections or values}
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
    MMEDPO_DATA_ROOT replaces ``data.root`` where ``data.source`` is not ``phantom``; MMEDPO_OUTPUT
    moves what is written (`base.settings.move_outputs`).

    Raises:
        InputError: no such profile, not YAML, a key unknown or missing, a value of the wrong type
            or out of range.
    """
    path, values = _read_profile(name_or_path)
    for key, value in (overrides or {}).items():
        override(values, key, value, path.name)
    data = values.get("data")
    root = os.environ.get("MMEDPO_DATA_ROOT")
    if root and isinstance(data, dict) and str(data.get("source")) in IMAGE_FOLDERS:
        data["root"] = root
    bring_up_to_date(values, path.name)
    move_outputs(values)
    return build_section(Profile, values, path.name)


def _read_profile(name_or_path: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """The file of a profile and its values, on top of those of the profile that it extends."""
    path, name = Path(name_or_path), str(name_or_path)
    if not is_path(name_or_path):
        path = PROFILE_FOLDER / f"{name}.yaml"
        if not path.is_file():
            raise InputError(f"profile {name!r}: unknown{nearest(name, profile_names())}")
    values = read_yaml(path, f"a YAML file or a profile's name: {', '.join(profile_names())}")
    if "extends" not in values:
        return path, values
    parent = values.pop("extends")
    others = [name for name in profile_names() if name != path.stem]
    if parent not in others:
        raise InputError(
            f"{path.name}: key `extends`: expected a shipped profile, found "
            f"{parent!r}{nearest(str(parent), others)}"
        )
    return path, _merged(_read_profile(parent)[1], values)


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``values`` on top, section by section; those of free names as a whole."""
    merged = base | values
    for key, value in values.items():
        sections = isinstance(value, dict) and isinstance(base.get(key), dict)
        if sections and key not in ("variants", "panel"):
            merged[key] = _merged(base[key], value)
    return merged


def _shorten(path: Path) -> str:
    """Relative to the repository, in or beside it, so that digests and saved profiles travel."""
    root = repository_root()
    beside = path.is_relative_to(root.parent)
    return Path(os.path.relpath(path, root)).as_posix() if beside else str(path)
