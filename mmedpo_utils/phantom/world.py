"""Phantom films: seven findings, each with a zone and an exact lesion mask, on chests drawn by
code.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .anatomy import (
    IMAGE_SIZE,
    SIDES,
    Anatomy,
    Chest,
    dome_height,
    draw_anatomy,
    draw_chest,
    ellipse,
    heart_distance,
    outward,
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
PLACES = (*LEVELS, "apex", "base", "diaphragm")
ZONES = (*(f"{side} {place}" for side in SIDES for place in PLACES), "heart")
VERSION = 2  # of what is drawn: films on disk of another version are drawn anew
NORMAL_SHARE = 0.4  # of the films show no finding
PREVALENCE = 0.15  # of each finding on the others, drawn again until there is one
FAINTEST = 0.4  # conspicuity of the faintest finding; 1 is the plainest
NORMAL_HEART = 1.04  # the largest heart that is no cardiomegaly


@dataclass
class Film:
    """One phantom radiograph and the truth about it.

    Attributes:
        image: 8-bit grey values. Shape: [224, 224].
        zones: where each finding is, one of ``ZONES``.
        masks: the pixels each finding covers, bool. Shape: [224, 224] each.
        conspicuity: how plain each finding is, 0.4 to 1: its share of the full contrast, or of the
            heart's full growth.
    """

    film_id: str
    patient_id: str
    image: np.ndarray
    zones: dict[str, str] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    conspicuity: dict[str, float] = field(default_factory=dict)

    @property
    def lesion_mask(self) -> np.ndarray:
        """The union of all masks, bool. Shape: [224, 224]."""
        if not self.masks:
            return np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        return np.any(list(self.masks.values()), axis=0)


def draw_film(patient: int, seed: int, findings: tuple[str, ...] | None = None) -> Film:
    """Draw one patient's film.

    Args:
        patient: the patient's number; with ``seed`` it decides every pixel.
        findings: the findings to show; by default four films in ten show none, and on the others
            each of ``FINDINGS`` is present with probability 0.15.

    Raises:
        ValueError: a finding that the world does not know.
    """
    rng = np.random.default_rng([seed, patient, 2])
    present = _draw_findings(rng) if findings is None else tuple(findings)
    unknown = set(present) - set(FINDINGS)
    if unknown:
        raise ValueError(f"unknown findings {sorted(unknown)}; expected some of {FINDINGS}")
    body = draw_anatomy(patient, seed)
    conspicuity = {finding: float(rng.uniform(FAINTEST, 1)) for finding in present}
    if "cardiomegaly" in present:
        heart_size = NORMAL_HEART + conspicuity["cardiomegaly"] * rng.uniform(0.45, 0.65)
    else:
        heart_size = rng.uniform(0.92, NORMAL_HEART)
    scene = Scene(body, draw_chest(body, heart_size), heart_size)
    zones = choose_zones(present, rng)
    pixels = scene.chest.film
    masks = {}
    for finding in sorted(zones, key=_DRAWING_ORDER.index):
        draw = _DRAW[finding]
        pixels, masks[finding] = draw(pixels, scene, zones[finding], conspicuity[finding], rng)
    # Grain is stronger where the film is brighter.
    gain = 1 + 0.5 * np.clip(pixels, 0, 1)
    grain = rng.standard_normal(pixels.shape, dtype=np.float32)
    pixels = body.exposure * pixels + 0.018 * gain * grain
    image = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    name = f"{patient:05d}"
    return Film(f"p{name}", f"patient{name}", image, zones, masks, conspicuity)


def _draw_findings(rng: np.random.Generator) -> tuple[str, ...]:
    """What one film shows: nothing, or at least one finding."""
    if rng.random() < NORMAL_SHARE:
        return ()
    present: tuple[str, ...] = ()
    while not present:
        present = tuple(finding for finding in FINDINGS if rng.random() < PREVALENCE)
    return present


def films(count: int, seed: int, start: int = 0) -> list[Film]:
    """Draw ``count`` patients' films, numbered from ``start``, on all cores."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda patient: draw_film(patient, seed), range(start, start + count)))


