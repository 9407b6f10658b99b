"""Visual pairs of any number of images: in batches, with reading and writing beside the network,
and restartable.
"""

from __future__ import annotations

import os
import posixpath
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..base.errors import InputError
from ..base.files import atomic_write, remove_temporaries, write_json
from ..base.images import is_whole_png, open_image, resolve_image
from ..base.rows import Row, row_sha
from ..base.sections import Noise
from ..noise import noise_mask, noised_pixels
from ..pairs import HeatMapTool, generator, visual_pairs
from ..preference_rows import write_manifest
from .journal import Journal

PROGRESS_SECONDS = 30
THREADS = 2
PNG: dict[str, Any] = {"format": "PNG", "compress_level": 1, "compress_type": 3}


def curate_folder(
    questions: Sequence[Row],
    image_root: str | Path,
    folder: str | Path,
    tool: HeatMapTool,
    noise: Noise,
    seed: int,
    batch_size: int,
    inputs: str,
) -> Row:
    """Visual pairs of any number of images, restartable: killed at any point, the same call goes on
    where it was.

    Under ``folder``: ``noised/``, one PNG per image; ``visual.jsonl``, the journal, one line per
    batch; in the end ``visual.json``, the rows, and ``audit.json``. All are the same, byte for
    byte, however often the run was killed. The journal is more than `read_or_compute` keeps: days
    of work are not lost with the last batch.

    Args:
        questions: rows of ``read_questions``.
        tool: the visual tool, images to heat maps [B, h, w] and confidences [B] (`medklip_tool`).
        noise: the profile's section.
        seed: with the image's name it decides the noise, whatever the order of the questions.
        batch_size: images that the tool gets at a time.
        inputs: identifies the visual tool (and whatever else decides the result); the journal of
            another one is not used.

    Returns:
        the audit of ``audit_visual``. An image that cannot be used is skipped, with its rows.

    Raises:
        InputError: something cannot be written, or no image can be used.
    """
    folder = Path(folder)
    batches = image_batches(questions, batch_size)
    remove_temporaries(folder)
    digest = row_sha([{"batches": batches, "noise": asdict(noise), "seed": seed, "tool": inputs}])
    holds = partial(_is_written, batches, Path(image_root).resolve(), folder / "noised")
    journal = Journal(folder / "visual.jsonl", digest, holds)
    total = sum(len(batch) for batch in batches)
    done = sum(len(entry) for entry in journal.entries)
    if done:
        print(f"visual pairs: going on after {done:,} of {total:,} images")
    left = batches[len(journal.entries) :]
    said = time.monotonic()
    for records in noised_copies(left, image_root, folder / "noised", tool, noise, seed):
        journal.append(records)
        done += len(records)
        if time.monotonic() - said >= PROGRESS_SECONDS:
            print(f"visual pairs: {done:,} of {total:,} images", flush=True)
            said = time.monotonic()
    records = [record for entry in journal.entries for record in entry]
    if all("skipped" in record for record in records):
        first = records[0]["skipped"]
        raise InputError(f"{image_root}: none of {total:,} images can be used; the first: {first}")
    rows = visual_pairs(questions, records)
    write_manifest(folder / "visual.json", rows)
    audit = audit_visual(questions, records, len(rows))
    write_json(folder / "audit.json", audit)
    _say(audit)
    return audit


def _say(audit: Row) -> None:
    print(
        f"visual pairs: {audit['rows']:,} rows of {audit['images']:,} images, "
        f"{audit['rows_skipped']:,} rows skipped; mask over {audit['coverage']['mean']:.1%} of an "
        f"image; mean confidence {audit['confidence']['mean']:.2f}"
    )


