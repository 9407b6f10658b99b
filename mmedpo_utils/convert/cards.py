"""Dataset cards: what a data set is, how to get it, how its folder looks; and what a folder still
lacks.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from ..base.cards import DatasetCard, Split
from ..base.errors import InputError
from ..base.files import file_sha256, write_json
from ..base.images import resolve_image
from ..base.sections import IMAGE_FOLDERS
from .layouts import LAYOUTS, Questions, read_layout

FOLDERS = {"phantom": ("folder", "data"), "vqa-rad-mini": ("folder", "")}
OTHER_VERSION = "compare with the card's `oddities`: this is another version, or a part"


def check_dataset(card: DatasetCard, root: str | os.PathLike) -> list[dict[str, Any]]:
    """Compare a folder with its card: files, hashes, questions and images per split.

    Nothing is decoded, and absent or damaged data raises nothing: it becomes a row.

    Args:
        root: the data set's folder (of the phantom world: the profile's output folder).

    Returns:
        one row per thing looked at: ``what``, ``expected``, ``found``, ``what to do`` ("nothing"
            where it is as expected).
    """
    root = Path(root)
    fetch = f"fetch it: {card.access}"
    rows = []
    for path, content in card.layout.items():
        present = [option for option in path.split(" or ") if (root / option).exists()]
        if present:
            rows.append(_line(path, content, present[0], ""))
        else:
            rows.append(_line(path, content, "missing", fetch))
    for path, digest in card.files.items():
        if digest is not None and (root / path).is_file():
            found = file_sha256(root / path)
            remedy = "" if found == digest else "fetch it again, or note which version you have"
            what = f"{path}: SHA-256"
            rows.append(_line(what, f"{digest[:12]}...", f"{found[:12]}...", remedy))
    try:
        with warnings.catch_warnings(record=True) as left_out:
            warnings.simplefilter("always")
            questions, folder = _read(card.name, root)
    except InputError as error:
        return [*rows, _line("questions", "readable", "not readable", str(error))]
    for split, size in card.splits.items():
        rows += _check_split(split, size, questions.get(split, []), folder)
    for warning in left_out:
        rows.append(_line("rows that can be used", "all", "not all", str(warning.message)))
    return rows


def _check_split(
    split: str, size: Split, questions: list[dict[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """How many questions a split has, and how many of their images are there."""
    names = dict.fromkeys(row["image"] for row in questions)
    absent = [name for name in names if not _is_there(folder, name)]
    count = len(questions)
    # Where the card gives no number, any is right but 0.
    as_expected = count > 0 if size.items is None else count == size.items
    compare = "" if as_expected else OTHER_VERSION
    put = f"put the missing ones into {folder.name}/, {absent[0]} first" if absent else ""
    return [
        _line(f"{split}: questions or reports", size.items, count, compare),
        _line(f"{split}: images", len(names), len(names) - len(absent), put),
    ]


def _line(what: str, expected: Any, found: Any, remedy: str) -> dict[str, Any]:
    return {"what": what, "expected": expected, "found": found, "what to do": remedy or "nothing"}


def _read(name: str, root: Path) -> tuple[Questions, Path]:
    """The questions of a card's data set, and its image folder."""
    own = name if name in LAYOUTS else "folder"
    layout, part = FOLDERS.get(name, (own, ""))
    questions = read_layout(layout, root / part, images=False)
    return questions, root / part / IMAGE_FOLDERS[layout]


def _is_there(folder: Path, name: str) -> bool:
    try:
        return resolve_image(folder, name).is_file()
    except InputError:
        return False


ENCODINGS = {
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".csv": "text/csv",
    ".gz": "application/gzip",
}


def export_croissant(
    card: DatasetCard, path: str | os.PathLike, root: str | os.PathLike | None = None
) -> None:
    """Write a card as Croissant 1.0 metadata, atomically.

    Croissant asks for a hash of every file. A file whose hash the card does not know is hashed
    where it lies under ``root``; without one it is named in the description only. No question,
    answer or image goes into the metadata.

    Raises:
        InputError: mlcroissant is not installed, the card makes no valid metadata, or there is no
            place to write.
    """
    try:
        import mlcroissant
    except ImportError as error:
        raise InputError(
            "Croissant export needs mlcroissant, which is not installed; install the package "
            "with its extra `croissant`"
        ) from error
    distribution = []
    for file, known in card.files.items():
        digest = known or _local_digest(root, file)
        if digest is None:
            continue
        described = mlcroissant.FileObject(
            id=file.replace(" ", "_"),
            name=file,
            content_url=file,
            sha256=digest,
            encoding_formats=[ENCODINGS.get(Path(file).suffix, "application/octet-stream")],
        )
        distribution.append(described)
    try:
        metadata = mlcroissant.Metadata(
            name=card.name,
            description=_description(card),
            license=[card.licence],
            url=card.homepage,
            cite_as=card.citation,
            distribution=distribution,
        ).to_json()
    except mlcroissant.ValidationError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{card.name}: makes no valid Croissant metadata ({reason}); correct the card"
        ) from error
    # The metadata holds dates, which JSON does not: they become texts.
    write_json(path, json.loads(json.dumps(metadata, default=str)))


def _local_digest(root: str | os.PathLike | None, file: str) -> str | None:
    """The hash of a file under ``root``; None without a root, or where the file is not there."""
    if root is None or not (Path(root) / file).is_file():
        return None
    return file_sha256(Path(root) / file)


def _description(card: DatasetCard) -> str:
    """The card in sentences, for the fields that Croissant has no place for."""
    layout = "; ".join(f"{path} ({content})" for path, content in card.layout.items())
    parts = [
        card.title,
        f"Task: {card.task}",
        f"Modality: {card.modality}",
        f"Access: {card.access}",
        f"Layout: {layout}",
    ]
    sizes = {name: size.items for name, size in card.splits.items() if size.items is not None}
    if sizes:
        splits = "; ".join(f"{name}: {items} items" for name, items in sizes.items())
        parts.append(f"Splits: {splits}")
    if card.credentialed:
        parts.append("Credentialed: not to be passed on")
    parts += card.oddities
    return ". ".join(part.rstrip(".") for part in parts if part) + "."