def choose_zones(present: tuple[str, ...], rng: np.random.Generator) -> dict[str, str]:
    """Give each finding a zone, uniformly, such that no two lung findings share one."""
    zones: dict[str, str] = {}
    free = [f"{side} {level}" for side in SIDES for level in LEVELS]
    # Fluid at the base hides the lower zone of its side, air at the apex the upper one.
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


@dataclass(frozen=True)
class Scene:
    """What the findings are drawn on: proportions, the chest without findings, the heart's size."""

    body: Anatomy
    chest: Chest
    heart_size: float


def _place(scene: Scene, zone: str, inside: float, rng: np.random.Generator) -> tuple[float, float]:
    """A point of a lung zone, at least about ``inside`` grid units from the lung's edge."""
    body = scene.body
    side, level = zone.split()
    x, y = body.coordinates()
    base = body.dome(side) + 0.06
    third = (base - body.lung_top) / 3
    top = body.lung_top + LEVELS.index(level) * third
    lung = scene.chest.lungs[side] > 0.9
    # Not near the border of two zones: the level has to be plain to see.
    room = lung & (y > top + 0.25 * third) & (y < top + 0.80 * third)
    reach = int(inside * IMAGE_SIZE / 2)
    core = room & np.roll(lung, reach, 1) & np.roll(lung, -reach, 1)
    rows, columns = np.nonzero(core if core.any() else room)
    pick = rng.integers(len(rows))
    return float(x[rows[pick], columns[pick]]), float(y[rows[pick], columns[pick]])


# Each drawing function takes the film so far [224, 224], the scene, the finding's zone, how plain
# it is (a share of its full contrast) and the generator. It returns the film with the finding, and
# the pixels that the finding covers: bool [224, 224]. The order of the draws decides every film.
Drawn = tuple[np.ndarray, np.ndarray]


def _opacity(
    film: np.ndarray, scene: Scene, zone: str, plain: float, rng: np.random.Generator
) -> Drawn:
    """An opacity: a hazy bright cloud with a ragged edge, inside one lung."""
    x, y = scene.body.coordinates()
    lung = scene.chest.lungs[zone.split()[0]]
    centre_x, centre_y = _place(scene, zone, 0.07, rng)
    radius_x = rng.uniform(0.11, 0.16)
    radius_y = rng.uniform(0.10, 0.14)
    r2 = ((x - centre_x) / radius_x) ** 2 + ((y - centre_y) / radius_y) ** 2
    texture = np.clip(1 + 0.35 * smooth_noise(rng, 18), 0.2, 2)
    cloud = np.exp(-0.8 * r2) * texture * lung
    return film + plain * rng.uniform(0.26, 0.36) * cloud, (r2 < 1.4) & (lung > 0.5)


def _nodule(
    film: np.ndarray, scene: Scene, zone: str, plain: float, rng: np.random.Generator
) -> Drawn:
    """A nodule: a small, almost round, bright spot with a sharp edge."""
    x, y = scene.body.coordinates()
    radius = rng.uniform(0.055, 0.080)
    centre = _place(scene, zone, radius + 0.02, rng)
    radii = (radius, radius * rng.uniform(0.9, 1.1))
    distance = ellipse(x, y, centre, radii)
    return film + plain * rng.uniform(0.30, 0.40) * soft(distance, 0.008), distance > 0


def _atelectasis(
    film: np.ndarray, scene: Scene, zone: str, plain: float, rng: np.random.Generator
) -> Drawn:
    """A plate-like atelectasis: a thin, bright, slightly bent band across a lung."""
    x, y = scene.body.coordinates()
    lung = scene.chest.lungs[zone.split()[0]]
    centre_x, centre_y = _place(scene, zone, 0.10, rng)
    angle = rng.uniform(-0.35, 0.35)
    length = rng.uniform(0.15, 0.21)
    along = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
    bend = 0.25 * along**2
    across = -(x - centre_x) * np.sin(angle) + (y - centre_y) * np.cos(angle) - bend
    half_width = rng.uniform(0.020, 0.028)
    distance = np.minimum(length - np.abs(along), half_width - np.abs(across))
    plate = soft(distance, 0.007) * lung
    return film + plain * rng.uniform(0.30, 0.38) * plate, (distance > 0) & (lung > 0.5)


