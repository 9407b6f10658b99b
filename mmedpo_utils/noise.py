"""Lesion masks and noise: the paper's localized noise and its global ablation, and the choice among
them and the released code's (`released.noise`).

Pure functions of arrays. Equations: arXiv 2412.06141, the curation step (visual pairs).
"""

from __future__ import annotations

import numpy as np

from .base.errors import InputError
from .base.images import resize_bilinear
from .released.noise import released_mask, released_noise

RELEASED_SIZE = 224  # pixels of a side at which the released code reads a heat map
MASK_METHODS = ("quantile", "mean_std", "otsu", "soft")


def lesion_mask(
    heat_map: np.ndarray, size: tuple[int, int], method: str = "quantile", quantile: float = 0.85
) -> np.ndarray:
    """Turn a heat map into a mask of the image: bilinear upsampling, min-max scaling, then a
    threshold.

    Args:
        heat_map: any finite values, for example attention. Shape: [h, w].
        size: height and width of the image.
        method: ``quantile`` keeps what lies above that quantile, ``mean_std`` above mean plus
            standard deviation, ``otsu`` above Otsu's threshold; ``soft`` keeps the scaled map
            itself.
        quantile: share of the pixels outside the mask, 0 to 1 (``quantile`` only).

    Returns:
        float32 in [0, 1]; 0 or 1 except for ``soft``; all 0 for a constant map. Shape: [H, W].

    Raises:
        InputError: the map is not a finite 2-D array, or the method is unknown.
    """
    heat_map = np.asarray(heat_map, dtype=np.float64)
    if heat_map.ndim != 2 or not heat_map.size or not np.isfinite(heat_map).all():
        raise InputError(
            f"heat map: expected finite values of shape [h, w], found shape {list(heat_map.shape)}"
        )
    scaled = resize_bilinear(heat_map, size)
    scaled -= scaled.min()
    scaled /= max(scaled.max(), np.finfo(float).tiny)
    if method == "soft":
        return scaled.astype(np.float32)
    if method == "quantile":
        threshold = np.quantile(scaled, quantile)
    elif method == "mean_std":
        threshold = scaled.mean() + scaled.std()
    elif method == "otsu":
        threshold = _otsu(scaled)
    else:
        raise InputError(f"mask method {method!r}: expected one of {', '.join(MASK_METHODS)}")
    return (scaled > threshold).astype(np.float32)


def signal_schedule(steps: int = 1000) -> np.ndarray:
    """The released schedule: the running product of 1 - beta; beta runs from 1e-5 to 5e-3 along a
    sigmoid of -6 to 6.

    Returns:
        alpha_bar after each step, float32 in (0, 1), falling. Shape: [steps].
    """
    beta = 1e-5 + (5e-3 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, steps)))
    return np.cumprod(1 - beta).astype(np.float32)


def step_for_signal(alpha_bar: np.ndarray, signal: float) -> int:
    """The step, from 0, whose sqrt(alpha_bar) is nearest to ``signal`` in [0, 1]."""
    return int(np.argmin(np.abs(np.sqrt(alpha_bar) - signal)))


def localized_noise(
    image: np.ndarray,
    mask: np.ndarray,
    alpha_bar: float,
    rng: np.random.Generator | np.random.RandomState,
) -> np.ndarray:
    """Noise inside the mask: x* = sqrt(a) x.h + sqrt(1 - a) eps.h + x.(1 - h), eps ~ N(0, I),
    clipped to [0, 1].

    Args:
        image: values in [0, 1]. Shape: [H, W] or [H, W, C].
        mask: h, values in [0, 1]. Shape: [H, W].
        alpha_bar: a, the schedule's product at the chosen step, in [0, 1].

    Returns:
        float32; where the mask is 0 the pixel is unchanged. Shape: as ``image``.

    Raises:
        InputError: shapes do not match, or a value is out of range.
    """
    image = np.asarray(image, dtype=np.float32)
    mask = np.asarray(mask, dtype=np.float32)
    if mask.shape != image.shape[:2]:
        raise InputError(
            f"mask: expected the image's height and width {image.shape[:2]}, found {mask.shape}"
        )
    for name, values in (("image", image), ("mask", mask), ("alpha_bar", np.asarray(alpha_bar))):
        least, most = np.min(values), np.max(values)
        if not 0 <= least <= most <= 1:
            raise InputError(f"{name}: expected values from 0 to 1, found {least:g} to {most:g}")
    epsilon = rng.standard_normal(image.shape).astype(np.float32)
    # Where h is 0 the equation gives x; taking x itself spares its rounding, and most work.
    inside = mask > 0
    x, eps = image[inside], epsilon[inside]
    h = mask[inside] if image.ndim == 2 else mask[inside][:, None]
    noised = np.sqrt(alpha_bar) * (x * h) + np.sqrt(1 - alpha_bar) * (eps * h) + x * (1 - h)
    result = image.copy()
    result[inside] = np.clip(noised, 0, 1)
    return result


def global_noise(
    image: np.ndarray, alpha_bar: float, rng: np.random.Generator | np.random.RandomState
) -> np.ndarray:
    """The ablation of Table 4: ``localized_noise`` with h = 1 everywhere. Shape: as ``image``."""
    return localized_noise(image, np.ones(np.shape(image)[:2]), alpha_bar, rng)


def noise_mask(
    heat_map: np.ndarray, size: tuple[int, int], kind: str, method: str, quantile: float
) -> np.ndarray:
    """Where a kind of noise goes, and how much of it.

    Args:
        heat_map: the visual tool's map. Shape: [h, w].
        size: height and width of the image.
        kind: ``localized`` (the paper's: `lesion_mask` by ``method`` and ``quantile``), ``global``
            (everywhere) or ``released`` (`released.noise.released_mask`).

    Returns:
        bool for the released kind, else float32 in [0, 1]. Shape: [H, W].
    """
    if kind == "released":
        cell = RELEASED_SIZE // len(heat_map)
        return released_mask(np.kron(heat_map, np.ones((cell, cell))), size)
    if kind == "global":
        return np.ones(size, np.float32)
    return lesion_mask(heat_map, size, method, quantile)


def noised_pixels(
    pixels: np.ndarray,
    mask: np.ndarray,
    kind: str,
    signal: float,
    rng: np.random.Generator | np.random.RandomState,
) -> np.ndarray:
    """An 8-bit image with a kind of noise in ``mask``.

    Args:
        pixels: uint8. Shape: [H, W] or [H, W, C].
        mask: of `noise_mask`, for the same ``kind``. Shape: [H, W].
        signal: share of the signal that stays, 0 to 1; the nearest step of `signal_schedule` is
            taken. The released kind knows none.

    Returns:
        uint8. Shape: as ``pixels``.
    """
    if kind == "released":
        return released_noise(pixels, mask, rng)
    schedule = signal_schedule()
    alpha_bar = float(schedule[step_for_signal(schedule, signal)])
    noised = localized_noise(pixels.astype(np.float32) / 255, mask, alpha_bar, rng)
    return np.round(noised * 255).astype(np.uint8)


def _otsu(values: np.ndarray) -> float:
    """The threshold in [0, 1] that separates two classes with the largest variance between them."""
    counts, edges = np.histogram(values, bins=256, range=(0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    total = np.sum(counts)
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return float(edges[1 + int(np.nanargmax(np.where(np.isfinite(between), between, -1)))])
