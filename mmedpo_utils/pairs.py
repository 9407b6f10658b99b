"""Preference pairs: text pairs D_t, visual pairs D_v, and both in one manifest D_o (arXiv
2412.06141, curation).
"""

from __future__ import annotations

import os
import posixpath
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .base.errors import InputError
from .base.files import atomic_write
from .base.images import open_image, resolve_image
from .medklip import MedKLIP, confidence, heat_map
from .noise import (
    lesion_mask,
    localized_noise,
    released_mask,
    released_noise,
    signal_schedule,
    step_for_signal,
)
from .preference_rows import Row, pair_row, question_text, row_source
from .profiles import Noise
from .relevance import Judge, Member, choose_rejected, debate

THREADS, SMALLEST_BATCH = 2, 8
PNG = {"format": "PNG", "compress_level": 1, "compress_type": 3}
Look = Callable[[Sequence[Image.Image]], tuple[np.ndarray, np.ndarray]]


def medklip_look(model: MedKLIP, query: str = "disease") -> Look:
    """Bind the visual tool: images to heat maps [B, 14, 14] and confidences [B] in [0, 1] for
    ``query``.

    A small batch is filled up with copies of its last image: the kernels for few images round
        differently, and an image
    shall read the same in every batch.
    """

    @torch.inference_mode()
    def look(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        filled = [*images, *[images[-1]] * (SMALLEST_BATCH - len(images))]
        output = model(model.preprocess(filled))
        heat, scores = heat_map(output, query), confidence(output, query)
        return heat[: len(images)].cpu().numpy(), scores[: len(images)].cpu().numpy()

    return look


def pick_questions(questions: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most ``count`` of the questions, drawn without replacement, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(questions))[:count]
    return [questions[index] for index in sorted(chosen)]


def text_pairs(
    questions: Sequence[Row],
    candidates: Sequence[Sequence[str]],
    judge: Judge,
    members: Sequence[Member],
    threshold: float,
    rounds: int,
    seed: int,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """D_t: same image; preferred is the reference answer, rejected a hallucinated response scored
    by the panel.

    Args:
        questions: rows of ``read_questions``.
        candidates: sampled responses, one sequence per question.
        threshold: conflict from which a sampled response is taken.
        seed: with the question's id it decides what the judge writes, whatever the order of the
            questions.

    Returns:
        preference rows (``origin``: sampled or written), and per row the debate with its history.
    """
    rows, debates = [], []
    for question, responses in zip(questions, candidates, strict=True):
        text, answer = question_text(question), question["gpt4_answer"]
        rng = generator(seed, str(question["question_id"]))
        rejected = choose_rejected(text, answer, responses, judge, threshold, rng)
        result = debate(text, answer, rejected.text, members, rounds)
        rows.append(
            pair_row(question, rejected.text, result.score, source="text", origin=rejected.origin)
        )
        debates.append(
            {
                "id": question["question_id"],
                "question": text,
                "answer": answer,
                "rejected": rejected.text,
                "origin": rejected.origin,
                "conflict": rejected.conflict,
                **result.as_dict(),
            }
        )
    return rows, debates


def visual_pairs(
    questions: Sequence[Row],
    image_root: str | Path,
    noised_root: str | Path,
    look: Look,
    noise: Noise,
    seed: int,
    batch_size: int = 32,
) -> list[Row]:
    """D_v: same answer; preferred with the image, rejected with its noised copy. Writes the copies
    as 8-bit PNG.

    Args:
        look: the visual tool, images to heat maps [B, h, w] and confidences [B] (``medklip_look``).
        seed: with the image's name it decides the noise, whatever the order of the questions.
        batch_size: images that ``look`` gets at a time.

    Returns:
        preference rows; ``weighted_score`` is the tool's confidence, ``rejected_image`` is relative
        to ``noised_root``. Warns where the noise leaves an image as it is.

    Raises:
        InputError: an image cannot be used, or a copy cannot be written.
    """
    records = []
    for batch in noised_copies(
        image_batches(questions, batch_size), image_root, noised_root, look, noise, seed
    ):
        for record in batch:
            if "skipped" in record:
                raise InputError(record["skipped"])
            records.append(record)
    return visual_rows(questions, records)


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
    look: Look,
    noise: Noise,
    seed: int,
) -> Iterator[list[Row]]:
    """Look at images batch by batch and write their noised copies; the next batch is decoded
    meanwhile.

    Yields:
        one list per batch, when its copies are on disk: ``image`` with ``rejected_image``,
            ``confidence``, ``coverage``
        (share of the image under the mask) and ``changed``, or with ``skipped``, why the image
        cannot be used.

    Raises:
        InputError: a copy cannot be written.
    """
    root, batches = Path(image_root).resolve(), list(batches)
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = [pool.submit(open_or_reason, root, name) for name in batches[0]] if batches else []
        writing: list[Future[Row]] = []
        for batch, following in zip(batches, [*batches[1:], []]):
            opened = [task.result() for task in ahead]
            ahead = [pool.submit(open_or_reason, root, name) for name in following]
            images = [image for _, image in opened if isinstance(image, Image.Image)]
            looks = iter(zip(*look(images), strict=True)) if images else iter(())
            if writing:
                yield [task.result() for task in writing]
            writing = [
                pool.submit(_write, name, path, image, next(looks), Path(noised_root), noise, seed)
                if isinstance(image, Image.Image)
                else pool.submit(dict, image=name, skipped=image)
                for name, (path, image) in zip(batch, opened, strict=True)
            ]
            del opened, images
        if writing:
            yield [task.result() for task in writing]


def visual_rows(questions: Sequence[Row], records: Sequence[Row]) -> list[Row]:
    """Preference rows of the questions whose image has a noised copy, from the records of
    ``noised_copies``.

    Warns where the noise left an image as it is.
    """
    made = {record["image"]: record for record in records if "skipped" not in record}
    unchanged = [name for name, record in made.items() if not record["changed"]]
    if unchanged:
        warnings.warn(
            f"{len(unchanged)} of {len(made)} images are left unchanged by the noise and teach "
            "nothing "
            f"({', '.join(unchanged[:5])}); check the profile's noise section",
            stacklevel=3,
        )
    return [
        pair_row(
            question,
            question["gpt4_answer"],
            made[question["image"]]["confidence"],
            source="visual",
            rejected_image=made[question["image"]]["rejected_image"],
        )
        for question in questions
        if question["image"] in made
    ]


def reject_image(
    image: Image.Image, heat: np.ndarray, noise: Noise, rng: np.random.Generator
) -> Image.Image:
    """The noised copy of an image (mode L or RGB) at its own size, by the profile's noise section.

    Args:
        heat: heat map of the image. Shape: [h, w].
    """
    return _noised(image, _noise_mask(heat, (image.height, image.width), noise), noise, rng)


def _noise_mask(heat: np.ndarray, size: tuple[int, int], noise: Noise) -> np.ndarray:
    """Where the noise goes, and how much of it: bool for the released kind, else float32 in [0, 1].
    Shape: [H, W].
    """
    if noise.kind == "released":
        cell = 224 // len(heat)
        return released_mask(np.kron(heat, np.ones((cell, cell))), size)
    if noise.kind == "global":
        return np.ones(size, np.float32)
    return lesion_mask(heat, size, noise.mask, noise.quantile)


def _noised(
    image: Image.Image, mask: np.ndarray, noise: Noise, rng: np.random.Generator
) -> Image.Image:
    pixels = np.asarray(image)
    if noise.kind == "released":
        return Image.fromarray(released_noise(pixels, mask, rng))
    schedule = signal_schedule()
    alpha_bar = float(schedule[step_for_signal(schedule, noise.signal)])
    noised = localized_noise(pixels.astype(np.float32) / 255, mask, alpha_bar, rng)
    return Image.fromarray(np.round(noised * 255).astype(np.uint8))


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
    looked: tuple[np.ndarray, float],
    noised_root: Path,
    noise: Noise,
    seed: int,
) -> Row:
    """Write the noised copy of one image and return its record. The image's path in its root
    decides the noise.
    """
    mask = _noise_mask(looked[0], (image.height, image.width), noise)
    noised = _noised(image, mask, noise, generator(seed, path))
    with atomic_write(noised_root / _target(path)) as temporary, open(temporary, "wb") as stream:
        noised.save(stream, **PNG)
        stream.flush()
        os.fsync(stream.fileno())
    return {
        "image": name,
        "rejected_image": _target(path),
        "confidence": round(float(looked[1]), 6),
        "coverage": round(float((mask > 0).mean()), 6),
        "changed": not np.array_equal(noised, image),
    }


def _target(path: str) -> str:
    return path if path.endswith(".png") else f"{path}.png"


def merge_pairs(text_rows: Sequence[Row], visual_rows: Sequence[Row]) -> list[Row]:
    """D_o: text rows, then visual rows, each with its ``source``; text rows without an ``origin``
    are released ones.
    """
    rows = [{"origin": "released", **row, "source": row_source(row)} for row in text_rows]
    return rows + [row | {"source": row_source(row)} for row in visual_rows]


def generator(seed: int, name: str) -> np.random.Generator:
    """Random draws that ``seed`` and ``name`` decide, whatever the order of the names."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
