"""How well a visual tool finds what is known: presence and the pointing game, by finding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import mannwhitneyu

from ..medklip import MedKLIP, confidence, heat_map, pointing_hit


@torch.inference_mode()
def score_medklip(
    model: MedKLIP,
    images: Sequence[Image.Image],
    masks: Sequence[dict[str, np.ndarray]],
    batch_size: int = 32,
) -> dict[str, Any]:
    """Presence and pointing of a model on films whose lesions are known.

    Args:
        masks: per film, the mask of each finding that is present (an empty dictionary for a film
            without lesion).

    Returns:
        ``pointing_game``: hits of the "disease" map over films with a lesion;
        ``pointing_game_alone``: the same per finding, over films that show nothing else;
        ``pointing_game_own``: hits of the finding's own map on its own mask; ``auc`` (mean),
            ``auc_per_query``. All in [0, 1]. A score that no film can give is absent.
    """
    hits: list[bool] = []
    alone: dict[str, list[bool]] = {}
    own: dict[str, list[bool]] = {}
    scores = []
    for start in range(0, len(images), batch_size):
        output = model(model.preprocess(images[start : start + batch_size]))
        scores.append(torch.stack([confidence(output, query) for query in model.queries], 1))
        maps = {query: heat_map(output, query) for query in model.queries}
        for index, present in enumerate(masks[start : start + batch_size]):
            if not present:
                continue
            lesion = np.any(list(present.values()), axis=0)
            hit = pointing_hit(maps["disease"][index], lesion)
            hits.append(hit)
            for finding, mask in present.items():
                own.setdefault(finding, []).append(pointing_hit(maps[finding][index], mask))
                if len(present) == 1:
                    alone.setdefault(finding, []).append(hit)
    found: dict[str, Any] = {}
    if hits:
        found["pointing_game"] = float(np.mean(hits))
    found["pointing_game_alone"] = _shares(alone, model.queries)
    found["pointing_game_own"] = _shares(own, model.queries)
    areas = {}
    for query, column in zip(model.queries, torch.cat(scores).cpu().numpy().T, strict=True):
        truth = np.array([bool(m) if query == "disease" else query in m for m in masks])
        if 0 < truth.mean() < 1:
            areas[query] = _auc(column, truth)
    if areas:
        found["auc"] = float(np.mean(list(areas.values())))
        found["auc_per_query"] = areas
    return found


def _shares(groups: dict[str, list[bool]], names: Sequence[str]) -> dict[str, float]:
    """The share of hits of each group that there is, in the order of ``names``."""
    return {name: float(np.mean(groups[name])) for name in names if name in groups}


def _auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive scores above a negative."""
    positives = scores[truth]
    negatives = scores[~truth]
    wins = mannwhitneyu(positives, negatives).statistic
    return float(wins / (len(positives) * len(negatives)))
