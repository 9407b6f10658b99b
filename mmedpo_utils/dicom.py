"""DICOM films as 8-bit images, through pydicom (the optional extra ``dicom``)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether the file says that it is DICOM: by its name, or by the mark after its preamble."""
    if os.fspath(path).lower().endswith((".dcm", ".dicom")):
        return True
    try:
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def open_dicom(path: str | os.PathLike) -> Image.Image:
    """Open one frame as mode L or RGB, 8 bits, dark where little was attenuated (MONOCHROME1 is inverted).

    Grey values are rescaled to the modality's unit, then cut by the file's first window; without a window they are
    scaled from their own minimum and maximum.

    Raises:
        InputError: pydicom is not installed, or the file is not one grey or RGB frame that it can decode.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, pixel_array
    except ImportError as error:
        raise InputError(f"{path}: DICOM needs pydicom; install the extra: pip install 'mmedpo-notebooks[dicom]'") from error
    try:
        dataset = pydicom.dcmread(path)
        pixels, kind = pixel_array(dataset), dataset.PhotometricInterpretation
        if kind.startswith("MONOCHROME") and pixels.ndim == 2:
            scaled = _scale(np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float64), dataset)
            grey = np.round((1 - scaled if kind == "MONOCHROME1" else scaled) * 255)
            return Image.fromarray(grey.astype(np.uint8))
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, AttributeError, KeyError, TypeError, ValueError,
            NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be decoded as DICOM ({error}); fetch the file again, convert it to PNG, or "
                         "remove its row") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or kind.startswith("PALETTE"):
        raise InputError(f"{path}: expected one grey frame or one of 8-bit RGB, found {kind} of shape "
                         f"{list(pixels.shape)}; convert it to PNG, or remove its row")
    return Image.fromarray(pixels)


def _scale(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Grey values to [0, 1] by the first window (DICOM PS3.3 C.11.2.1.2), else by their own range. Shape: as given."""
    centre, width = (np.atleast_1d(dataset.get(name, np.nan)).astype(float)[0] for name in ("WindowCenter", "WindowWidth"))
    if not width > 0 or not np.isfinite(centre):
        return (values - values.min()) / max(np.ptp(values), 1e-12)
    function = dataset.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    return np.clip((values - (centre - 0.5)) / max(width - 1, 1e-12) + 0.5, 0, 1)
