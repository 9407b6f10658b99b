"""Dataset cards: what a data set is, how to get it, how its folder looks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, StrictBool, StrictInt, StrictStr

from .errors import InputError
from .settings import (
    PACKAGE_FOLDER,
    Different,
    Sections,
    Values,
    build_section,
    is_path,
    nearest,
    read_yaml,
    section,
)


def _is_sha256(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError("expected a SHA-256 of 64 hexadecimal digits, or null where none is known")
    return digest


Count = Annotated[StrictInt, Field(ge=0, le=10**9)]
Sha256 = Annotated[StrictStr, AfterValidator(_is_sha256)]


@section
class Split:
    """Sizes of one split; None where nobody says.

    Attributes:
        items: questions or reports that the loader reads from the published files.
        images: images that those ask about.
        paper_items: the paper's count: training pairs of one stage (Table 5), or test items (Table
            6).
        paper_images: the paper's count of images (Table 6).
    """

    items: Count | None
    images: Count | None
    paper_items: Count | None
    paper_images: Count | None


@section
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

    name: StrictStr
    title: StrictStr
    task: StrictStr
    modality: StrictStr
    licence: StrictStr
    credentialed: StrictBool
    homepage: StrictStr
    access: StrictStr
    layout: Values[StrictStr]
    splits: Sections[Split]
    oddities: Different[StrictStr]
    files: Values[Sha256 | None]
    citation: StrictStr


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
    path, name = Path(name_or_path), str(name_or_path)
    if not is_path(name_or_path):
        path = card_folder() / f"{name}.yaml"
        if not path.is_file():
            raise InputError(f"dataset card {name!r}: unknown{nearest(name, card_names())}")
    expected = f"a YAML file or a card's name: {', '.join(card_names())}"
    card = build_section(DatasetCard, read_yaml(path, expected), path.name)
    if card.name != path.stem:
        raise InputError(
            f"{path.name}: key `name`: expected the file's own name, {path.stem}, found "
            f"{card.name!r}"
        )
    return card
