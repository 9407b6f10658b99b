"""Phantom films: seven findings, each with a zone and an exact lesion mask, on chests drawn by
code.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .anatomy import (
    IMAGE_SIZE,
    SIDES,
    Anatomy,
    dome_height,
    draw_anatomy,
    draw_chest,
    ellipse,
    heart_distance,
    smooth_noise,
    soft,
)

FINDINGS = (
    "opacity",
    "nodule",
    "effusion",
    "pneumothorax",
    "cardiomegaly",
    "atelectasis",
    "pneumoperitoneum",
)
LEVELS = ("upper", "middle", "lower")
ZONES = tuple(
    f"{side} {level}" for side in SIDES for level in (*LEVELS, "apex", "base", "diaphragm")
) + ("heart",)
PREVALENCE = 0.28


@dataclass
class Film:
    """One phantom radiograph and the truth about it.

    Attributes:
        image: 8-bit grey values. Shape: [224, 224].
        zones: where each finding is, one of ``ZONES``.
        masks: the pixels each finding covers, bool. Shape: [224, 224] each.
    """

    film_id: str
    patient_id: str
    image: np.ndarray
    zones: dict[str, str] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def lesion_mask(self) -> np.ndarray:
        """The union of all masks, bool. Shape: [224, 224]."""
        return (
            np.any(list(self.masks.values()), axis=0)
            if self.masks
            else np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        )


def draw_film(patient: int, seed: int, findings: tuple[str, ...] | None = None) -> Film:
    """Draw one patient's film.

    Args:
        patient: the patient's number; with ``seed`` it decides every pixel.
        findings: the findings to show; by default each of ``FINDINGS`` is present with probability
            0.28.

    Raises:
        ValueError: a finding that the world does not know.
    """
    rng = np.random.default_rng([seed, patient, 2])
    present = (
        tuple(f for f in FINDINGS if rng.random() < PREVALENCE)
        if findings is None
        else tuple(findings)
    )
    unknown = set(present) - set(FINDINGS)
    if unknown:
        raise ValueError(f"unknown findings {sorted(unknown)}; expected some of {FINDINGS}")
    body = draw_anatomy(patient, seed)
    heart_size = rng.uniform(1.42, 1.65) if "cardiomegaly" in present else rng.uniform(0.92, 1.04)
    layers = draw_chest(body, heart_size)
    film = Film(f"p{patient:05d}", f"patient{patient:05d}", np.empty(0), choose_zones(present, rng))
    pixels = layers[0]
    for finding in sorted(film.zones, key=_DRAWING_ORDER.index):
        pixels, mask = _DRAW[finding](pixels, body, film.zones[finding], layers, heart_size, rng)
        film.masks[finding] = mask
    gain = 1 + 0.5 * np.clip(pixels, 0, 1)
    pixels = body.exposure * pixels + 0.018 * gain * rng.standard_normal(
        pixels.shape, dtype=np.float32
    )
    film.image = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    return film


def films(count: int, seed: int, start: int = 0) -> list[Film]:
    """Draw ``count`` patients' films, numbered from ``start``, on all cores."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda patient: draw_film(patient, seed), range(start, start + count)))


def choose_zones(present: tuple[str, ...], rng: np.random.Generator) -> dict[str, str]:
    """Give each finding a zone, uniformly, such that no two lung findings share one."""
    zones: dict[str, str] = {}
    free = [f"{side} {level}" for side in SIDES for level in LEVELS]
    for finding, place, hidden in (
        ("effusion", "base", "lower"),
        ("pneumothorax", "apex", "upper"),
    ):
        if finding in present:
            side = SIDES[rng.integers(2)]
            zones[finding] = f"{side} {place}"
            free.remove(f"{side} {hidden}")
    if "pneumoperitoneum" in present:
        zones["pneumoperitoneum"] = f"{SIDES[rng.integers(2)]} diaphragm"
    if "cardiomegaly" in present:
        zones["cardiomegaly"] = "heart"
    for finding in ("opacity", "nodule", "atelectasis"):
        if finding in present:
            zones[finding] = free.pop(rng.integers(len(free)))
    return zones


def _place(
    body: Anatomy, zone: str, lungs: dict[str, np.ndarray], inside: float, rng: np.random.Generator
) -> tuple[float, float]:
    """A point of a lung zone, at least about ``inside`` grid units from the lung's edge."""
    side, level = zone.split()
    x, y = body.coordinates()
    base = (body.dome_right if side == "right" else body.dome_left) + 0.06
    third = (base - body.lung_top) / 3
    top = body.lung_top + LEVELS.index(level) * third
    room = (lungs[side] > 0.9) & (y > top + 0.25 * third) & (y < top + 0.80 * third)
    reach = int(inside * IMAGE_SIZE / 2)
    core = room & np.roll(lungs[side] > 0.9, reach, 1) & np.roll(lungs[side] > 0.9, -reach, 1)
    rows, columns = np.nonzero(core if core.any() else room)
    pick = rng.integers(len(rows))
    return float(x[rows[pick], columns[pick]]), float(y[rows[pick], columns[pick]])


