"""Mask and noise as the authors' released code makes them, which is not what the paper says.

Pure functions of arrays.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from ..base.images import resize_bilinear


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
    resized = resize_bilinear(np.asarray(heat_map, dtype=np.float64), size)
    # The sigma that OpenCV derives for a window of 15, and its border: mirrored, edge not repeated.
    blurred = gaussian_filter(resized, sigma=2.6, radius=7, mode="mirror")
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
    wrapped = (np.trunc(noise).astype(np.int64) % 256).astype(np.uint8)
    noised = image.copy()
    noised[mask] = wrapped[mask]
    return noised
