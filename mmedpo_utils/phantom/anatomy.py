"""The healthy part of a phantom film: one patient's chest, drawn by code.

Everything lives on a square grid with x and y in [-1, 1]; y points down. As on a real frontal film
the patient's right side is on the reader's left. Brightness is in [0, 1], air is dark, bone and
fluid are bright.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

IMAGE_SIZE = 224
SIDES = ("right", "left")
_axis = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
GRID_X, GRID_Y = np.meshgrid(_axis, _axis)
STROKE_SIZE = 2 * IMAGE_SIZE  # bones and vessels are drawn at twice the size, then averaged down
RIBS = 9  # a side
VESSELS = 13  # a lung


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
        x = (GRID_X - self.shift_x) / self.scale
        y = (GRID_Y - self.shift_y) / self.scale
        return x - self.lean * y, y

    def on_strokes(self, x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
        """Points of the patient's own frame as pixels of the layers that `strokes` draws on.

        It inverts `coordinates`. Shape: x and y [N], to N pairs in [0, 448].
        """
        film_x = (x + self.lean * y) * self.scale + self.shift_x
        film_y = y * self.scale + self.shift_y
        columns = (film_x + 1) * STROKE_SIZE / 2
        rows = (film_y + 1) * STROKE_SIZE / 2
        return list(zip(columns, rows, strict=True))

    def dome(self, side: str) -> float:
        """The y of the top of the diaphragm on one side."""
        return self.dome_right if side == "right" else self.dome_left


class Chest(NamedTuple):
    """A chest without lung findings, as `draw_chest` draws it.

    Attributes:
        film: brightness before grain. Shape: [224, 224].
        vessels: the vessel layer, already part of ``film``. Shape: [224, 224].
        lungs: soft membership in [0, 1] per side, the heart cut out. Shape: [224, 224] each.
    """

    film: np.ndarray
    vessels: np.ndarray
    lungs: dict[str, np.ndarray]


def draw_anatomy(patient: int, seed: int) -> Anatomy:
    """Draw one patient's proportions. The same ``patient`` and ``seed`` always give the same
    chest.
    """
    rng = np.random.default_rng([seed, patient, 1])
    u = rng.uniform
    # The order of the draws decides every film: this one comes before those below.
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


def outward(x: np.ndarray, side: str) -> np.ndarray:
    """Distance from the midline, positive on ``side``. Shape: as ``x``."""
    # The right lung is drawn at x < 0.
    return x * (-1 if side == "right" else 1)


def lung_distance(body: Anatomy, side: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Approximate signed distance to one lung's outline, positive inside: rib cage, mediastinum,
    diaphragm.

    Args:
        side: "right" (drawn at x < 0) or "left".
        x, y: the patient's frame. Shape: [H, W].
    """
    out = outward(x, side)
    # 0 where the rib cage is widest, 1 at the apex.
    cage_y = np.clip((0.25 - y) / (0.25 - body.lung_top), 0, 1)
    narrowing = np.sqrt(np.clip(1 - cage_y**2.4, 0, 1))
    lateral = 0.10 + (body.lung_width - 0.10) * narrowing + 0.03 * np.clip(y, 0, 1)
    medial = 0.115 + 0.03 * np.clip(-0.45 - y, 0, 1)
    between_walls = np.minimum(lateral - out, out - medial)
    return np.minimum(between_walls, dome_height(body, side, out) - y)


def dome_height(body: Anatomy, side: str, out: np.ndarray) -> np.ndarray:
    """The y of the diaphragm under one lung, where ``out`` is the distance from the midline."""
    return body.dome(side) + 0.20 * np.clip((out - 0.34) / 0.36, -0.6, 1.2) ** 2


def heart_distance(body: Anatomy, x: np.ndarray, y: np.ndarray, size: float = 1.0) -> np.ndarray:
    """Approximate signed distance to the heart's outline, positive inside; ``size`` widens it."""
    width = body.heart_width * size
    height = body.heart_height * (1 + 0.35 * (size - 1))
    base = body.dome_left
    # The ventricle leans: its lower end points to the patient's left.
    leaning_x = x + 0.35 * (y - base + 0.2) * -0.6
    centre = (0.10 + 0.07 * (size - 1), base - 0.16)
    ventricle = ellipse(leaning_x, y, centre, (width, height))
    atrium = ellipse(x, y, (-0.09, base - 0.20), (0.15 * size**0.7, 0.24))
    return np.maximum(ventricle, atrium)