def _opacity(film, body, zone, layers, heart_size, rng):
    x, y = body.coordinates()
    side = zone.split()[0]
    cx, cy = _place(body, zone, layers[2], 0.07, rng)
    radii = rng.uniform(0.11, 0.16), rng.uniform(0.10, 0.14)
    r2 = ((x - cx) / radii[0]) ** 2 + ((y - cy) / radii[1]) ** 2
    cloud = np.exp(-0.8 * r2) * np.clip(1 + 0.35 * smooth_noise(rng, 18), 0.2, 2) * layers[2][side]
    return film + rng.uniform(0.26, 0.36) * cloud, (r2 < 1.4) & (layers[2][side] > 0.5)


def _nodule(film, body, zone, layers, heart_size, rng):
    x, y = body.coordinates()
    radius = rng.uniform(0.055, 0.080)
    distance = ellipse(
        x,
        y,
        _place(body, zone, layers[2], radius + 0.02, rng),
        (radius, radius * rng.uniform(0.9, 1.1)),
    )
    return film + rng.uniform(0.30, 0.40) * soft(distance, 0.008), distance > 0


def _atelectasis(film, body, zone, layers, heart_size, rng):
    x, y = body.coordinates()
    side = zone.split()[0]
    cx, cy = _place(body, zone, layers[2], 0.10, rng)
    angle, length = rng.uniform(-0.35, 0.35), rng.uniform(0.15, 0.21)
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    across = -(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle) - 0.25 * along**2
    distance = np.minimum(length - np.abs(along), rng.uniform(0.020, 0.028) - np.abs(across))
    plate = soft(distance, 0.007) * layers[2][side]
    return film + rng.uniform(0.30, 0.38) * plate, (distance > 0) & (layers[2][side] > 0.5)


def _effusion(film, body, zone, layers, heart_size, rng):
    x, y = body.coordinates()
    side = zone.split()[0]
    out = x * (-1 if side == "right" else 1)
    top = (body.dome_right if side == "right" else body.dome_left) + 0.02 - rng.uniform(0.08, 0.22)
    level = top + 0.10 - 0.30 * np.clip((out - 0.30) / 0.40, 0, 1.2) ** 2.2
    fluid = soft(y - level, 0.018) * layers[2][side]
    return film * (1 - 0.9 * fluid) + 0.9 * fluid * rng.uniform(0.66, 0.74), fluid > 0.5


def _pneumothorax(film, body, zone, layers, heart_size, rng):
    x, y = body.coordinates()
    side = zone.split()[0]
    out = x * (-1 if side == "right" else 1)
    depth, foot = rng.uniform(0.14, 0.22), rng.uniform(0.0, 0.25)
    cage_y = np.clip((0.25 - y) / (0.25 - body.lung_top - depth), 0, 1)
    edge = 0.05 + (body.lung_width - depth * np.clip((foot - y) / 0.5, 0, 1) - 0.05) * np.sqrt(
        1 - cage_y**2.4
    )
    gap = np.maximum(out - edge, body.lung_top + depth - y)
    air = soft(np.minimum(gap, foot - y), 0.008) * layers[2][side]
    line = np.exp(-((gap / 0.012) ** 2)) * layers[2][side] * soft(foot - y, 0.03)
    return film - air * (0.13 + 0.20 * layers[1]) + 0.26 * line, air > 0.5


def _cardiomegaly(film, body, zone, layers, heart_size, rng):
    x, y = body.coordinates()
    return film, (heart_distance(body, x, y, heart_size) > 0) & (y < body.dome_left + 0.08)


def _pneumoperitoneum(film, body, zone, layers, heart_size, rng):
    x, y = body.coordinates()
    side = zone.split()[0]
    out = x * (-1 if side == "right" else 1)
    top = dome_height(body, side, out) + 0.030
    thickness = rng.uniform(0.055, 0.095) * np.clip(1 - ((out - 0.36) / 0.26) ** 2, 0, 1)
    distance = np.minimum(y - top, top + thickness - y)
    air = soft(distance, 0.010) * (thickness > 0.005)
    return film - 0.48 * air, (distance > 0) & (thickness > 0.005)


_DRAW = {
    "opacity": _opacity,
    "nodule": _nodule,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "cardiomegaly": _cardiomegaly,
    "atelectasis": _atelectasis,
    "pneumoperitoneum": _pneumoperitoneum,
}
_DRAWING_ORDER = (
    "cardiomegaly",
    "pneumoperitoneum",
    "pneumothorax",
    "opacity",
    "nodule",
    "atelectasis",
    "effusion",
)
