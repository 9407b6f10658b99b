"""Noise: the paper's equation by closed form, the released variant by the authors' own outputs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import resize_bilinear
from mmedpo_utils.noise import (
    global_noise,
    lesion_mask,
    localized_noise,
    signal_schedule,
    step_for_signal,
)
from mmedpo_utils.released.noise import released_mask, released_noise

STEMS = {"00000001_000": "png", "00027426_000": "png", "synpic42202": "jpg", "synpic32933": "jpg"}


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden/noise/expected.npz") as stored:
        return dict(stored)


def pixels(shared: Path, stem: str) -> np.ndarray:
    with Image.open(shared / f"golden/images/{stem}.{STEMS[stem]}") as image:
        return np.array(image)


def bump() -> np.ndarray:
    rows, columns = np.mgrid[:14, :14]
    return np.exp(-((rows - 4) ** 2 + (columns - 9) ** 2) / 6) / 196


def test_localized_noise_is_the_equation() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.random((40, 30)) * 0.02 + 0.49, rng.random((40, 30)).astype(np.float32)
    epsilon = np.random.default_rng(5).standard_normal((40, 30))
    expected = 0.1 * image * mask + np.sqrt(0.99) * epsilon * mask + image * (1 - mask)
    noised = localized_noise(image, mask, 0.01, np.random.default_rng(5))
    np.testing.assert_allclose(noised, np.clip(expected, 0, 1), atol=1e-6)
    assert noised.dtype == np.float32 and noised.min() == 0 and noised.max() == 1


@pytest.mark.parametrize("shape", [(32, 48), (32, 48, 3)])
def test_pixels_outside_the_mask_are_unchanged_bit_for_bit(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    mask = lesion_mask(bump(), shape[:2])
    noised = localized_noise(image, mask, 0.25, np.random.default_rng(1))
    assert np.array_equal(noised[mask == 0], image[mask == 0])
    assert (noised[mask == 1] != image[mask == 1]).mean() > 0.9
    assert np.array_equal(localized_noise(image, mask, 1.0, np.random.default_rng(1)), image), (
        "full signal, no noise"
    )


def test_noise_keeps_half_the_signal() -> None:
    image = np.full((400, 400), 0.5, np.float32)
    soft = localized_noise(image, np.full((400, 400), 1e-3), 0.25, np.random.default_rng(0)).astype(
        np.float64
    )
    change = (soft - 0.5) / 1e-3
    assert change.mean() == pytest.approx(-0.25, abs=0.01) and change.std() == pytest.approx(
        np.sqrt(0.75), abs=0.01
    )


def test_global_noise_is_the_mask_of_ones() -> None:
    image = np.random.default_rng(0).random((16, 16, 3))
    one = localized_noise(image, np.ones((16, 16)), 0.3, np.random.default_rng(2))
    assert np.array_equal(global_noise(image, 0.3, np.random.default_rng(2)), one)


@pytest.mark.parametrize(
    ("image", "mask", "alpha_bar", "word"),
    [
        (np.zeros((4, 4)), np.zeros((4, 5)), 0.5, "mask"),
        (np.full((4, 4), 2.0), np.zeros((4, 4)), 0.5, "image"),
        (np.zeros((4, 4)), np.full((4, 4), -1.0), 0.5, "mask"),
        (np.zeros((4, 4)), np.zeros((4, 4)), 1.5, "alpha_bar"),
        (np.full((4, 4), np.nan), np.zeros((4, 4)), 0.5, "image"),
    ],
)
def test_bad_arrays(image: np.ndarray, mask: np.ndarray, alpha_bar: float, word: str) -> None:
    with pytest.raises(InputError, match=word):
        localized_noise(image, mask, alpha_bar, np.random.default_rng(0))


@pytest.mark.parametrize("quantile", [0.5, 0.85, 0.95])
def test_quantile_mask_covers_its_share(quantile: float) -> None:
    mask = lesion_mask(
        bump() + np.random.default_rng(0).random((14, 14)) * 1e-4, (224, 224), "quantile", quantile
    )
    assert mask.mean() == pytest.approx(1 - quantile, abs=0.005)
    assert mask.shape == (224, 224) and mask.dtype == np.float32 and set(np.unique(mask)) == {0, 1}


@pytest.mark.parametrize("method", ["quantile", "mean_std", "otsu", "soft"])
def test_mask_holds_the_peak_and_ignores_the_scale(method: str) -> None:
    mask = lesion_mask(bump(), (280, 140), method)
    assert mask[90, 95] > 0.9 and mask[:20, :20].max() < 0.1, "cell (4, 9) of 14 is pixel (90, 95)"
    np.testing.assert_allclose(lesion_mask(1000 * bump() - 3, (280, 140), method), mask, atol=1e-6)
    assert 0 < mask.mean() < 0.3
    assert not lesion_mask(np.full((14, 14), 1 / 196), (32, 32), method).any(), (
        "a constant map has no lesion"
    )


def test_otsu_separates_two_levels() -> None:
    levels = np.full((100, 100), 0.2)
    levels[:30] = 0.7
    assert lesion_mask(levels, (100, 100), "otsu").mean() == pytest.approx(0.3)


def test_bad_mask_requests() -> None:
    for bad in (np.full((4, 4), np.nan), np.zeros((2, 4, 4))):
        with pytest.raises(InputError, match="heat map"):
            lesion_mask(bad, (8, 8))
    with pytest.raises(InputError, match="mean_std"):
        lesion_mask(bump(), (8, 8), "median")


def test_resize_agrees_with_pillow_when_it_enlarges() -> None:
    values = np.random.default_rng(0).random((14, 14)).astype(np.float32)
    pillow = np.asarray(Image.fromarray(values).resize((100, 224), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resize_bilinear(values, (224, 100)), pillow, atol=1e-5)


def test_schedule_matches_the_released_one(golden: dict[str, np.ndarray]) -> None:
    schedule = signal_schedule()
    np.testing.assert_allclose(schedule[golden["diffusion_steps"]], golden["alphas_bar"], atol=1e-5)
    np.testing.assert_allclose(schedule, golden["alphas_bar_all_f32"], rtol=1e-6)


def test_schedule_falls_and_the_step_halves_the_signal() -> None:
    schedule = signal_schedule()
    assert (
        schedule.shape == (1000,)
        and (np.diff(schedule) < 0).all()
        and 0 < schedule[-1] < schedule[0] < 1
    )
    assert np.sqrt(schedule[step_for_signal(schedule, 0.5)]) == pytest.approx(0.5, abs=2e-3)
    assert step_for_signal(schedule, 1.0) == 0 and step_for_signal(schedule, 0.0) == 999


def test_diffusion_step_matches_the_released_one(golden: dict[str, np.ndarray]) -> None:
    class Drawn:
        def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
            return golden["diffusion_randn_seed0"].transpose(1, 2, 0).reshape(shape)

    image, schedule = golden["diffusion_input"].transpose(1, 2, 0), signal_schedule()
    for step, expected in zip(golden["diffusion_steps"], golden["diffusion_output"], strict=True):
        noised = global_noise(image, schedule[step], Drawn())
        np.testing.assert_allclose(
            noised, np.clip(expected, 0, 1).transpose(1, 2, 0), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("kind", ["attn", "blob"])
def test_released_variant_matches_the_authors(
    shared: Path, golden: dict[str, np.ndarray], stem: str, kind: str
) -> None:
    image = pixels(shared, stem)
    heat_map = golden["attn14"][list(STEMS).index(stem)] if kind == "attn" else golden["blob14"]
    wanted = {name.removeprefix(f"{kind}_{stem}_"): value for name, value in golden.items()}
    mask = released_mask(heat_map.repeat(16, 0).repeat(16, 1), image.shape[:2])
    if kind == "attn":
        with Image.open(shared / f"golden/noise/mask_attn_{stem}.png") as stored:
            assert np.array_equal(mask, np.array(stored) > 0)
    assert mask.mean() == wanted["coverage"] and image.shape == tuple(wanted["shape"])
    noised = released_noise(image, mask, np.random.RandomState(0))
    assert hashlib.sha256(noised.tobytes()).hexdigest() == str(wanted["noised_sha256"])
    assert np.array_equal(np.bincount(noised[mask].ravel(), minlength=256), wanted["hist_masked"])
    assert np.array_equal(np.bincount(noised.ravel(), minlength=256), wanted["hist_all"])
    row, columns = int(wanted["first_row"]), wanted["first_row_cols"]
    assert np.array_equal(np.nonzero(mask.any(1))[0][0], row) and np.array_equal(
        np.nonzero(mask[row])[0], columns
    )
    assert np.array_equal(noised[row, columns], wanted["first_row_values"])
    assert np.array_equal(noised[~mask], image[~mask])


def test_negative_noise_wraps_modulo_256_whatever_the_processor() -> None:
    class Drawn:
        def normal(self, mean: float, deviation: float, shape: tuple[int, ...]) -> np.ndarray:
            return np.array([[-3.7, -0.9, 0.9, 3.7, -255.5, 300.2]]).reshape(shape)

    noised = released_noise(np.full((1, 6), 7, np.uint8), np.ones((1, 6), bool), Drawn())
    assert noised.tolist() == [[253, 0, 0, 3, 1, 44]]


def test_released_noise_is_speckle() -> None:
    noised = released_noise(
        np.full((200, 200), 128, np.uint8), np.ones((200, 200), bool), np.random.default_rng(0)
    )
    assert not ((noised > 51) & (noised < 206)).any()
    assert np.mean(noised == 0) == pytest.approx(0.079, abs=0.01)


def test_released_mask_covers_at_least_half() -> None:
    for seed in range(5):
        heat_map = np.random.default_rng(seed).random((14, 14)) ** 4
        assert released_mask(heat_map.repeat(16, 0).repeat(16, 1), (224, 224)).mean() >= 0.5