def strokes(body: Anatomy, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bones (ribs and clavicles) and lung vessels as two brightness layers. Shape: two [224, 224]
    arrays in [0, 1].
    """
    bones = Image.new("L", (STROKE_SIZE, STROKE_SIZE))
    vessels = Image.new("L", (STROKE_SIZE, STROKE_SIZE))
    bone_pen = ImageDraw.Draw(bones)
    vessel_pen = ImageDraw.Draw(vessels)
    for sign in (-1, 1):
        # A later line covers an earlier one: the clavicle lies over the ribs.
        _draw_ribs(bone_pen, body, sign)
        _draw_clavicle(bone_pen, body, sign)
        _draw_vessels(vessel_pen, body, sign, rng)
    return _soft_layer(bones, 2.2), _soft_layer(vessels, 2.0)


# How far along a line each of its points lies.
ALONG = np.linspace(0, 1, 14)


def _draw_ribs(pen: ImageDraw.ImageDraw, body: Anatomy, sign: int) -> None:
    """Draw one side's ribs: a bright arch at the back, and a darker one in front."""
    for rib in range(RIBS):
        top = body.lung_top + 0.06 + rib * body.rib_spacing
        # 1 at the apex, where the cage is narrow; the first ribs keep half of the width.
        above = max(0, (0.1 - top) / (0.16 - body.lung_top))
        reach = (body.lung_width + 0.03) * np.sqrt(max(0.25, 1 - above**2.4))
        back_x = 0.06 + (reach - 0.06) * ALONG
        back_y = top - 0.05 * np.sin(np.pi * ALONG) + body.rib_slope * ALONG**2.5
        front_x = reach - (reach - 0.30) * ALONG
        front_y = top + body.rib_slope + 0.16 * ALONG**1.3
        back = body.on_strokes(sign * back_x, back_y)
        front = body.on_strokes(sign * front_x, front_y)
        pen.line(back, fill=125, width=13, joint="curve")
        pen.line(front, fill=60, width=12, joint="curve")


def _draw_clavicle(pen: ImageDraw.ImageDraw, body: Anatomy, sign: int) -> None:
    """Draw one side's clavicle, the brightest bone."""
    x = 0.09 + 0.62 * ALONG
    y = body.lung_top + 0.20 - 0.13 * ALONG - 0.05 * np.sin(2 * np.pi * ALONG)
    pen.line(body.on_strokes(sign * x, y), fill=255, width=15, joint="curve")


def _draw_vessels(
    pen: ImageDraw.ImageDraw, body: Anatomy, sign: int, rng: np.random.Generator
) -> None:
    """Draw one lung's vessels: they leave the hilum, thick and bright at first."""
    for angle in rng.uniform(-1.25, 1.35, VESSELS):
        length = rng.uniform(0.18, 0.44)
        bend = rng.uniform(-0.3, 0.3)
        direction = angle + bend * ALONG
        x = 0.15 + length * ALONG * np.cos(direction)
        y = -0.08 + length * 1.25 * ALONG * np.sin(direction)
        points = body.on_strokes(sign * x, y)
        pen.line(points, fill=110, width=3, joint="curve")
        pen.line(points[:6], fill=200, width=6, joint="curve")


def _soft_layer(strokes: Image.Image, radius: float) -> np.ndarray:
    """Blur a layer of strokes and average it down. Shape: [224, 224], in [0, 1]."""
    blurred = strokes.filter(ImageFilter.GaussianBlur(radius))
    small = blurred.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Band-limited noise with ``cells`` bumps a side and about unit variance. Shape: [224, 224]."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32), mode="F")
    return np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def draw_chest(body: Anatomy, heart_size: float = 1.0) -> Chest:
    """Draw a chest without lung findings: film, vessels and lungs (see `Chest` for the shapes)."""
    rng = np.random.default_rng(body.seed)
    x, y = body.coordinates()
    bones, vessels = strokes(body, rng)
    heart = soft(heart_distance(body, x, y, heart_size), 0.016)
    lungs = {side: soft(lung_distance(body, side, x, y)) * (1 - heart) for side in SIDES}
    lung = lungs["right"] + lungs["left"]
    film = _midline(body, x, y)
    aortic_knob = 0.07 * soft(ellipse(x, y, (0.13, -0.30), (0.085, 0.085)), 0.015)
    film += 0.05 * heart + aortic_knob * (1 - lung)
    hilum = np.exp(-(((np.abs(x) - 0.19) / 0.07) ** 2 + ((y + 0.08) / 0.13) ** 2))
    air = 0.20 + 0.05 * y + 0.03 * smooth_noise(rng, 12) + 0.16 * hilum
    film = film * (1 - lung) + lung * air
    # Bones are plainer over a lung than over soft tissue.
    film += lung * 0.20 * vessels + bones * (0.13 * lung + 0.07)
    if body.bubble > 0.4:
        # Air in the stomach, under the left dome: dark as a finding is, and none.
        bubble = ellipse(x, y, (0.42, body.dome_left + 0.20), (0.13, 0.07))
        film -= 0.26 * soft(bubble, 0.02)
    torso = _torso(body, x, y)
    film = film * torso + 0.03 * (1 - torso) + 0.012 * smooth_noise(rng, 5)
    return Chest(film, vessels, lungs)


def _midline(body: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness of the soft tissue, the abdomen, the spine and the trachea. Shape: as ``x``."""
    below_dome = y - np.where(x < 0, body.dome_right, body.dome_left)
    film = 0.60 + 0.12 * soft(below_dome, 0.10) - 0.06 * np.abs(x)
    vertebrae = 0.85 + 0.15 * np.sin(y * 2 * np.pi / 0.17)
    film += 0.16 * soft(0.085 - np.abs(x), 0.02) * vertebrae
    # The trachea holds air: dark, above the carina, a little to the right of the midline.
    film -= 0.15 * soft(0.045 - np.abs(x + 0.01), 0.012) * soft(-0.15 - y, 0.03)
    return film


def _torso(body: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Soft membership in trunk and neck, cut off at the shoulders. Shape: as ``x``."""
    trunk = ellipse(x, y, (0, 0.55), (body.habitus, 1.75))
    neck = ellipse(x, y, (0, -1.0), (0.24, 0.5))
    shoulders = y + 1.05 - 0.35 * np.clip(np.abs(x) - 0.2, 0, 1)
    return soft(np.minimum(np.maximum(trunk, neck), shoulders), 0.02)
