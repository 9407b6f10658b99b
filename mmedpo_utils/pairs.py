"""Preference pairs: text pairs D_t, visual pairs D_v, and both in one manifest D_o (arXiv 2412.06141, curation)."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .files import atomic_write
from .hallucinate import Judge, choose_rejected
from .manifests import Row, open_image, pair_row, question_text, resolve_image, row_source
from .medklip import MedKLIP, confidence, heat_map
from .noise import (
    global_noise,
    lesion_mask,
    localized_noise,
    released_mask,
    released_noise,
    signal_schedule,
    step_for_signal,
)
from .profiles import Noise
from .relevance import Member, debate

Look = Callable[[Sequence[Image.Image]], tuple[np.ndarray, np.ndarray]]


def medklip_look(model: MedKLIP, query: str = "disease") -> Look:
    """Bind the visual tool: images to heat maps [B, 14, 14] and confidences [B] in [0, 1] for ``query``."""
    @torch.inference_mode()
    def look(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        output = model(model.preprocess(images))
        return heat_map(output, query).cpu().numpy(), confidence(output, query).cpu().numpy()

    return look


def pick_questions(questions: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most ``count`` of the questions, drawn without replacement, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(questions))[:count]
    return [questions[index] for index in sorted(chosen)]


def text_pairs(
    questions: Sequence[Row], candidates: Sequence[Sequence[str]], judge: Judge, members: Sequence[Member],
    threshold: float, rounds: int, seed: int,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """D_t: same image; preferred is the reference answer, rejected a hallucinated response scored by the panel.

    Args:
        questions: rows of ``read_questions``.
        candidates: sampled responses, one sequence per question.
        threshold: conflict from which a sampled response is taken.
        seed: with the question's id it decides what the judge writes, whatever the order of the questions.

    Returns:
        preference rows (``origin``: sampled or written), and per row the debate with its history.
    """
    rows, debates = [], []
    for question, responses in zip(questions, candidates, strict=True):
        text, answer = question_text(question), question["gpt4_answer"]
        rng = _generator(seed, str(question["question_id"]))
        rejected = choose_rejected(text, answer, responses, judge, threshold, rng)
        result = debate(text, answer, rejected.text, members, rounds)
        rows.append(pair_row(question, rejected.text, result.score, source="text", origin=rejected.origin))
        debates.append({"id": question["question_id"], "question": text, "answer": answer, "rejected": rejected.text,
                        "origin": rejected.origin, "conflict": rejected.conflict, **result.as_dict()})
    return rows, debates


def visual_pairs(
    questions: Sequence[Row], image_root: str | Path, noised_root: str | Path, look: Look, noise: Noise, seed: int,
    batch_size: int = 32,
) -> list[Row]:
    """D_v: same answer; preferred with the image, rejected with its noised copy. Writes the copies as 8-bit PNG.

    Args:
        look: the visual tool, images to heat maps [B, h, w] and confidences [B] (``medklip_look``).
        seed: with the image's name it decides the noise, whatever the order of the questions.
        batch_size: images that ``look`` gets at a time.

    Returns:
        preference rows; ``weighted_score`` is the tool's confidence, ``rejected_image`` is relative to ``noised_root``.
        Warns where the noise leaves an image as it is.

    Raises:
        InputError: an image cannot be used, or a copy cannot be written.
    """
    names = list(dict.fromkeys(question["image"] for question in questions))
    made: dict[str, tuple[str, float]] = {}
    unchanged = []
    for start in range(0, len(names), batch_size):
        batch = names[start : start + batch_size]
        paths = [resolve_image(image_root, name) for name in batch]
        images = [open_image(path) for path in paths]
        for name, path, image, heat, score in zip(batch, paths, images, *look(images), strict=True):
            target = path.relative_to(Path(image_root).resolve()).as_posix()
            target += "" if target.endswith(".png") else ".png"
            noised = reject_image(image, heat, noise, _generator(seed, name))
            if np.array_equal(noised, image):
                unchanged.append(name)
            with atomic_write(Path(noised_root) / target) as temporary:
                noised.save(temporary, format="PNG")
            made[name] = target, round(float(score), 6)
    if unchanged:
        warnings.warn(f"{len(unchanged)} of {len(names)} images are left unchanged by the noise and teach nothing "
                      f"({', '.join(unchanged[:5])}); check the profile's noise section", stacklevel=2)
    return [pair_row(question, question["gpt4_answer"], made[question["image"]][1], source="visual",
                     rejected_image=made[question["image"]][0]) for question in questions]


def reject_image(image: Image.Image, heat: np.ndarray, noise: Noise, rng: np.random.Generator) -> Image.Image:
    """The noised copy of an image (mode L or RGB) at its own size, by the profile's noise section.

    Args:
        heat: heat map of the image. Shape: [h, w].
    """
    pixels = np.asarray(image)
    size = pixels.shape[:2]
    if noise.kind == "released":
        cell = 224 // len(heat)
        return Image.fromarray(released_noise(pixels, released_mask(np.kron(heat, np.ones((cell, cell))), size), rng))
    schedule = signal_schedule()
    alpha_bar = float(schedule[step_for_signal(schedule, noise.signal)])
    values = pixels.astype(np.float32) / 255
    if noise.kind == "global":
        noised = global_noise(values, alpha_bar, rng)
    else:
        noised = localized_noise(values, lesion_mask(heat, size, noise.mask, noise.quantile), alpha_bar, rng)
    return Image.fromarray(np.round(noised * 255).astype(np.uint8))


def merge_pairs(text_rows: Sequence[Row], visual_rows: Sequence[Row]) -> list[Row]:
    """D_o: text rows, then visual rows, each with its ``source``; text rows without an ``origin`` are released ones."""
    rows = [{"origin": "released", **row, "source": row_source(row)} for row in text_rows]
    return rows + [row | {"source": row_source(row)} for row in visual_rows]


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
