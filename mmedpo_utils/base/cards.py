"""Dataset cards: what a data set is, how to get it, how its folder looks."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InputError
from .settings import PACKAGE_FOLDER, build_section, is_path, nearest, read_yaml

COUNT = {"low": 0, "high": 10**9}


@dataclass(frozen=True)
class Split:
    """Sizes of one split; None where nobody says.

    Attributes:
        items: questions or reports that the loader reads from the published files.
        images: images that those ask about.
        paper_items: the paper's count: training pairs of one stage (Table 5), or test items (Table
            6).
        paper_images: the paper's count of images (Table 6).
    """

    items: int | None = field(metadata=COUNT)
    images: int | None = field(metadata=COUNT)
    paper_items: int | None = field(metadata=COUNT)
    paper_images: int | None = field(metadata=COUNT)


@dataclass(frozen=True)
class DatasetCard:
    """One data set.

    Attributes:
        credentialed: whether its terms forbid passing it on: nothing of it may then leave the
            machine.
        access: how to get it, in words.
        layout: what must lie under the data set's folder, by path; " or " between two paths means
            that one is enough.
        oddities: what does not add up, or deserves care.
        files: SHA-256 (hexadecimal) of a file, by path; None where none is published.
    """

    name: str
    title: str
    task: str
    modality: str
    licence: str
    credentialed: bool
    homepage: str
    access: str
    layout: dict[str, str]
    splits: dict[str, Split]
    oddities: tuple[str, ...]
    files: dict[str, str | None]
    citation: str


def card_folder() -> Path:
    """The folder of the cards, data_manifests/: the checkout's, or the copy that an installed
    package brings.
    """
    checkout = PACKAGE_FOLDER.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / "data_manifests"
    return PACKAGE_FOLDER / "data_manifests"


def card_names() -> list[str]:
    """The names of the cards."""
    return sorted(path.stem for path in card_folder().glob("*.yaml"))


def load_card(name_or_path: str | os.PathLike) -> DatasetCard:
    """Read and check a dataset card.

    Args:
        name_or_path: a shipped card's name, or the path of a YAML file (with its suffix, or a
            separator in it).

    Raises:
        InputError: no such card, not YAML, a key unknown or missing, a value of the wrong type.
    """
    path = Path(name_or_path)
    if not is_path(name_or_path):
        path = card_folder() / f"{name_or_path}.yaml"
        if not path.is_file():
            raise InputError(
                f"dataset card {str(name_or_path)!r}: "
                f"unknown{nearest(str(name_or_path), card_names())}"
            )
    card = build_section(
        DatasetCard,
        read_yaml(path, f"a YAML file or a card's name: {', '.join(card_names())}"),
        path.name,
    )
    if card.name != path.stem:
        raise InputError(
            f"{path.name}: key `name`: expected the file's own name, {path.stem}, found "
            f"{card.name!r}"
        )
    for file, digest in card.files.items():
        if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise InputError(
                f"{path.name}: key `files.{file}`: expected a SHA-256 of 64 hexadecimal digits, or "
                f"null where none is known, found {digest!r}"
            )
    return card


def file_sha256(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