def _effusion(
    film: np.ndarray, scene: Scene, zone: str, plain: float, rng: np.random.Generator
) -> Drawn:
    """An effusion: bright fluid at the base of a lung, whose level rises towards the chest wall."""
    x, y = scene.body.coordinates()
    side = zone.split()[0]
    out = outward(x, side)
    top = scene.body.dome(side) + 0.02 - rng.uniform(0.08, 0.22)
    level = top + 0.10 - 0.30 * np.clip((out - 0.30) / 0.40, 0, 1.2) ** 2.2
    fluid = soft(y - level, 0.018) * scene.chest.lungs[side]
    # Fluid replaces what is behind it; it does not only add to it.
    dense = 0.9 * plain * fluid
    return film * (1 - dense) + dense * rng.uniform(0.66, 0.74), fluid > 0.5


def _pneumothorax(
    film: np.ndarray, scene: Scene, zone: str, plain: float, rng: np.random.Generator
) -> Drawn:
    """A pneumothorax: dark air without vessels outside a thin bright line, at the apex."""
    body = scene.body
    x, y = body.coordinates()
    side = zone.split()[0]
    lung = scene.chest.lungs[side]
    out = outward(x, side)
    depth = rng.uniform(0.14, 0.22)
    foot = rng.uniform(0.0, 0.25)  # the y at which the air ends
    cage_y = np.clip((0.25 - y) / (0.25 - body.lung_top - depth), 0, 1)
    collapsed = body.lung_width - depth * np.clip((foot - y) / 0.5, 0, 1)
    edge = 0.05 + (collapsed - 0.05) * np.sqrt(1 - cage_y**2.4)
    gap = np.maximum(out - edge, body.lung_top + depth - y)
    air = soft(np.minimum(gap, foot - y), 0.008) * lung
    line = np.exp(-((gap / 0.012) ** 2)) * lung * soft(foot - y, 0.03)
    # The vessel layer is taken away with the lung that held it.
    change = 0.26 * line - air * (0.13 + 0.20 * scene.chest.vessels)
    return film + plain * change, air > 0.5


def _cardiomegaly(
    film: np.ndarray, scene: Scene, zone: str, plain: float, rng: np.random.Generator
) -> Drawn:
    """A heart that is enlarged: `draw_chest` has drawn it already, so that only the mask is new."""
    x, y = scene.body.coordinates()
    heart = heart_distance(scene.body, x, y, scene.heart_size) > 0
    return film, heart & (y < scene.body.dome_left + 0.08)


def _pneumoperitoneum(
    film: np.ndarray, scene: Scene, zone: str, plain: float, rng: np.random.Generator
) -> Drawn:
    """A pneumoperitoneum: a dark crescent of air just below one dome of the diaphragm."""
    x, y = scene.body.coordinates()
    side = zone.split()[0]
    out = outward(x, side)
    top = dome_height(scene.body, side, out) + 0.030
    thickness = rng.uniform(0.055, 0.095) * np.clip(1 - ((out - 0.36) / 0.26) ** 2, 0, 1)
    distance = np.minimum(y - top, top + thickness - y)
    air = soft(distance, 0.010) * (thickness > 0.005)
    return film - 0.48 * plain * air, (distance > 0) & (thickness > 0.005)


Draw = Callable[[np.ndarray, Scene, str, float, np.random.Generator], Drawn]
_DRAW: dict[str, Draw] = {
    "opacity": _opacity,
    "nodule": _nodule,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "cardiomegaly": _cardiomegaly,
    "atelectasis": _atelectasis,
    "pneumoperitoneum": _pneumoperitoneum,
}
# Fluid comes last: it covers what lies behind it.
_DRAWING_ORDER = (
    "cardiomegaly",
    "pneumoperitoneum",
    "pneumothorax",
    "opacity",
    "nodule",
    "atelectasis",
    "effusion",
)
