"""How much of a Med-LVLM's attention to the image falls inside the lesion that is asked about: in
the mean, and head by head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..base.bootstrap import bootstrap_interval, paired_difference
from ..base.images import open_image, resolve_image
from ..base.rows import Row, patient_of, question_text
from ..dataset import FilmDataset
from ..evaluate import asked_questions, in_parts, known_keys, profile_decoding
from ..lvlm import MedLVLM, image_attention, load_profile_lvlm, prompt_end_attention
from ..phantom.texts import read_masks
from ..profiles import Profile
from .premise import Asked


def lesion_cover(lesion_mask: np.ndarray, grid: int) -> np.ndarray:
    """The part of each cell (0 to 1) that a mask covers. Shape: [H, W] to [grid, grid]."""
    mask = Image.fromarray(np.asarray(lesion_mask, np.float32))
    return np.asarray(mask.resize((grid, grid), Image.Resampling.BOX))


def attention_share(attention: np.ndarray, lesion_mask: np.ndarray) -> float:
    """Share (0 to 1) of an attention map inside a mask; a cell counts by the part of its area that
    the mask covers.

    Args:
        attention: Non-negative, any scale. Shape: [grid, grid].
        lesion_mask: Bool or 0 to 1. Shape: [H, W].
    """
    cover = lesion_cover(lesion_mask, len(attention))
    return float((attention * cover).sum() / attention.sum())


def head_shares(lvlm: MedLVLM, asked: Sequence[Asked], batch_size: int) -> np.ndarray:
    """Share (0 to 1) of every head's attention to the image, at the prompt's end, that falls inside
    the lesion that the question asks about. Shape: [N, layers, heads].
    """
    films = [Image.fromarray(item.pixels) for item in asked]
    texts = [question_text(item.row) for item in asked]
    shares: list[np.ndarray] = []
    for rows in prompt_end_attention(lvlm, films, texts, batch_size):
        grid = int(rows.shape[-1] ** 0.5)
        part = asked[len(shares) : len(shares) + len(rows)]
        cover = np.stack([lesion_cover(item.lesion, grid).ravel() for item in part])
        weights = rows.numpy()
        inside = (weights * cover[:, None, None]).sum(-1)
        shares += list(inside / weights.sum(-1))
    return np.stack(shares)


def head_table(
    shares: Mapping[str, np.ndarray], asked: Sequence[Asked], samples: int
) -> list[dict[str, Any]]:
    """Every head with its share in the lesion, in percent with a 95% interval over patients.

    Args:
        shares: `head_shares` by model; with two models the second one's difference to the first is
            given as well, paired by question.

    Returns:
        a row per layer and head, counted from 1: ``layer``, ``head``, an interval for each model,
        ``difference`` in percentage points.
    """
    patients = [patient_of(item.row) for item in asked]
    _, layers, heads = next(iter(shares.values())).shape
    names = list(shares)
    table = []
    for layer, head in np.ndindex(layers, heads):
        of_head = [values[:, layer, head] for values in shares.values()]
        line: dict[str, Any] = {"layer": layer + 1, "head": head + 1}
        for name, values in zip(names, of_head, strict=True):
            line[name] = _entry(bootstrap_interval(values, patients, samples=samples))
        if len(of_head) == 2:
            change = paired_difference(of_head[1], of_head[0], patients, samples=samples)
            line["difference"] = _entry(change)
        table.append(line)
    return table


def _entry(interval: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), interval, strict=True))


def lesion_attention(
    lvlm: MedLVLM,
    questions: Sequence[Row],
    image_root: str | Path,
    mask_root: str | Path | None,
    batch_size: int,
) -> list[Row]:
    """How much of the answer's attention to the image falls inside the lesion that the question
    asks about.

    Only questions whose ``finding`` has a mask in ``mask_root`` (`<film stem>.png`) count; none
    where it is None.

    Returns:
        Rows with the question's keys, ``share`` (0 to 1) and ``chance``, the mask's share of the
        image's area.
    """
    if mask_root is None:
        return []
    asked: list[Row] = []
    masks: list[np.ndarray] = []
    for row in questions:
        path = Path(mask_root) / f"{Path(row['image']).stem}.png"
        if row.get("finding") and path.is_file():
            mask = read_masks(path).get(row["finding"])
            if mask is not None:
                asked.append(row)
                masks.append(mask)
    rows = []
    for part in in_parts(list(zip(asked, masks, strict=True)), batch_size):
        images = [open_image(resolve_image(image_root, row["image"])) for row, _ in part]
        texts = [question_text(row) for row, _ in part]
        maps = image_attention(lvlm, images, texts, batch_size).numpy()
        for attention, (row, mask) in zip(maps, part, strict=True):
            share = attention_share(attention, mask)
            rows.append({**known_keys(row), "share": share, "chance": float(mask.mean())})
    return rows


def lesion_attention_of_test_split(
    profile: Profile, dataset: FilmDataset, adapter: str | Path | None
) -> list[Row]:
    """One model's attention to the lesion on the open questions of the test split (see
    `lesion_attention`).
    """
    lvlm = load_profile_lvlm(profile, adapter, template=profile_decoding(profile).template)
    rows = [row for row in asked_questions(profile, dataset) if row["answer_type"] == "OPEN"]
    return lesion_attention(
        lvlm, rows, dataset.image_root, dataset.masks_root, profile.evaluation.batch_size
    )
