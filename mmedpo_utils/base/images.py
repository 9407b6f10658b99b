"""Images on disk: found inside their folder, opened upright, as 8 bits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageOps

from .doors import open_door
from .errors import InputError, Unusable, first_line
from .rows import Row

PNG_END = b"IEND\xaeB`\x82"
MOST_PIXELS = 40_000_000  # mammograms have 25 million
# Pillow would try all its formats, whatever a file is called, and hand EPS to Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")


def resolve_image(root: str | os.PathLike, name: str) -> Path:
    """The file ``name`` inside ``root``. Raises InputError: missing, or outside root (.., an
    absolute path, a link).
    """
    root = Path(root).resolve()
    try:
        named = Path(os.path.normpath(root / name))
        path = named.resolve()
        relative = not PurePath(name).is_absolute() and named.is_relative_to(root)
        inside = relative and path.is_relative_to(root)
        found = inside and path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"image {name!r:.80}: is not a usable file name ({reason}); correct the name"
        ) from error
    if relative and not inside:
        raise InputError(
            f"image {name!r}: is a link that leads outside the image folder {root}, to "
            f"{path.parent}; copy the files that the links lead to (cp -rL {root} COPY), and give "
            "the copy as the image folder"
        )
    if not inside:
        raise InputError(
            f"image {name!r}: lies outside the image folder {root}; give a path relative to that "
            "folder"
        )
    if not found:
        raise InputError(
            f"image {name!r}: is missing in {root}; put the file there, or correct the name"
        )
    return path


def verify_image(root: str | os.PathLike, name: str, where: str, verified: set[Path]) -> None:
    """Open an image once, to see that it can be used.

    Args:
        where: the place of its row, which begins the error.
        verified: images that were opened before; this one joins them.

    Raises:
        InputError: as `resolve_image` and `open_image`.
    """
    try:
        path = resolve_image(root, name)
        if path not in verified:
            open_image(path)
            verified.add(path)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def open_image(path: str | os.PathLike) -> Image.Image:
    """Open an image upright, as mode L (grey) or RGB, 8 bits.

    Deep grey images (16 or 32 bits) are scaled from their own minimum and maximum; alpha is laid
    over black; DICOM needs the extra ``dicom``.

    Raises:
        InputError: missing, truncated, or not an image of a kind in `IMAGE_FORMATS`.
    """
    if is_dicom(path):
        return open_door("DICOM")(path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as opened:
            check_size(*opened.size)
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # decoders of damaged files raise whatever they meet
        raise InputError(
            f"{path}: cannot be opened as an image ({first_line(error)}); the file is missing, "
            f"truncated or not an image ({', '.join(IMAGE_FORMATS)} or DICOM): fetch it again, or "
            "remove its row"
        ) from error
    if image.mode[0] in "IF":
        try:
            return Image.fromarray(scale_to_8_bits(np.asarray(image)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def is_whole_png(path: Path) -> bool:
    """Whether a PNG that the kit wrote is there, to its end."""
    try:
        with open(path, "rb") as stream:
            stream.seek(-len(PNG_END), os.SEEK_END)
            return stream.read() == PNG_END
    except OSError:
        return False


def check_size(width: int, height: int) -> None:
    """Raises ValueError: more pixels than any film has; a small file can claim them, and they would
    fill the memory.
    """
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, and at most {MOST_PIXELS:,} are read")


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether the file says that it is DICOM: by its name, or by the mark after its preamble."""
    if os.fspath(path).lower().endswith((".dcm", ".dicom")):
        return True
    try:
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def scale_to_8_bits(values: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Grey values of any range to 0 to 255, from the least to the greatest of the finite ones.

    Args:
        values: Shape: [H, W].
        counted: False where a value shall neither count nor be seen (black). Shape: [H, W]; None:
            all.

    Returns:
        uint8; NaN is black, an infinity the end that it lies beyond. Shape: [H, W].

    Raises:
        InputError: no value is finite.
    """
    values = np.asarray(values, dtype=np.float64)
    counted = np.ones(values.shape, bool) if counted is None else counted
    known = values[counted & np.isfinite(values)]
    if not known.size:
        raise InputError("holds no finite grey value; fetch the file again, or remove its row")
    low = known.min()
    high = known.max()
    scaled = (np.clip(values, low, high) - low) / max(high - low, 1e-12)
    scaled[np.isnan(values) | ~counted] = 0
    return np.round(scaled * 255).astype(np.uint8)


def resize_bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation between cell centres, the border held.

    Args:
        values: float64. Shape: [h, w].
        size: height H and width W.

    Returns:
        float64. Shape: [H, W].
    """
    # Not torch's interpolate: its weights round, so that a constant map does not stay constant, and
    # a threshold finds a lesion in it.
    height, width = size
    down = _interpolation(values.shape[0], height)
    across = _interpolation(values.shape[1], width)
    return down @ values @ across.T


def _interpolation(old: int, new: int) -> np.ndarray:
    """Weights that take ``old`` samples to ``new``. Shape: [new, old]."""
    position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))


def with_images(
    rows: Sequence[Row], root: str | os.PathLike, split: str = "asked", decode: bool = False
) -> list[Row]:
    """The questions whose image is there; the others are named in one warning.

    Args:
        split: what the rows are called in the warning.
        decode: open each image too. A data set's own layout is read without, so that a damaged
            image shows only where it is used.

    Raises:
        InputError: no question's image can be used.
    """
    kept = []
    left_out = Unusable(f"{root}, split {split}")
    faults: dict[str, InputError | None] = {}
    for row in rows:
        name = row["image"]
        if name not in faults:
            faults[name] = None
            try:
                path = resolve_image(root, name)
                if decode:
                    open_image(path)
            except InputError as error:
                faults[name] = error
        if faults[name] is None:
            kept.append(row)
        else:
            left_out.note(InputError(f"{split}, question {row['question_id']!r}: {faults[name]}"))
    left_out.tell(len(kept))
    return kept
