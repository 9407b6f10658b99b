"""DICOM films as 8-bit images, through pydicom and GDCM's decoders (the optional extra
``dicom``).
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
from PIL import Image

from ..base.errors import InputError, first_line
from ..base.images import check_size, scale_to_8_bits

EXTRA = "pip install 'mmedpo-notebooks[dicom]'"
# A damaged JPEG makes GDCM abort the process that it runs in, and no exception is to be caught.
DECODE = """
import sys, numpy
from pydicom.pixels import pixel_array
try:
    numpy.save(sys.stdout.buffer, pixel_array(sys.argv[1]), allow_pickle=False)
except Exception as error:
    sys.exit(str(error).partition("\\n")[0] or type(error).__name__)
"""
DECODE_SECONDS = 300


def open_dicom(path: str | os.PathLike) -> Image.Image:
    """Open one frame as mode L or RGB, 8 bits, dark where little was attenuated.

    What the file says of its grey values is followed: modality LUT or rescale, then the first VOI
    LUT or the first window, then inversion (MONOCHROME1, or a presentation LUT of shape INVERSE).
    Without VOI LUT and window the values are scaled from their own minimum and maximum. Padding is
    black, and does not count for these.

    Raises:
        InputError: pydicom is not installed, or the file is not one grey or RGB frame that it can
            decode.
    """
    try:
        import pydicom
        from pydicom.pixels import pixel_array
    except ImportError as error:
        raise InputError(f"{path}: DICOM needs pydicom; install the extra: {EXTRA}") from error
    try:
        dataset = pydicom.dcmread(path)
        check_size(int(dataset.Columns), int(dataset.Rows))
        compressed = dataset.file_meta.TransferSyntaxUID.is_encapsulated
        pixels = _decoded_elsewhere(path) if compressed else pixel_array(dataset)
        kind = dataset.PhotometricInterpretation
        if kind.startswith("MONOCHROME") and pixels.ndim == 2:
            return _grey(pixels, dataset)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # decoders of damaged files raise whatever they meet
        raise InputError(
            f"{path}: cannot be decoded as DICOM ({first_line(error)}); fetch the file again, "
            "convert it to PNG, or remove its row; where a decoder is missing, install the extra: "
            f"{EXTRA}"
        ) from error
    grey_or_palette = pixels.ndim != 3 or pixels.shape[-1] != 3 or kind.startswith("PALETTE")
    if pixels.dtype != np.uint8 or grey_or_palette:
        raise InputError(
            f"{path}: expected one grey frame or one of 8-bit RGB, found {kind} of shape "
            f"{list(pixels.shape)}; convert it to PNG, or remove its row"
        )
    return Image.fromarray(pixels)


def _decoded_elsewhere(path: str | os.PathLike) -> np.ndarray:
    """The pixels of a compressed film, decoded by a process of its own.

    It costs about half a second a film; a damaged one does not end what reads it.

    Raises:
        RuntimeError: it cannot be decoded; says why in one line.
    """
    # -P: nothing in the working folder is imported in place of a library.
    command = [sys.executable, "-P", "-W", "ignore", "-c", DECODE, os.path.abspath(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=DECODE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"its decoder did not end in {DECODE_SECONDS} seconds") from error
    if done.returncode == 1:
        raise RuntimeError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    if done.returncode:
        raise RuntimeError("its decoder crashed: the compressed data is damaged")
    return np.load(io.BytesIO(done.stdout), allow_pickle=False)


def _grey(pixels: np.ndarray, dataset: Any) -> Image.Image:
    """A grey frame as 8 bits, by what its file says of the grey values."""
    from pydicom.pixels import apply_modality_lut

    padding = _padding(pixels, dataset)
    values = np.asarray(apply_modality_lut(pixels, dataset))
    if dataset.get("VOILUTSequence"):
        # Where there is a window too, it is not applied then.
        grey = np.round(_looked_up(values, dataset) * 255).astype(np.uint8)
    else:
        window = _windowed(values.astype(np.float64), dataset)
        if window is None:
            grey = scale_to_8_bits(values, ~padding)
        else:
            grey = np.round(window * 255).astype(np.uint8)
    shape = dataset.get("PresentationLUTShape", "IDENTITY")
    if dataset.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE":
        grey = 255 - grey
    grey[padding] = 0
    return Image.fromarray(grey)


def _looked_up(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Grey values in [0, 1] by the first VOI LUT. Shape: as given.

    pydicom keeps places in the table as 8 bits where its entries have 8, so that a table of 4,096
    such entries is read wrongly. It is asked with the same entries as 16 bits, and with whole
    values inside the table's range.
    """
    from pydicom.pixels import apply_voi

    table = dataset.VOILUTSequence[0]
    entries, first, bits = table.LUTDescriptor
    entries = entries or 2**16
    table.LUTDescriptor = [entries % 2**16, first, max(bits, 16)]
    inside = np.clip(np.round(values), first, first + entries - 1).astype(np.int64)
    return np.clip(apply_voi(inside, dataset) / (2**bits - 1), 0, 1)


def _padding(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """Where the file says that a pixel is filling, by its stored value. Shape: as ``pixels``."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(pixels.shape, bool)
    last = dataset.get("PixelPaddingRangeLimit", first)
    return (pixels >= min(first, last)) & (pixels <= max(first, last))


def _windowed(values: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Grey values in [0, 1] by the first window (DICOM PS3.3 C.11.2.1.2); None without one. Shape:
    as given.
    """
    centre = _first_number(dataset, "WindowCenter")
    width = _first_number(dataset, "WindowWidth")
    # NaN where the file has none: it fails the comparison.
    if not width > 0 or not np.isfinite(centre):
        return None
    function = dataset.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    return np.clip((values - (centre - 0.5)) / max(width - 1, 1e-12) + 0.5, 0, 1)


def _first_number(dataset: Any, name: str) -> float:
    """The first value of an element that may hold several; NaN without one."""
    return float(np.atleast_1d(dataset.get(name, np.nan)).astype(float)[0])
