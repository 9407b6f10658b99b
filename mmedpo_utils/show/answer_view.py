"""The Med-LVLM's attention in the browser: click a word of an answer, and see where each model
looked when it wrote it (the paper's Figure 5, word by word).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..lvlm import MedLVLM
from . import plots
from .answer_attention import AnswerReading, read_answer
from .pages import MaskList, Packed, Page


@dataclass(frozen=True)
class ShownQuestion:
    """One question about one film.

    Attributes:
        film: the image.
        name: the film's name.
        question: plain text.
        truth: the true answer, or what is to be shown in its place.
        masks: the film's true lesions, bool [H, W] by finding, where they are known.
    """

    film: Image.Image
    name: str
    question: str
    truth: str = "not known"
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)


def answer_view(
    models: Mapping[str, MedLVLM],
    asked: Sequence[ShownQuestion],
    max_new_tokens: int,
) -> Page:
    """Answers word by word, of one model or of two side by side with their difference.

    Films and masks are shown as the first model's image processor cuts them.

    Args:
        models: one or two, by name; the first is the one that the difference is taken from.
        asked: the questions that the view offers.
        max_new_tokens: the longest answer, in tokens.
    """
    arrays: dict[str, Packed] = {}
    listed: list[dict[str, Any]] = []
    cut = next(iter(models.values())).processor.image_processor
    films = [as_seen(cut, one.film) for one in asked]
    lesions = MaskList((films[0].shape[0], films[0].shape[1]))
    first: dict[str, AnswerReading] = {}
    for number, one in enumerate(asked):
        readings = []
        for place, (name, lvlm) in enumerate(models.items()):
            reading = read_answer(lvlm, one.film, one.question, max_new_tokens)
            first.setdefault(name, reading)
            arrays[f"raw {number} {place}"] = Packed(reading.attention, "half")
            arrays[f"rollout {number} {place}"] = Packed(reading.rollout, "half")
            arrays[f"gradient {number} {place}"] = Packed(reading.gradient, "half")
            sure = [round(float(value), 4) for value in reading.probabilities]
            readings.append({"words": reading.words, "probabilities": sure})
        seen = {name: mask_as_seen(cut, mask) for name, mask in one.masks.items()}
        listed.append(
            {
                "film": number,
                "label": f"{one.name}: {one.question}",
                "question": one.question,
                "truth": one.truth,
                "readings": readings,
                "masks": lesions.add(seen),
            }
        )
    arrays["films"] = Packed(np.stack(films), "film")
    arrays["masks"] = lesions.packed()
    name, reading = list(first.items())[-1]
    heat = reading.attention[0].mean((0, 1))
    grid = int(heat.size**0.5)
    lesion = np.any(lesions.masks[: len(asked[0].masks)], axis=0) if asked[0].masks else None
    word = reading.words[0]
    title = f"{name}: {word}"
    heat = heat.reshape(grid, grid)
    still = partial(plots.attention_overlay, films[0], heat, lesion, title=title)
    alt = f"{asked[0].name}: where {name} looks when it writes {word}"
    return Page("answer", {"models": list(models), "asked": listed}, arrays, still, alt)


def mask_as_seen(processor: Any, mask: np.ndarray) -> np.ndarray:
    """A mask, bool [H, W], cut as the vision tower gets its film: bool. Shape: [H, W]."""
    return as_seen(processor, Image.fromarray(np.uint8(mask) * 255)) > 127


def as_seen(processor: Any, image: Image.Image) -> np.ndarray:
    """A film, resized and cut as the vision tower gets it: uint8. Shape: [H, W]."""
    pixels = processor(
        image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)[0]
