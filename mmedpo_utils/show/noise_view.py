"""Noise in the browser: where it lies, how much of the signal it keeps, and what the Med-LVLM still
says about the film.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..lvlm import MedLVLM, generate
from ..noise import noise_mask, noised_pixels, signal_schedule, step_for_signal
from ..pairs import generator
from . import plots
from .answer_view import ShownQuestion, as_seen
from .pages import Packed, Page
from .premise import answer_logps, elsewhere

SIGNALS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
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
    shown: list[tuple[int, Image.Image]] = []  # the question's number, the film
    for number, (one, film, heat) in enumerate(zip(asked, films, heats, strict=True)):
        lesions = []
        for mask in one.masks.values():
            lesions.append(as_seen(cut, Image.fromarray(np.uint8(mask) * 255)) > 127)
        union = np.any(lesions, axis=0) if lesions else None
        places = []
        for name, mask in _places(heat, union, film.shape, one.name).items():
            first = len(shown)
            for film_of_place in _noised(film, mask, name, seeds):
                shown.append((number, film_of_place))
            places.append({"name": name, "mask": len(masks), "first": first})
            masks.append(mask > 0)
        truth = None
        if union is not None:
            truth = len(masks)
            masks.append(union)
        listed.append(
            {
                "label": f"{one.name}: {one.question}",
                "truth": one.truth,
                "places": places,
                "lesion": truth,
            }
        )
    images = [image for _, image in shown]
    texts = [asked[number].question for number, _ in shown]
    truths = [asked[number].truth for number, _ in shown]
    said = [answer for (answer,) in generate(lvlm, images, texts, 16, batch_size)]
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
        "sure": Packed(np.exp(answer_logps(lvlm, images, texts, said, batch_size)[0]), "half"),
        "true": Packed(np.exp(answer_logps(lvlm, images, texts, truths, batch_size)[0]), "half"),
    }
    place = noise_mask(heats[0], size, "localized", "quantile", 0.85)
    noised = np.asarray(next(iter(_noised(films[0], place, "", seeds[:1]))))
    still = plots.noise_comparison(films[0], place > 0, {"noised": noised})
    return Page("noise", values, arrays, still, f"{asked[0].name}, clean and noised")


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
