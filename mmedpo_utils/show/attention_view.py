"""MedKLIP's attention in the browser: findings side by side, layers and heads, mask and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image

from ..medklip import IMAGE_SIZE, MedKLIPOutput, confidence
from . import plots
from .pages import MaskList, Packed, Page


def medklip_view(
    films: Sequence[Image.Image],
    output: MedKLIPOutput,
    names: Sequence[str],
    masks: Sequence[Mapping[str, np.ndarray]] | None = None,
    query: str = "disease",
    quantile: float = 0.85,
    signal: float = 0.5,
) -> Page:
    """Look at cross-attention: a finding beside ``query``, every layer and head, the true lesions,
    the mask that the map gives and the film that it would noise.

    Films and masks are shown as the network sees them: square, 224 pixels a side.

    Args:
        films: the images.
        output: what MedKLIP says about them.
        names: the films' names.
        masks: each film's true lesions, bool [H, W] by finding; None where none are known.
        query: the word whose map makes the mask.
        quantile: share of the pixels outside the mask at first, 0.5 to 0.95.
        signal: share of the signal that the noise keeps at first, 0 to 1.
    """
    square = (IMAGE_SIZE, IMAGE_SIZE)
    grey = [film.convert("L").resize(square, Image.Resampling.BILINEAR) for film in films]
    pixels = np.stack([np.asarray(film) for film in grey])
    maps = output.attentions.float().cpu().numpy()
    known = masks if masks is not None else [{}] * len(films)
    lesions = MaskList(square)
    listed = []
    for of_film in known:
        small = {}
        for name, mask in of_film.items():
            small[name] = np.asarray(Image.fromarray(np.asarray(mask, bool)).resize(square), bool)
        listed.append(lesions.add(small))
    confidences = np.stack([confidence(output, name).numpy() for name in output.queries], axis=1)
    noise = np.random.default_rng(0).standard_normal(square)
    arrays = {
        "films": Packed(pixels, "film"),
        "maps": Packed(maps, "half"),
        "masks": lesions.packed(),
        "confidences": Packed(confidences, "half"),
        "noise": Packed(noise, "half"),
    }
    values = {
        "films": list(names),
        "queries": list(output.queries),
        "query": query,
        "masks": listed,
        "masksKnown": masks is not None,
        "quantile": quantile,
        "signal": signal,
    }
    grid = int(maps.shape[-1] ** 0.5)
    heat = maps[0, :, :, output.index(query)].mean((0, 1)).reshape(grid, grid)
    lesion = np.any(lesions.masks[: len(listed[0])], axis=0) if listed[0] else None
    title = f"{names[0]}: {query}"
    still = partial(plots.attention_overlay, pixels[0], heat, lesion, title=title)
    return Page("medklip", values, arrays, still, f"{names[0]}: attention of {query}")
