"""Test questions in the browser: what every model answers, and which errors that holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..base.errors import InputError
from ..base.rows import Row
from ..dataset import FilmDataset
from ..lvlm import MedLVLM, image_attention
from ..metrics import answer_score
from ..phantom.errors import errors, severity
from . import plots
from .answer_view import as_seen
from .pages import MaskList, Packed, Page, fitted

SIDE = 168  # pixels of a shown film: whole pixels for maps of 8, 14 and 24 cells


def case_view(
    predictions: Mapping[str, Sequence[Row]],
    dataset: FilmDataset,
    models: Mapping[str, MedLVLM],
    batch_size: int,
    films: int = 12,
    costs: bool = False,
) -> Page:
    """Walk through test questions with every model's answer; filter by type, finding, error,
    severity and disagreement; lay a model's attention over the film.

    The view holds all questions about ``films`` films, every so-manieth of the test split.

    Args:
        predictions: rows of `evaluate.predict` by model, about the same questions.
        models: those whose attention can be shown, by name.
        costs: name the errors and what they cost, which the phantom world alone states.

    Raises:
        InputError: the predictions are not about the same questions.
    """
    lines = list(zip(*predictions.values(), strict=True))
    if not lines or any(len({str(row["question_id"]) for row in line}) > 1 for line in lines):
        raise InputError("case_view: expected predictions of the same questions in one order")
    names = list(dict.fromkeys(line[0]["image"] for line in lines))
    places = np.linspace(0, len(names) - 1, min(films, len(names))).astype(int)
    shown = [names[place] for place in places]
    listed = []
    for line in lines:
        row = line[0]
        if row["image"] not in shown:
            continue
        answers = [_answer(row, costs) for row in line]
        listed.append(
            {
                "label": f"{row['image']}: {row['question']}",
                "image": row["image"],
                "film": shown.index(row["image"]),
                "question": row["question"],
                "type": row["answer_type"],
                "finding": row.get("finding"),
                "truth": str(row["answer"]),
                "answers": answers,
            }
        )
    cut = next(iter(models.values())).processor.image_processor if models else None
    pixels = [_fitted(dataset.image(name), cut) for name in shown]
    lesions = MaskList((SIDE, SIDE))
    masks = []
    for name in shown:
        of_film = {}
        for finding, mask in dataset.masks(name).items():
            of_film[finding] = _fitted(Image.fromarray(np.uint8(mask) * 255), cut) > 127
        masks.append(lesions.add(of_film))
    maps = [_maps(lvlm, dataset, listed, batch_size) for lvlm in models.values()]
    arrays = {
        "films": Packed(np.stack(pixels), "film"),
        "masks": lesions.packed(),
    }
    if maps:
        arrays["attention"] = Packed(np.stack(maps), "half")
    values = {
        "models": list(predictions),
        "attention": list(models),
        "cases": listed,
        "masks": masks,
        "masksKnown": bool(lesions.masks),
        "costsKnown": costs,
    }
    still = partial(plots.film_grid, pixels[:6], shown[:6], columns=6)
    alt = f"{len(shown[:6])} of the {len(shown)} films that the cases are about"
    return Page("cases", values, arrays, still, alt)


def _answer(row: Row, costs: bool) -> dict[str, Any]:
    # The errors of a report are not counted (`phantom.errors`).
    counted = costs and row["answer_type"] != "REPORT"
    texts = (row["question"], str(row["answer"]), str(row["prediction"]))
    return {
        "text": str(row["prediction"]),
        "score": round(answer_score(row), 3),
        "errors": [error.kind for error in errors(*texts)] if counted else [],
        "severity": round(severity(*texts), 2) if counted else None,
    }


def _maps(
    lvlm: MedLVLM, dataset: FilmDataset, listed: Sequence[Mapping[str, Any]], batch_size: int
) -> np.ndarray:
    """The averaged attention before each answer. Shape: [N, cells]."""
    films = [dataset.image(one["image"]) for one in listed]
    texts = [one["question"] for one in listed]
    return image_attention(lvlm, films, texts, batch_size).flatten(1).numpy()


def _fitted(image: Image.Image, processor: Any) -> np.ndarray:
    """In grey, as a model's processor cuts it, or without a model whole in a square with black
    around it: uint8. Shape: [SIDE, SIDE].
    """
    if processor is not None:
        image = Image.fromarray(as_seen(processor, image))
    return fitted(image, SIDE)
