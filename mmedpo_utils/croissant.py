"""A dataset card as Croissant metadata (JSON-LD), through mlcroissant, which the extra ``croissant`` installs."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .cards import DatasetCard, file_sha256
from .errors import InputError
from .files import write_json

ENCODINGS = {".json": "application/json", ".jsonl": "application/jsonlines", ".csv": "text/csv", ".gz": "application/gzip"}


def export_croissant(card: DatasetCard, path: str | os.PathLike, root: str | os.PathLike | None = None) -> None:
    """Write a card as Croissant 1.0 metadata, atomically.

    Croissant asks for a hash of every file. A file whose hash the card does not know is hashed where it lies under
    ``root``; without one it is named in the description only. No question, answer or image goes into the metadata.

    Raises:
        InputError: mlcroissant is not installed, the card makes no valid metadata, or there is no place to write.
    """
    try:
        import mlcroissant
    except ImportError as error:
        raise InputError("Croissant export needs mlcroissant, which is not installed; install the package with its extra "
                         "`croissant`") from error
    known = {file: digest or _local(root, file) for file, digest in card.files.items()}
    distribution = [mlcroissant.FileObject(id=file.replace(" ", "_"), name=file, content_url=file, sha256=digest,
                                           encoding_formats=[ENCODINGS.get(Path(file).suffix, "application/octet-stream")])
                    for file, digest in known.items() if digest]
    try:
        metadata = mlcroissant.Metadata(name=card.name, description=_description(card), license=[card.licence], url=card.homepage,
                                        cite_as=card.citation, distribution=distribution).to_json()
    except mlcroissant.ValidationError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{card.name}: makes no valid Croissant metadata ({reason}); correct the card") from error
    write_json(path, json.loads(json.dumps(metadata, default=str)))


def _local(root: str | os.PathLike | None, file: str) -> str | None:
    return file_sha256(Path(root) / file) if root is not None and (Path(root) / file).is_file() else None


def _description(card: DatasetCard) -> str:
    splits = "; ".join(f"{name}: {size.items} items" for name, size in card.splits.items() if size.items is not None)
    parts = [card.title, f"Task: {card.task}", f"Modality: {card.modality}", f"Access: {card.access}",
             f"Layout: {'; '.join(f'{path} ({content})' for path, content in card.layout.items())}",
             f"Splits: {splits}" if splits else "", "Credentialed: not to be passed on" if card.credentialed else "",
             *card.oddities]
    return ". ".join(part.rstrip(".") for part in parts if part) + "."
