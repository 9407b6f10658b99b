"""Noise in the browser: where it lies, how much of the signal it keeps, and what the Med-LVLM still
says about the film.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..lvlm import MedLVLM, generate
from ..noise import noise_mask, noised_pixels, signal_schedule, step_for_signal
from ..pairs import generator
from . import plots
from .answer_view import ShownQuestion, as_seen, mask_as_seen
from .pages import Packed, Page
from .premise import answer_logps, elsewhere

SIGNALS = (0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)  # the schedule ends a little below the first
QUANTILES = (0.75, 0.85, 0.95)
RELEASED = "as the released code does it"


def noise_view(
    lvlm: MedLVLM,
    asked: Sequence[ShownQuestion],
    heats: Sequence[np.ndarray],
    batch_size: int,
    seeds: Sequence[int] = (0, 1),
) -> Page:
    """Noise films at several places and strengths; beside each, the model's answer and how probable
    it and the true answer are.

    Everything that the controls can reach is asked beforehand, so that the view needs no kernel.

    Args:
        asked: questions with their films, true answers and lesions.
        heats: the visual tool's map of each film. Shape of each: [g, g].
        seeds: of the noise.
    """
    cut = lvlm.processor.image_processor
    films = [as_seen(cut, one.film) for one in asked]
    listed: list[dict[str, Any]] = []
    masks: list[np.ndarray] = []
    shown: list[Image.Image] = []  # every film that the controls can reach
    owners: list[ShownQuestion] = []  # the question of each
    for one, film, heat in zip(asked, films, heats, strict=True):
        lesion = _lesion(cut, one)
        places = []
        for name, mask in _places(heat, lesion, film.shape, one.name).items():
            places.append({"name": name, "mask": len(masks), "first": len(shown)})
            masks.append(mask > 0)
            shown += _noised(film, mask, name, seeds)
        owners += [one] * (len(shown) - len(owners))
        listed.append(
            {
                "label": f"{one.name}: {one.question}",
                "truth": one.truth,
                "places": places,
                "lesion": None if lesion is None else len(masks),
            }
        )
        if lesion is not None:
            masks.append(lesion)
    said, sure, true = _answers(lvlm, shown, owners, batch_size)
    schedule = signal_schedule()
    values = {
        "asked": listed,
        "signals": SIGNALS,
        "kept": [float(schedule[step_for_signal(schedule, signal)]) for signal in SIGNALS],
        "seeds": list(seeds),
        "released": RELEASED,
        "said": said,
    }
    size = films[0].shape
    noise = [np.random.default_rng(seed).standard_normal(size) for seed in seeds]
    arrays = {
        "films": Packed(np.stack(films), "film"),
        "masks": Packed(np.stack(masks), "bits"),
        "noise": Packed(np.stack(noise), "half"),
        "sure": Packed(sure, "half"),
        "true": Packed(true, "half"),
    }
    place = noise_mask(heats[0], size, "localized", "quantile", 0.85)
    noised = np.asarray(next(iter(_noised(films[0], place, "", seeds[:1]))))
    still = partial(plots.noise_comparison, films[0], place > 0, {"noised": noised})
    return Page("noise", values, arrays, still, f"{asked[0].name}, clean and noised")


def _lesion(cut: Any, one: ShownQuestion) -> np.ndarray | None:
    """All true lesions of a question's film, as the vision tower gets it: bool [H, W]; None where
    none is known.
    """
    seen = [mask_as_seen(cut, mask) for mask in one.masks.values()]
    return np.any(seen, axis=0) if seen else None


def _answers(
    lvlm: MedLVLM, films: Sequence[Image.Image], owners: Sequence[ShownQuestion], batch_size: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """What the model says of each film, the probability of that, and that of the true answer."""
    texts = [one.question for one in owners]
    truths = [one.truth for one in owners]
    said = [answer for (answer,) in generate(lvlm, films, texts, 16, batch_size)]
    sure, _ = answer_logps(lvlm, films, texts, said, batch_size)
    true, _ = answer_logps(lvlm, films, texts, truths, batch_size)
    return said, np.exp(sure), np.exp(true)


def _places(
    heat: np.ndarray, lesion: np.ndarray | None, size: tuple[int, ...], name: str
) -> dict[str, np.ndarray]:
    """The masks that the view offers, by name. Shape of each: [H, W]."""
    height, width = size
    places = {}
    for quantile in QUANTILES:
        share = f"{100 * (1 - quantile):.0f}%"
        mask = noise_mask(heat, (height, width), "localized", "quantile", quantile)
        places[f"brightest {share} of MedKLIP's map"] = mask
    if lesion is not None:
        places["the true lesions"] = lesion.astype(np.float32)
        away = elsewhere(lesion, lesion, generator(0, name))
        places["as much elsewhere"] = away.astype(np.float32)
    places["everywhere"] = np.ones(size, np.float32)
    places[RELEASED] = noise_mask(heat, (height, width), "released", "quantile", 0.85)
    return places


def _noised(
    film: np.ndarray, mask: np.ndarray, place: str, seeds: Sequence[int]
) -> list[Image.Image]:
    """The film at every strength under every seed; the released noise knows no strength."""
    kind = "released" if place == RELEASED else "localized"
    images = []
    for seed in seeds:
        for signal in SIGNALS[:1] if kind == "released" else SIGNALS:
            pixels = noised_pixels(film, mask, kind, signal, np.random.default_rng(seed))
            images.append(Image.fromarray(pixels))
    return images
