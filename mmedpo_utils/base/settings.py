"""Settings files: YAML read strictly, pydantic's checks, one clear error for what does not fit."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Hashable, Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StrictStr, TypeAdapter
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError, ValidationError

from .errors import InputError

PACKAGE_FOLDER = Path(__file__).parents[1]
SHIPPED = "phantom"  # as a model's or a checkpoint's name: the small one that the package ships
SPLITS = ("train", "validation", "test")


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
    """SafeLoader that reads 3e-5 as a number, and refuses what reads otherwise than it looks: a key
    written twice, 010 (octal, 8), 1:30 (sixties, 90); and aliases, of which a short file can make
    an endless one.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: `*{event.anchor}` is an alias, and none is "
                "read: write the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # A key that is itself keys and values cannot be one: SafeLoader says so.
            name = str(key.value)
            if name in seen:
                raise yaml.YAMLError(f"key `{name}` is written twice")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        whole = node.tag.endswith("int")
        plain = PLAIN_INTEGER.fullmatch(node.value) if whole else ":" not in node.value
        if not plain:
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: `{node.value}` does not mean in YAML what it "
                "looks like: write a decimal number without a leading 0 and without colons, or a "
                "text in quotes"
            )
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


PLAIN_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
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
        inner = values.get(parent)
        if not isinstance(inner, dict):
            raise InputError(f"{file}: override `{key}`: no section `{parent}`")
        values = inner
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


# A section of a settings file is a frozen dataclass that takes exactly its own keys. Its errors
# show no values: what somebody writes for `api_key_env` may be the key itself.
STRICT = ConfigDict(
    extra="forbid", str_min_length=1, allow_inf_nan=False, hide_input_in_errors=True
)
if TYPE_CHECKING:
    # A type checker reads sections as the dataclasses that they are; it knows no decorator that a
    # call has made.
    from dataclasses import dataclass as section
else:
    section = dataclass(frozen=True, config=STRICT)


def require(holds: Any, key: str, expected: str) -> None:
    """A rule between keys, for a section's validator: the error names the section's ``key``."""
    if not holds:
        raise PydanticCustomError("rule", f"expected {expected}", {"key": key})


def _absolute(value: Any) -> Path:
    if not value or not isinstance(value, str | Path):
        raise ValueError("expected a path")
    return Path(os.path.normpath(repository_root() / Path(value).expanduser()))


def move_outputs(values: dict[str, Any]) -> None:
    """Let a profile's ``output`` and ``figures`` begin in the folder MMEDPO_OUTPUT, where that
    environment variable is set, and not in the repository. A path that leads out of the repository,
    or into that folder, stays: so it stands in the profile of a run that was moved.
    """
    variable = os.environ.get("MMEDPO_OUTPUT")
    if not variable:
        return
    base = Path(os.path.abspath(variable))
    for key in ("output", "figures"):
        path = values.get(key)
        if not isinstance(path, str):
            continue
        usual = Path(os.path.normpath(repository_root() / Path(path).expanduser()))
        if usual.is_relative_to(repository_root()) and not usual.is_relative_to(base):
            values[key] = str(base / path)


def _where_it_lies(name: str) -> str:
    # A folder of that name must not take the place of what the package ships.
    if name == SHIPPED or not (repository_root() / name).exists():
        return name
    return os.path.normpath(repository_root() / name)


def _different(values: Any) -> Any:
    if not isinstance(values, list | tuple) or not 0 < len(values) == len(set(map(str, values))):
        raise ValueError("expected a list of different values")
    return values


def _keyed(pattern: str, expected: str) -> BeforeValidator:
    def check(values: Any) -> dict[str, Any]:
        if not isinstance(values, dict) or not values:
            raise ValueError(f"expected {expected}")
        for key in values:
            if not isinstance(key, str):
                # YAML reads `no` as false and `1` as a number.
                raise ValueError(f"expected {expected}; write the name {key!r} in quotes")
            if not re.fullmatch(pattern, key):
                raise ValueError(f"expected {expected}")
        return values

    return BeforeValidator(check)


