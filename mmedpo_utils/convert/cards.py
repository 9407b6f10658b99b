"""Dataset cards: what a data set is, how to get it, how its folder looks; and what a folder still
lacks.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from ..base.cards import DatasetCard, Split, file_sha256
from ..base.errors import InputError
from ..base.files import write_json
from ..base.images import resolve_image
from ..profiles import IMAGE_FOLDERS
from .layouts import LAYOUTS, Questions, read_layout

FOLDERS = {"phantom": ("folder", "data"), "vqa-rad-mini": ("folder", "")}


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
        rows.append(
            _line(path, content, present[0] if present else "missing", "" if present else fetch)
        )
    for path, digest in card.files.items():
        if digest is not None and (root / path).is_file():
            found = file_sha256(root / path)
            rows.append(
                _line(
                    f"{path}: SHA-256",
                    f"{digest[:12]}...",
                    f"{found[:12]}...",
                    "" if found == digest else "fetch it again, or note which version you have",
                )
            )
    try:
        with warnings.catch_warnings(record=True) as left_out:
            warnings.simplefilter("always")
            questions, folder = _read(card.name, root)
    except InputError as error:
        return [*rows, _line("questions", "readable", "not readable", str(error))]
    for split, size in card.splits.items():
        rows += _check_split(split, size, questions.get(split, []), folder)
    rows += [
        _line("rows that can be used", "all", "not all", str(warning.message))
        for warning in left_out
    ]
    return rows


def _check_split(
    split: str, size: Split, questions: list[dict[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    names = dict.fromkeys(row["image"] for row in questions)
    absent = [name for name in names if not _is_there(folder, name)]
    count, expected = len(questions), size.items
    differs = (count != expected) if expected is not None else not count
    return [
        _line(
            f"{split}: questions or reports",
            expected,
            count,
            "compare with the card's `oddities`: this is another version, or a part"
            if differs
            else "",
        ),
        _line(
            f"{split}: images",
            len(names),
            len(names) - len(absent),
            f"put the missing ones into {folder.name}/, {absent[0]} first" if absent else "",
        ),
    ]


def _line(what: str, expected: Any, found: Any, remedy: str) -> dict[str, Any]:
    return {"what": what, "expected": expected, "found": found, "what to do": remedy or "nothing"}


def _read(name: str, root: Path) -> tuple[Questions, Path]:
    """The questions of a card's data set, and its image folder."""
    layout, part = FOLDERS.get(name, (name if name in LAYOUTS else "folder", ""))
    return read_layout(layout, root / part, images=False), root / part / IMAGE_FOLDERS[layout]


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
            "with its extra "
            "`croissant`"
        ) from error
    known = {file: digest or _local(root, file) for file, digest in card.files.items()}
    distribution = [
        mlcroissant.FileObject(
            id=file.replace(" ", "_"),
            name=file,
            content_url=file,
            sha256=digest,
            encoding_formats=[ENCODINGS.get(Path(file).suffix, "application/octet-stream")],
        )
        for file, digest in known.items()
        if digest
    ]
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
    write_json(path, json.loads(json.dumps(metadata, default=str)))


def _local(root: str | os.PathLike | None, file: str) -> str | None:
    return (
        file_sha256(Path(root) / file)
        if root is not None and (Path(root) / file).is_file()
        else None
    )


def _description(card: DatasetCard) -> str:
    splits = "; ".join(
        f"{name}: {size.items} items"
        for name, size in card.splits.items()
        if size.items is not None
    )
    parts = [
        card.title,
        f"Task: {card.task}",
        f"Modality: {card.modality}",
        f"Access: {card.access}",
        f"Layout: {'; '.join(f'{path} ({content})' for path, content in card.layout.items())}",
        f"Splits: {splits}" if splits else "",
        "Credentialed: not to be passed on" if card.credentialed else "",
        *card.oddities,
    ]
    return ". ".join(part.rstrip(".") for part in parts if part) + "."
