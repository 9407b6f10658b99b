"""How much of a Med-LVLM's attention to the image falls inside the lesion that is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..base.images import open_image, resolve_image
from ..base.rows import Row, question_text
from ..dataset import FilmDataset
from ..evaluate import asked_questions, in_parts, known_keys, profile_decoding
from ..lvlm import MedLVLM, image_attention, load_profile_lvlm
from ..phantom.texts import read_masks
from ..profiles import Profile


def attention_share(attention: np.ndarray, lesion_mask: np.ndarray) -> float:
    """Share (0 to 1) of an attention map inside a mask; a cell counts by the part of its area that
    the mask covers.

    Args:
        attention: Non-negative, any scale. Shape: [grid, grid].
        lesion_mask: Bool or 0 to 1. Shape: [H, W].
    """
    cover = Image.fromarray(np.asarray(lesion_mask, np.float32)).resize(
        attention.shape[::-1], Image.Resampling.BOX
    )
    return float((attention * np.asarray(cover)).sum() / attention.sum())


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