T = TypeVar("T")
Name = Annotated[StrictStr, Field(pattern=r"^[\w-]+$")]
# A model's or a checkpoint's name, which becomes a path where the repository holds it.
ModelName = Annotated[StrictStr, AfterValidator(_where_it_lies)]
AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]
Different = Annotated[tuple[T, ...], BeforeValidator(_different)]
Values = Annotated[dict[str, T], _keyed(r".+", "keys and values")]
Sections = Annotated[dict[str, T], _keyed(r"[\w-]+", "named sections (letters, digits, _, -)")]


def build_section(kind: type, values: dict[str, Any], file: str) -> Any:
    """Make the ``section`` class ``kind`` from a mapping whose keys must be exactly its fields.

    Raises:
        InputError: names the ``file``, the key and what was expected.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as errors:
        raise InputError(f"{file}: {_sentence(kind, errors)}") from None


# A misspelt key is a missing one too: the unknown one says more.
KEY_ERRORS = {"unexpected_keyword_argument": 0, "invalid_key": 0, "missing": 1}
EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "string_pattern_mismatch": "a name of letters, digits, _ and -",
}


def _sentence(kind: type, errors: ValidationError) -> str:
    """The first of pydantic's errors, as: which key, what was expected, what was found."""
    first = min(errors.errors(), key=lambda error: KEY_ERRORS.get(error["type"], 2))
    what, place, found = first["type"], first["loc"], first["input"]
    if what in KEY_ERRORS:
        *outer, key = map(str, place)
        known = [field.name for field in fields(_declared(kind, outer)[0])]
        if what == "invalid_key":  # `no: 1` in YAML has the key False, and 0 in its place
            key = str(found)
        if what != "missing":
            return f"unknown key `{_dotted([*outer, key])}`{nearest(key, known)}"
        where = f"section `{_dotted(outer)}`" if outer else "the file"
        return f"missing key `{_dotted(place)}`; {where} needs every one of {', '.join(known)}"
    if what == "dataclass_type":
        return f"section `{_dotted(place)}`: expected keys and values, found {found!r:.80}"
    if what == "rule":
        return f"key `{_dotted([*place, first['ctx']['key']])}`: {first['msg']}"
    hint, low, high = _declared(kind, place)
    if what == "value_error":
        problem = f"{first['ctx']['error']}, found {found!r:.80}"
    elif what == "literal_error" and found and isinstance(found, str):
        problem = f"{found!r} is not among the choices{nearest(found, get_args(hint))}"
    elif what in ("greater_than_equal", "less_than_equal"):
        problem = f"expected a value from {low:g} to {high:g}, found {found!r}"
    else:
        problem = f"expected {EXPECTED.get(what, 'a non-empty text')}, found {found!r:.80}"
    return f"key `{_dotted(place)}`: {problem}"


def _declared(kind: Any, place: Iterable[str | int]) -> tuple[Any, float, float]:
    """What the sections declare at a ``place``: the bare type, its lowest and highest value."""
    low = -math.inf
    high = math.inf
    for key in place:
        if is_dataclass(kind):
            kind = get_type_hints(kind, include_extras=True)[str(key)]
        else:
            kind = get_args(kind)[1 if get_origin(kind) is dict else 0]
        while get_origin(kind) in (Annotated, Union, UnionType):  # X | None, with X first
            for rule in getattr(kind, "__metadata__", ()):
                for limit in getattr(rule, "metadata", ()):  # those of Field
                    low = getattr(limit, "ge", low)
                    high = getattr(limit, "le", high)
            kind = get_args(kind)[0]
    return kind, low, high


def _dotted(place: Iterable[str | int]) -> str:
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in place]
    return "".join(parts).removeprefix(".")
