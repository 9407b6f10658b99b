"""Test questions in the browser: what every model answers, and which errors that holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..base.rows import Row
from ..dataset import FilmDataset
from ..lvlm import MedLVLM, image_attention
from ..metrics import answer_score
from ..phantom.errors import errors
from . import plots
from .pages import Packed, Page

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
    """
    tables = [{str(row["question_id"]): row for row in rows} for rows in predictions.values()]
    questions = [key for key in tables[0] if all(key in table for table in tables)]
    names = list(dict.fromkeys(tables[0][key]["image"] for key in questions))
    places = np.linspace(0, len(names) - 1, min(films, len(names))).astype(int)
    shown = [names[place] for place in places]
    asked = [key for key in questions if tables[0][key]["image"] in shown]
    listed = []
    for key in asked:
        row = tables[0][key]
        answers = [_answer(table[key], costs) for table in tables]
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
    pixels = [_fitted(dataset.image(name)) for name in shown]
    masks: list[list[dict[str, Any]]] = []
    bits: list[np.ndarray] = []
    for name in shown:
        of_film = []
        for finding, mask in dataset.masks(name).items():
            of_film.append({"name": finding, "index": len(bits)})
            bits.append(_fitted(Image.fromarray(np.uint8(mask) * 255)) > 127)
        masks.append(of_film)
    maps = [_maps(lvlm, dataset, listed, batch_size) for lvlm in models.values()]
    arrays = {
        "films": Packed(np.stack(pixels), "film"),
        "masks": Packed(np.reshape(bits, (len(bits), SIDE, SIDE)), "bits"),
    }
    if maps:
        arrays["attention"] = Packed(np.stack(maps), "half")
    values = {
        "models": list(predictions),
        "attention": list(models),
        "cases": listed,
        "masks": masks,
        "masksKnown": bool(bits),
    }
    still = plots.film_grid(pixels[:6], shown[:6], columns=6)
    return Page("cases", values, arrays, still, f"{len(shown)} films that the cases are about")


def _answer(row: Row, costs: bool) -> dict[str, Any]:
    found = []
    if costs and row["answer_type"] != "REPORT":
        found = errors(row["question"], str(row["answer"]), str(row["prediction"]))
    return {
        "text": str(row["prediction"]),
        "score": round(answer_score(row), 3),
        "errors": [error.kind for error in found],
        "severity": round(sum(error.severity for error in found), 2) if costs else None,
    }


def _maps(
    lvlm: MedLVLM, dataset: FilmDataset, listed: Sequence[Mapping[str, Any]], batch_size: int
) -> np.ndarray:
    """The averaged attention before each answer. Shape: [N, cells]."""
    films = [dataset.image(one["image"]) for one in listed]
    texts = [one["question"] for one in listed]
    return image_attention(lvlm, films, texts, batch_size).flatten(1).numpy()


def _fitted(image: Image.Image) -> np.ndarray:
    """In grey, fitted into a square with black around it: uint8. Shape: [SIDE, SIDE]."""
    return np.asarray(ImageOps.pad(image.convert("L"), (SIDE, SIDE), Image.Resampling.BILINEAR))