def audit_visual(questions: Sequence[Row], records: Sequence[Row], rows: int) -> Row:
    """What a curation did, from the records of ``noised_copies``, at least one of them with a copy.

    Args:
        rows: how many were written.

    Returns:
        ``images`` with a copy, ``unchanged`` ones among them, ``rows``, ``rows_skipped``;
        ``coverage`` (share of an image under the mask) and ``confidence``, each with mean, least,
        most and counts in ten equal bins from 0 to 1;
        ``skipped``: per image why, and how many rows.
    """
    asked = Counter(question["image"] for question in questions)
    made = []
    skipped = []
    for record in records:
        if "skipped" not in record:
            made.append(record)
        else:
            name = record["image"]
            skipped.append({"image": name, "why": record["skipped"], "rows": asked[name]})
    return {
        "images": len(made),
        "unchanged": sum(not record["changed"] for record in made),
        "rows": rows,
        "rows_skipped": sum(entry["rows"] for entry in skipped),
        "coverage": _spread([record["coverage"] for record in made]),
        "confidence": _spread([record["confidence"] for record in made]),
        "skipped": skipped,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    return {
        "mean": round(float(np.mean(values)), 6),
        "least": min(values),
        "most": max(values),
        "bins": counts.tolist(),
    }


def _is_written(
    batches: Sequence[Sequence[str]], image_root: Path, noised_root: Path, number: int, records: Any
) -> bool:
    """Whether a journal's entry is that of its batch: a record an image, whose copies are there, or
    whose images still cannot be used.
    """
    if number >= len(batches) or not isinstance(records, list):
        return False
    names = [record.get("image") for record in records if isinstance(record, dict)]
    if names != list(batches[number]):
        return False
    for record in records:
        if "skipped" in record:
            _, image = open_or_reason(image_root, record["image"])
            if not isinstance(image, str):
                return False
        elif not is_whole_png(noised_root / record.get("rejected_image", "")):
            return False
    return True


def image_batches(questions: Sequence[Row], batch_size: int) -> list[list[str]]:
    """The images that the questions ask about, each once, by name, in batches.

    Raises:
        InputError: the noised copies of two images would have the same name.
    """
    names = sorted({question["image"] for question in questions})
    owners: dict[str, str] = {}
    for name in names:
        other = owners.setdefault(_target(posixpath.normpath(name)), name)
        if posixpath.normpath(other) != posixpath.normpath(name):
            raise InputError(
                f"images {other!r} and {name!r}: their noised copies would have the same name; "
                "rename one"
            )
    return [names[start : start + batch_size] for start in range(0, len(names), batch_size)]


def noised_copies(
    batches: Sequence[Sequence[str]],
    image_root: str | Path,
    noised_root: str | Path,
    tool: HeatMapTool,
    noise: Noise,
    seed: int,
) -> Iterator[list[Row]]:
    """Let the visual tool look at images batch by batch, and write their noised copies; the next
    batch is decoded meanwhile.

    Yields:
        one list per batch, when its copies are on disk: ``image`` with ``rejected_image``,
        ``confidence``, ``coverage`` (share of the image under the mask) and ``changed``, or with
        ``skipped``, why the image cannot be used.

    Raises:
        InputError: a copy cannot be written.
    """
    root = Path(image_root).resolve()
    if not batches:
        return
    with ThreadPoolExecutor(THREADS) as pool:

        def decode(names: Sequence[str]) -> list[Future]:
            return [pool.submit(open_or_reason, root, name) for name in names]

        decoding = decode(batches[0])
        writing: list[Future] = []
        for number, batch in enumerate(batches):
            opened = [task.result() for task in decoding]
            if number + 1 < len(batches):
                decoding = decode(batches[number + 1])
            looked = iter(_look(tool, [image for _, image in opened]))
            if writing:
                yield [task.result() for task in writing]
            writing = []
            for name, (path, image) in zip(batch, opened, strict=True):
                if isinstance(image, str):
                    writing.append(pool.submit(dict, image=name, skipped=image))
                else:
                    heat, score = next(looked)
                    writing.append(
                        pool.submit(
                            _write, name, path, image, heat, score, Path(noised_root), noise, seed
                        )
                    )
            del opened  # a batch of large images is not kept while the next one is looked at
        yield [task.result() for task in writing]


def _look(tool: HeatMapTool, opened: Sequence[Image.Image | str]) -> list[tuple[np.ndarray, float]]:
    """Heat map and confidence of each image that could be opened, in order."""
    images = [image for image in opened if not isinstance(image, str)]
    if not images:
        return []
    heats, scores = tool(images)
    return list(zip(heats, scores, strict=True))


def open_or_reason(root: Path, name: str) -> tuple[str, Image.Image | str]:
    """The path of an image inside ``root``, and the image or why it cannot be used."""
    try:
        path = resolve_image(root, name)
        return path.relative_to(root).as_posix(), open_image(path)
    except InputError as error:
        return name, str(error)


def _write(
    name: str,
    path: str,
    image: Image.Image,
    heat: np.ndarray,
    score: float,
    noised_root: Path,
    noise: Noise,
    seed: int,
) -> Row:
    """Write the noised copy of one image and return its record. The image's path in its root
    decides the noise.
    """
    pixels = np.asarray(image)
    mask = noise_mask(heat, pixels.shape[:2], noise.kind, noise.mask, noise.quantile)
    noised = noised_pixels(pixels, mask, noise.kind, noise.signal, generator(seed, path))
    with atomic_write(noised_root / _target(path)) as temporary, open(temporary, "wb") as stream:
        Image.fromarray(noised).save(stream, **PNG)
        stream.flush()
        os.fsync(stream.fileno())
    return {
        "image": name,
        "rejected_image": _target(path),
        "confidence": round(float(score), 6),
        "coverage": round(float((mask > 0).mean()), 6),
        "changed": not np.array_equal(noised, pixels),
    }


def _target(path: str) -> str:
    return path if path.endswith(".png") else f"{path}.png"
