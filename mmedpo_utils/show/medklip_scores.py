"""How well a visual tool finds what is known: presence, the pointing game, and whether its maps and
its confidence can carry the visual pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import label
from scipy.stats import mannwhitneyu

from ..medklip import MedKLIP, MedKLIPOutput, confidence, heat_map, pointing_hit
from ..noise import lesion_mask, noised_pixels
from .premise import elsewhere


@torch.inference_mode()
def read_films(
    model: MedKLIP, images: Sequence[Image.Image], batch_size: int = 32
) -> MedKLIPOutput:
    """What the network says about many films, read batch by batch."""
    parts = []
    for start in range(0, len(images), batch_size):
        parts.append(model(model.preprocess(images[start : start + batch_size])))
    return MedKLIPOutput(
        model.queries,
        torch.cat([part.logits for part in parts]),
        torch.cat([part.attentions for part in parts]),
        torch.cat([part.features for part in parts]),
    )


def score_medklip(
    output: MedKLIPOutput, masks: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """Presence and pointing of a model on films whose lesions are known.

    Args:
        output: what the model says about the films (`read_films`).
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
    maps = {query: heat_map(output, query) for query in output.queries}
    for index, present in enumerate(masks):
        if not present:
            continue
        lesion = np.any(list(present.values()), axis=0)
        hit = pointing_hit(maps["disease"][index], lesion)
        hits.append(hit)
        for finding, mask in present.items():
            if finding in maps:
                own.setdefault(finding, []).append(pointing_hit(maps[finding][index], mask))
            if len(present) == 1:
                alone.setdefault(finding, []).append(hit)
    found: dict[str, Any] = {}
    if hits:
        found["pointing_game"] = float(np.mean(hits))
    found["pointing_game_alone"] = _shares(alone, output.queries)
    found["pointing_game_own"] = _shares(own, output.queries)
    areas = {}
    for query in output.queries:
        column = confidence(output, query).cpu().numpy()
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


def score_maps(
    model: MedKLIP,
    output: MedKLIPOutput,
    images: Sequence[Image.Image],
    masks: Sequence[Mapping[str, np.ndarray]],
    seed: int = 0,
) -> dict[str, float]:
    """What the "disease" maps and confidences of a model are worth for the visual pairs.

    Args:
        output: what the model says about the films (`read_films`); noised ones are read here.
        masks: per film, the mask of each finding that is present.
        seed: draws the noise and the control's place.

    Returns:
        over films with a lesion: ``correlation_between_maps`` (mean over the pairs of layer and
        head maps), ``effective_cells`` (median of exp of the averaged map's entropy, 1 to 196),
        ``largest_part`` (mean share of the default mask's largest connected part),
        ``lesion_in_mask`` (mean share of the lesion inside the default mask), and the median
        confidences ``confidence_clean``, ``confidence_lesion_noised`` (noise on the true lesion)
        and ``confidence_elsewhere_noised`` (equal area elsewhere); over all films:
        ``undecided`` (share with a confidence between 0.05 and 0.95), and this alone where no film
        shows a lesion.
    """
    undecided = confidence(output, "disease")
    undecided = ((undecided > 0.05) & (undecided < 0.95)).float().mean()
    rng = np.random.default_rng(seed)
    rows = [index for index, present in enumerate(masks) if present]
    if not rows:
        return {"undecided": float(undecided)}
    each: dict[str, list[float]] = {"correlation": [], "cells": [], "part": [], "inside": []}
    noised: dict[str, list[Image.Image]] = {"lesion": [], "elsewhere": []}
    heats = heat_map(output, "disease").cpu().numpy()
    for index in rows:
        lesion = np.any(list(masks[index].values()), axis=0)
        heat = heats[index]
        maps = output.attentions[index, :, :, output.index("disease")].flatten(0, 1).numpy()
        # Maps that follow one another correlate with 1; the diagonal is left out.
        between = np.corrcoef(maps)[np.triu_indices(len(maps), 1)]
        each["correlation"].append(float(between.mean()))
        each["cells"].append(float(np.exp(-(heat * np.log(heat + 1e-12)).sum())))
        mask = lesion_mask(heat, lesion.shape) > 0
        parts, _ = label(mask)
        if mask.any():  # a constant map has no brightest part
            each["part"].append(float(np.bincount(parts[mask]).max() / mask.sum()))
        each["inside"].append(float((mask & lesion).sum() / lesion.sum()))
        pixels = np.asarray(images[index])
        for name, region in (("lesion", lesion), ("elsewhere", elsewhere(lesion, lesion, rng))):
            changed = noised_pixels(pixels, region.astype(np.float32), "localized", 0.5, rng)
            noised[name].append(Image.fromarray(changed))
    clean = confidence(output, "disease")[rows]
    hidden = confidence(read_films(model, noised["lesion"]), "disease")
    control = confidence(read_films(model, noised["elsewhere"]), "disease")
    return {
        "correlation_between_maps": float(np.mean(each["correlation"])),
        "effective_cells": float(np.median(each["cells"])),
        "largest_part": float(np.mean(each["part"])),
        "lesion_in_mask": float(np.mean(each["inside"])),
        "confidence_clean": float(clean.median()),
        "confidence_lesion_noised": float(hidden.median()),
        "confidence_elsewhere_noised": float(control.median()),
        "undecided": float(undecided),
    }
