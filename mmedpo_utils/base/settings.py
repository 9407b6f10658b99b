"""Settings files: YAML read strictly, checked against dataclasses, with one clear error for what
does not fit.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Hashable, Iterable
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from .errors import InputError

PACKAGE_FOLDER = Path(__file__).parents[1]
SHIPPED = "phantom"  # as a model's or a checkpoint's name: the small one that the package ships
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a non-empty text",
    Path: "a path",
}


def between(low: float = -math.inf, high: float = math.inf) -> Any:
    """A dataclass field whose value, or each of its values, lies from ``low`` to ``high``."""
    return field(metadata={"low": low, "high": high})


def one_of(*choices: str) -> Any:
    """A dataclass field whose value, or each of its values, is one of ``choices``."""
    return field(metadata={"choices": choices})


def repository_root() -> Path:
    """The checkout that holds the package; for an installed package the working folder (above
    notebooks/).
    """
    checkout = PACKAGE_FOLDER.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


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
    """The keys and values of a YAML file. Raises InputError: no such file (give ``expected``), or
    not keys and values.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give {expected}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path}: is not a YAML file of keys and values ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: expected keys and values at the top, found {type(values).__name__}"
        )
    return values


def override(values: dict[str, Any], key: str, value: Any, file: str) -> None:
    """Set the dotted ``key`` in nested ``values``. Raises InputError: names the ``file`` where a
    section is not there.
    """
    *parents, last = key.split(".")
    for parent in parents:
        values = values.get(parent)
        if not isinstance(values, dict):
            raise InputError(f"{file}: override `{key}`: no section `{parent}`")
    values[last] = value


def is_path(name_or_path: str | os.PathLike) -> bool:
    """Whether something means a file, by a suffix or a separator, rather than the name of what the
    package ships.

    A file of the same name in the working folder must not take the place of a shipped card: its
    terms could switch the privacy gate off.
    """
    text = os.fspath(name_or_path)
    return bool(Path(text).suffix) or any(mark in text for mark in (os.sep, os.altsep) if mark)


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
            raise InputError(
                f"{file}: missing key `{prefix}{key}`; {section} needs every one of "
                f"{', '.join(known)}"
            )
    return kind(
        **{
            key: _convert(hints[key], values[key], known[key].metadata, file, prefix + key)
            for key in known
        }
    )


def _convert(hint: Any, value: Any, rule: Any, file: str, key: str) -> Any:
    """Check ``value`` against a type hint and a rule (choices, or low and high), and return it
    converted.
    """
    parts = get_args(hint)
    if NoneType in parts:
        return None if value is None else _convert(parts[0], value, rule, file, key)
    if is_dataclass(hint):
        return build_section(hint, value, file, f"{key}.")
    if get_origin(hint) is dict:
        names = r"[\w-]+" if is_dataclass(parts[1]) else r".+"
        if (
            not isinstance(value, dict)
            or not value
            or any(not re.fullmatch(names, str(name)) for name in value)
        ):
            expected = (
                "named sections (letters, digits, _, -)"
                if is_dataclass(parts[1])
                else "keys and values"
            )
            raise InputError(f"{file}: key `{key}`: expected {expected}, found {value!r}")
        return {
            str(name): _convert(parts[1], item, rule, file, f"{key}.{name}")
            for name, item in value.items()
        }
    if get_origin(hint) is tuple:
        if (
            not isinstance(value, list | tuple)
            or not value
            or len(set(map(str, value))) < len(value)
        ):
            raise InputError(
                f"{file}: key `{key}`: expected a list of different values, found {value!r}"
            )
        return tuple(
            _convert(parts[0], item, rule, file, f"{key}[{index}]")
            for index, item in enumerate(value)
        )
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
    if rule.get("name") and not re.fullmatch(r"[\w-]+", value):
        raise InputError(
            f"{where}: expected a name of letters, digits, _ and -, found {value!r:.80}"
        )
    # A folder of that name must not take the place of what the package ships.
    if rule.get("path") and value != SHIPPED and (repository_root() / value).exists():
        return os.path.normpath(repository_root() / value)
    if not choices and "low" in rule and not rule["low"] <= value <= rule["high"]:
        raise InputError(
            f"{where}: expected a value from {rule['low']:g} to {rule['high']:g}, found {value!r}"
        )
    return value


SPLITS = ("train", "validation", "test")
