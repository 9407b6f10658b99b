"""Views that live in the browser: a page holds its films, maps and masks as small arrays, and
blends, thresholds and outlines them on a canvas, so that a control needs no kernel.

A page is one self-contained notebook output. It works in a live kernel, after a restart, and in an
exported HTML file without a network. Where a notebook is not trusted, its scripts do not run, and
the still picture stays.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from IPython.display import HTML
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ..base.files import atomic_write
from .figures import ShownFigure
from .plots import MAP_COLOURS

BROWSER = Path(__file__).parent / "browser"
STILL_DPI = 80


@dataclass(frozen=True)
class Packed:
    """An array as a page keeps it.

    Attributes:
        values: the array.
        kind: ``film``: uint8, each row as differences, which compress well; ``half``: 16-bit
            floats, three digits; ``bits``: booleans, eight a byte; ``bytes``: uint8 as they are.
    """

    values: np.ndarray
    kind: str

    def data(self) -> bytes:
        """The bytes that the browser turns back into numbers."""
        if self.kind == "film":
            films = np.asarray(self.values, np.uint8)
            return np.diff(films, axis=-1, prepend=np.uint8(0)).tobytes()
        if self.kind == "half":
            return np.asarray(self.values, "<f2").tobytes()
        if self.kind == "bits":
            return np.packbits(np.asarray(self.values, bool)).tobytes()
        return np.asarray(self.values, np.uint8).tobytes()


class MaskList:
    """The lesions of many films in one array, and where each film's lie in it.

    Args:
        size: height and width of every mask.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.masks: list[np.ndarray] = []

    def add(self, lesions: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Take one film's masks by name, bool; what the browser reads (``lesionsOf``)."""
        listed = []
        for name, mask in lesions.items():
            listed.append({"name": name, "index": len(self.masks)})
            self.masks.append(mask)
        return listed

    def packed(self) -> Packed:
        """All of them. Shape: [N, H, W]."""
        return Packed(np.reshape(self.masks, (len(self.masks), *self.size)), "bits")


def fitted(image: Image.Image, side: int) -> np.ndarray:
    """An image in grey, whole, in a square with black around it: uint8. Shape: [side, side]."""
    return np.asarray(ImageOps.pad(image.convert("L"), (side, side), Image.Resampling.BILINEAR))


def pack(values: Mapping[str, Any], arrays: Mapping[str, Packed]) -> str:
    """Values (as JSON) and arrays in one compressed text.

    Layout before compression: the header's length (uint32, little-endian), the header (``values``
    and each array's name, kind and shape), then the arrays' bytes in that order.

    Returns:
        zlib's format in base64.
    """
    listed = []
    for name, array in arrays.items():
        listed.append({"name": name, "kind": array.kind, "shape": list(np.shape(array.values))})
    header = json.dumps({"values": values, "arrays": listed}).encode()
    parts = [struct.pack("<I", len(header)), header]
    parts += [array.data() for array in arrays.values()]
    return base64.b64encode(zlib.compress(b"".join(parts))).decode()


def map_colours() -> np.ndarray:
    """The colours of attention, from purple to yellow: uint8. Shape: [256, 3]."""
    return np.rint(255 * MAP_COLOURS[:, :3]).astype(np.uint8)


class Page:
    """One view, to be the last line of a notebook cell.

    Args:
        view: the view's script in ``show/browser``, without its ending.
        values: what the script reads beside the arrays; anything that JSON holds.
        arrays: films, maps, masks.
        draw_still: draws a figure of the same data, for readers whose page does not run scripts.
        alt: what the figure shows, in words.
    """

    def __init__(
        self,
        view: str,
        values: Mapping[str, Any],
        arrays: Mapping[str, Packed],
        draw_still: Callable[[], Figure],
        alt: str,
    ) -> None:
        self.view = view
        self.alt = alt
        self.draw_still = draw_still
        arrays = dict(arrays) | {"colours": Packed(map_colours(), "bytes")}
        self.packed = pack(values, arrays)

    @cached_property
    def still(self) -> ShownFigure:
        """The figure as a notebook shows it."""
        return ShownFigure(self.draw_still(), self.alt, STILL_DPI)

    def html(self) -> str:
        """The page's own part: a picture, and the script that puts the view in its place."""
        return self._with_script(self.still.html())

    def live(self) -> HTML:
        """The view alone, where a kernel answers a reader who waits: drawing the still picture
        takes most of a second.
        """
        return HTML(self._with_script(f"<p>{html.escape(self.alt)}</p>"))

    def _with_script(self, until_it_runs: str) -> str:
        scripts = [(BROWSER / f"{name}.js").read_text("utf-8") for name in ("engine", self.view)]
        style = (BROWSER / "style.css").read_text("utf-8")
        # The same output gets the same name: a notebook that is run again shows no difference.
        name = hashlib.sha256(self.packed.encode()).hexdigest()[:12]
        return "\n".join(
            [
                f'<div class="mmedpo" data-view="{name}">',
                until_it_runs,
                "</div>",
                f"<style>{style}</style>",
                "<script>(() => {",
                *scripts,
                f'start("{name}", "{self.packed}", view);',
                "})();</script>",
            ]
        )

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = self.still._repr_mimebundle_()
        return data | {"text/html": self.html()}, metadata

    def save(self, path: str | Path) -> None:
        """Write the view as an HTML file of its own."""
        text = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(self.alt)}</title></head><body>{self.html()}</body></html>"
        )
        with atomic_write(Path(path)) as temporary:
            temporary.write_text(text, encoding="utf-8")
