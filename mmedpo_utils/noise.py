"""Lesion masks and noise: the paper's localized noise, its global ablation, and what the released
code does.

Pure functions of arrays. Equations: arXiv 2412.06141, the curation step (visual pairs).
"""

from __future__ import annotations

import numpy as np

from .base.errors import InputError

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
    scaled = (scaled - scaled.min()) / max(np.ptp(scaled), np.finfo(float).tiny)
    if method == "soft":
        return scaled.astype(np.float32)
    thresholds = {
        "quantile": lambda: np.quantile(scaled, quantile),
        "mean_std": lambda: scaled.mean() + scaled.std(),
        "otsu": lambda: _otsu(scaled),
    }
    if method not in thresholds:
        raise InputError(f"mask method {method!r}: expected one of {', '.join(MASK_METHODS)}")
    return (scaled > thresholds[method]()).astype(np.float32)


def signal_schedule(steps: int = 1000) -> np.ndarray:
    """The released schedule: the running product of 1 - beta; beta runs from 1e-5 to 5e-3 along a
    sigmoid of -6 to 6.

    Returns:
        alpha_bar after each step, float32 in (0, 1), falling. Shape: [steps].
    """
    beta = 1e-5 + (5e-3 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, steps)))
    return np.cumprod(1 - beta).astype(np.float32)


def step_for_signal(alpha_bar: np.ndarray, signal: float) -> int:
    """The step, from 0, whose sqrt(alpha_bar) is nearest to ``signal`` in [0, 1]; 0.5 halves the
    signal.
    """
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
    image, mask = np.asarray(image, dtype=np.float32), np.asarray(mask, dtype=np.float32)
    if mask.shape != image.shape[:2]:
        raise InputError(
            f"mask: expected the image's height and width {image.shape[:2]}, found {mask.shape}"
        )
    for name, values in (("image", image), ("mask", mask), ("alpha_bar", np.asarray(alpha_bar))):
        if not (np.min(values) >= 0 and np.max(values) <= 1):
            raise InputError(
                f"{name}: expected values from 0 to 1, found {np.min(values):g} to "
                f"{np.max(values):g}"
            )
    inside, noised = mask > 0, image.copy()
    epsilon = rng.standard_normal(image.shape)[inside].astype(np.float32)
    x, h = image[inside], mask[inside] if image.ndim == 2 else mask[inside, None]
    noised[inside] = np.clip(
        np.sqrt(alpha_bar) * (x * h) + np.sqrt(1 - alpha_bar) * (epsilon * h) + x * (1 - h), 0, 1
    )
    return noised


def global_noise(
    image: np.ndarray, alpha_bar: float, rng: np.random.Generator | np.random.RandomState
) -> np.ndarray:
    """The ablation of Table 4: ``localized_noise`` with h = 1 everywhere. Shape: as ``image``."""
    return localized_noise(image, np.ones(np.shape(image)[:2]), alpha_bar, rng)


def released_mask(heat_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The released code's mask: resize, 15x15 Gaussian blur, then above mean minus standard
    deviation.

    Args:
        heat_map: the map at the tool's resolution, each cell repeated (224x224 for MedKLIP's
            14x14). Shape: [h, w].
        size: height and width of the image.

    Returns:
        bool; at least half of the pixels of any map that is not constant. Shape: [H, W].
    """
    blurred = _blur(resize_bilinear(np.asarray(heat_map, dtype=np.float64), size))
    return blurred > blurred.mean() - blurred.std()


def released_noise(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator | np.random.RandomState
) -> np.ndarray:
    """The released code's noise: N(0, 10) replaces the masked pixels, cut toward zero and wrapped
    modulo 256.

    So -3.7 becomes 253, and the result is black and white speckle, not faint noise around zero.

    Args:
        image: uint8. Shape: [H, W] or [H, W, C].
        mask: bool. Shape: [H, W].

    Returns:
        uint8. Shape: as ``image``.
    """
    noise = rng.normal(0, 10, image.shape)
    noised = image.copy()
    noised[mask] = (np.trunc(noise).astype(np.int64) % 256).astype(np.uint8)[mask]
    return noised


def resize_bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation between cell centres, the border held. Shape: [h, w] to [H, W] =
    ``size``.
    """
    down, across = (_interpolation(old, new) for old, new in zip(values.shape, size, strict=True))
    return down @ values @ across.T


def _interpolation(old: int, new: int) -> np.ndarray:
    """Weights that take ``old`` samples to ``new``. Shape: [new, old]."""
    position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))


def _blur(values: np.ndarray) -> np.ndarray:
    """15x15 Gaussian with the sigma that OpenCV derives, 2.6; mirrored border without repeating the
    edge.
    """
    kernel = np.exp(-(np.arange(-7, 8) ** 2) / (2 * 2.6**2))
    kernel /= kernel.sum()
    for _ in range(2):
        padded = np.pad(values, ((7, 7), (0, 0)), mode="reflect")
        values = sum(
            weight * padded[start : start + len(values)] for start, weight in enumerate(kernel)
        ).T
    return values


def _otsu(values: np.ndarray) -> float:
    """The threshold in [0, 1] that separates two classes with the largest variance between them."""
    counts, edges = np.histogram(values, bins=256, range=(0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), np.sum(counts)
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return float(edges[1 + int(np.nanargmax(np.where(np.isfinite(between), between, -1)))])
