"""The healthy part of a phantom film: one patient's chest, drawn by code.

Everything lives on a square grid with x and y in [-1, 1]; y points down. As on a real frontal film
the patient's right side is on the reader's left. Brightness is in [0, 1], air is dark, bone and
fluid are bright.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

IMAGE_SIZE = 224
SIDES = ("right", "left")
_axis = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
GRID_X, GRID_Y = np.meshgrid(_axis, _axis)


@dataclass(frozen=True)
class Anatomy:
    """One patient's proportions, in grid units (2 is the film's width)."""

    shift_x: float
    shift_y: float
    scale: float
    lean: float
    lung_width: float
    lung_top: float
    dome_right: float
    dome_left: float
    heart_width: float
    heart_height: float
    rib_spacing: float
    rib_slope: float
    habitus: float
    exposure: float
    bubble: float
    seed: int

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """The film's grid in the patient's own frame. Shape: two [224, 224] arrays."""
        x, y = (GRID_X - self.shift_x) / self.scale, (GRID_Y - self.shift_y) / self.scale
        return x - self.lean * y, y


def draw_anatomy(patient: int, seed: int) -> Anatomy:
    """Draw one patient's proportions. The same ``patient`` and ``seed`` always give the same
    chest.
    """
    rng = np.random.default_rng([seed, patient, 1])
    u = rng.uniform
    dome = u(0.50, 0.58)
    return Anatomy(
        shift_x=u(-0.05, 0.05),
        shift_y=u(-0.04, 0.04),
        scale=u(0.92, 1.04),
        lean=u(-0.04, 0.04),
        lung_width=u(0.66, 0.74),
        lung_top=u(-0.80, -0.72),
        dome_right=dome,
        dome_left=dome + u(0.03, 0.07),
        heart_width=u(0.24, 0.28),
        heart_height=u(0.27, 0.31),
        rib_spacing=u(0.135, 0.155),
        rib_slope=u(0.16, 0.26),
        habitus=u(0.88, 0.98),
        exposure=u(0.92, 1.08),
        bubble=u(0, 1),
        seed=int(rng.integers(2**31)),
    )


def soft(distance: np.ndarray, width: float = 0.012) -> np.ndarray:
    """Soft step: 1 well inside (``distance`` > 0), 0 well outside, ``width`` in grid units."""
    return 1 / (1 + np.exp(np.clip(-distance / width, -30, 30)))


def ellipse(
    x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radii: tuple[float, float]
) -> np.ndarray:
    """Approximate signed distance to an ellipse's edge, positive inside, in grid units."""
    r = np.sqrt(((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2)
    return (1 - r) * min(radii)


def lung_distance(body: Anatomy, side: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Approximate signed distance to one lung's outline, positive inside: rib cage, mediastinum,
    diaphragm.

    Args:
        side: "right" (drawn at x < 0) or "left".
        x, y: the patient's frame. Shape: [H, W].
    """
    out = x * (-1 if side == "right" else 1)
    cage_y = np.clip((0.25 - y) / (0.25 - body.lung_top), 0, 1)
    lateral = (
        0.10
        + (body.lung_width - 0.10) * np.sqrt(np.clip(1 - cage_y**2.4, 0, 1))
        + 0.03 * np.clip(y, 0, 1)
    )
    medial = 0.115 + 0.03 * np.clip(-0.45 - y, 0, 1)
    return np.minimum(np.minimum(lateral - out, out - medial), dome_height(body, side, out) - y)


def dome_height(body: Anatomy, side: str, out: np.ndarray) -> np.ndarray:
    """The y of the diaphragm under one lung, where ``out`` is the distance from the midline."""
    top = body.dome_right if side == "right" else body.dome_left
    return top + 0.20 * np.clip((out - 0.34) / 0.36, -0.6, 1.2) ** 2


def heart_distance(body: Anatomy, x: np.ndarray, y: np.ndarray, size: float = 1.0) -> np.ndarray:
    """Approximate signed distance to the heart's outline, positive inside; ``size`` widens it."""
    width, height = body.heart_width * size, body.heart_height * (1 + 0.35 * (size - 1))
    base = body.dome_left
    ventricle = ellipse(
        x + 0.35 * (y - base + 0.2) * -0.6,
        y,
        (0.10 + 0.07 * (size - 1), base - 0.16),
        (width, height),
    )
    atrium = ellipse(x, y, (-0.09, base - 0.20), (0.15 * size**0.7, 0.24))
    return np.maximum(ventricle, atrium)


def strokes(body: Anatomy, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bones (ribs and clavicles) and lung vessels as two brightness layers. Shape: two [224, 224]
    arrays in [0, 1].
    """
    zoom = 2 * IMAGE_SIZE
    bones, vessels = Image.new("L", (zoom, zoom)), Image.new("L", (zoom, zoom))
    draw_bones, draw_vessels = ImageDraw.Draw(bones), ImageDraw.Draw(vessels)

    def to_film(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
        px, py = (x + body.lean * y) * body.scale + body.shift_x, y * body.scale + body.shift_y
        return list(zip((px + 1) * zoom / 2, (py + 1) * zoom / 2, strict=True))

    t = np.linspace(0, 1, 14)
    for sign in (-1, 1):
        for rib in range(9):
            top = body.lung_top + 0.06 + rib * body.rib_spacing
            reach = (body.lung_width + 0.03) * np.sqrt(
                max(0.25, 1 - max(0, (0.1 - top) / (0.16 - body.lung_top)) ** 2.4)
            )
            back = to_film(
                sign * (0.06 + (reach - 0.06) * t),
                top - 0.05 * np.sin(np.pi * t) + body.rib_slope * t**2.5,
            )
            front = to_film(
                sign * (reach - (reach - 0.30) * t), top + body.rib_slope + 0.16 * t**1.3
            )
            draw_bones.line(back, fill=125, width=13, joint="curve")
            draw_bones.line(front, fill=60, width=12, joint="curve")
        collar = to_film(
            sign * (0.09 + 0.62 * t), body.lung_top + 0.20 - 0.13 * t - 0.05 * np.sin(2 * np.pi * t)
        )
        draw_bones.line(collar, fill=255, width=15, joint="curve")
        for angle in rng.uniform(-1.25, 1.35, 13):
            length, bend = rng.uniform(0.18, 0.44), rng.uniform(-0.3, 0.3)
            bx = 0.15 + length * t * np.cos(angle + bend * t)
            by = -0.08 + length * 1.25 * t * np.sin(angle + bend * t)
            points = to_film(sign * bx, by)
            draw_vessels.line(points, fill=110, width=3, joint="curve")
            draw_vessels.line(points[:6], fill=200, width=6, joint="curve")
    layers = [
        layer.filter(ImageFilter.GaussianBlur(r)).resize(
            (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX
        )
        for layer, r in ((bones, 2.2), (vessels, 2.0))
    ]
    return tuple(np.asarray(layer, dtype=np.float32) / 255 for layer in layers)


def smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Band-limited noise with ``cells`` bumps a side and about unit variance. Shape: [224, 224]."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32), mode="F")
    return np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def draw_chest(
    body: Anatomy, heart_size: float = 1.0
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Draw a chest without lung findings.

    Returns:
        film: brightness before grain. Shape: [224, 224].
        vessels: the vessel layer, already part of ``film``. Shape: [224, 224].
        lungs: soft membership in [0, 1] per side, the heart cut out. Shape: [224, 224] each.
    """
    rng = np.random.default_rng(body.seed)
    x, y = body.coordinates()
    bones, vessels = strokes(body, rng)
    heart = soft(heart_distance(body, x, y, heart_size), 0.016)
    lungs = {side: soft(lung_distance(body, side, x, y)) * (1 - heart) for side in SIDES}
    lung = lungs["right"] + lungs["left"]
    torso = np.maximum(
        ellipse(x, y, (0, 0.55), (body.habitus, 1.75)), ellipse(x, y, (0, -1.0), (0.24, 0.5))
    )
    torso = soft(np.minimum(torso, y + 1.05 - 0.35 * np.clip(np.abs(x) - 0.2, 0, 1)), 0.02)
    film = (
        0.60
        + 0.12 * soft(y - np.where(x < 0, body.dome_right, body.dome_left), 0.10)
        - 0.06 * np.abs(x)
    )
    film += 0.16 * soft(0.085 - np.abs(x), 0.02) * (0.85 + 0.15 * np.sin(y * 2 * np.pi / 0.17))
    film -= 0.15 * soft(0.045 - np.abs(x + 0.01), 0.012) * soft(-0.15 - y, 0.03)
    film += 0.05 * heart + 0.07 * soft(ellipse(x, y, (0.13, -0.30), (0.085, 0.085)), 0.015) * (
        1 - lung
    )
    hilum = np.exp(-(((np.abs(x) - 0.19) / 0.07) ** 2 + ((y + 0.08) / 0.13) ** 2))
    film = film * (1 - lung) + lung * (
        0.20 + 0.05 * y + 0.03 * smooth_noise(rng, 12) + 0.16 * hilum
    )
    film += lung * 0.20 * vessels + bones * (0.13 * lung + 0.07)
    if body.bubble > 0.4:
        film -= 0.26 * soft(ellipse(x, y, (0.42, body.dome_left + 0.20), (0.13, 0.07)), 0.02)
    film = film * torso + 0.03 * (1 - torso) + 0.012 * smooth_noise(rng, 5)
    return film, vessels, lungs
