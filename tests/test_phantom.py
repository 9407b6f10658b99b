"""The phantom world: seeded films, exact masks, fair questions, truthful reports."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.settings import SPLITS
from mmedpo_utils.phantom.anatomy import (
    IMAGE_SIZE,
    draw_anatomy,
    draw_chest,
    ellipse,
    smooth_noise,
    soft,
)
from mmedpo_utils.phantom.texts import (
    pack_masks,
    questions,
    read_masks,
    report,
    with_article,
    write_dataset,
)
from mmedpo_utils.phantom.world import FINDINGS, LEVELS, ZONES, choose_zones, draw_film, films


@pytest.fixture(scope="module")
def population():
    return films(150, seed=7)


def test_same_seed_same_film_and_other_seed_another():
    first, again, other = draw_film(3, 0), draw_film(3, 0), draw_film(3, 1)
    assert np.array_equal(first.image, again.image) and first.zones == again.zones
    assert not np.array_equal(first.image, other.image)
    assert draw_anatomy(3, 0) == draw_anatomy(3, 0) != draw_anatomy(4, 0)


def test_order_does_not_matter():
    assert np.array_equal(films(3, 0, start=5)[2].image, draw_film(7, 0).image)


def test_films_are_8_bit_and_at_least_224_wide(population):
    assert all(film.image.shape == (IMAGE_SIZE, IMAGE_SIZE) == (224, 224) for film in population)
    assert all(film.image.dtype == np.uint8 for film in population)


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_changes_its_mask_and_little_else(finding):
    """The film with the finding differs from the same patient's healthy film inside the mask, by
    construction unseen here.
    """
    inside, outside = [], []
    for patient in range(12):
        ill, well = draw_film(patient, 0, (finding,)), draw_film(patient, 0, ())
        change = np.abs(smooth(ill.image) - smooth(well.image))
        mask = ill.masks[finding]
        halo = (
            np.asarray(
                Image.fromarray(mask).resize((28, 28), Image.Resampling.BOX).resize((224, 224))
            )
            > 0
        )
        inside.append(change[mask].mean())
        outside.append(change[~halo & ~mask].mean())
        assert list(ill.masks) == list(ill.zones) == [finding] and ill.zones[finding] in ZONES
    assert np.mean(inside) > 4 * np.mean(outside)


def smooth(image):
    small = Image.fromarray(image).resize((56, 56), Image.Resampling.BOX).resize((224, 224))
    return np.asarray(small, dtype=float)


def test_masks_lie_on_the_side_and_level_that_the_zone_says(population):
    for film in population:
        for finding, zone in film.zones.items():
            rows, columns = np.nonzero(film.masks[finding])
            if zone != "heart":
                assert (columns.mean() < 112) == zone.startswith("right"), (
                    film.film_id,
                    finding,
                    zone,
                )
            if zone.endswith("upper"):
                assert rows.mean() < 100
            if zone.endswith("lower"):
                assert rows.mean() > 85


def test_no_two_lung_findings_share_a_zone():
    rng = np.random.default_rng(0)
    for _ in range(200):
        zones = choose_zones(FINDINGS, rng)
        lung = [zone for zone in zones.values() if zone.split()[-1] in LEVELS]
        assert len(lung) == len(set(lung)) == 3 and set(zones) == set(FINDINGS)


def test_unknown_finding_is_refused():
    with pytest.raises(ValueError, match="unknown findings.*fracture"):
        draw_film(0, 0, ("fracture",))


def test_closed_questions_are_balanced_and_true(population):
    rows = questions(population, np.random.default_rng(0))
    zones = {f"{film.film_id}.png": film.zones for film in population}
    closed = Counter(
        (r["finding"], r["question_type"], r["gpt4_answer"])
        for r in rows
        if r["answer_type"] == "CLOSED"
    )
    for finding, kind, _ in closed:
        assert closed[finding, kind, "yes"] == closed[finding, kind, "no"]
    for row in rows:
        facts = zones[row["image"]]
        if row["question_type"] == "presence":
            assert (row["gpt4_answer"] == "yes") == (row["finding"] in facts)
        if row["question_type"] == "side":
            assert (row["gpt4_answer"] == "yes") == (
                facts[row["finding"]].split()[0] in row["text"]
            )
        if row["question_type"] == "location":
            assert facts[row["finding"]].startswith(row["gpt4_answer"])
        if row["question_type"] == "identity":
            assert facts[row["gpt4_answer"]] in row["text"]
        if row["question_type"] == "abnormality":
            assert list(facts) == [row["gpt4_answer"]]
    assert len({row["question_id"] for row in rows}) == len(rows)


def test_report_names_what_is_there_and_denies_what_is_not(population):
    for film in population[:40]:
        text = report(film, np.random.default_rng(1))
        affirmed = text.split("There is no")[0]
        for finding in set(FINDINGS) - {"cardiomegaly"}:
            assert (finding in affirmed) == (finding in film.zones)
        assert ("enlarged" in text or "cardiomegaly" in text) == ("cardiomegaly" in film.zones)


def test_articles():
    assert (with_article("effusion"), with_article("nodule"), with_article("atelectasis")) == (
        "an effusion",
        "a nodule",
        "atelectasis",
    )


def test_write_dataset_keeps_patients_apart_and_masks_exact(tmp_path):
    sizes = {"train": 6, "validation": 2, "test": 4}
    counts = write_dataset(tmp_path, sizes, seed=3)
    facts = json.loads((tmp_path / "facts.json").read_text())
    patients = {
        split: {fact["patient_id"] for fact in facts.values() if fact["split"] == split}
        for split in SPLITS
    }
    assert {split: len(ids) for split, ids in patients.items()} == sizes
    assert (
        not patients["train"] & patients["test"] and not patients["train"] & patients["validation"]
    )
    assert all(counts.values())
    for film in films(12, seed=3):
        stored = read_masks(tmp_path / "masks" / f"{film.film_id}.png")
        assert stored.keys() == film.masks.keys()
        assert all(np.array_equal(stored[name], mask) for name, mask in film.masks.items())
        with Image.open(tmp_path / "images" / f"{film.film_id}.png") as image:
            assert np.array_equal(np.asarray(image), film.image)
        assert np.array_equal(film.lesion_mask, pack_masks(film.masks) > 0)


def test_drawing_tools_are_what_they_say():
    x, y = np.array([[0.0, 0.5, 1.0]]), np.zeros((1, 3))
    assert np.allclose(ellipse(x, y, (0, 0), (0.5, 0.5)), [[0.5, 0, -0.5]])
    assert np.allclose(soft(np.array([0.0]), 0.1), 0.5) and soft(np.array([1.0]))[0] > 0.999
    assert abs(smooth_noise(np.random.default_rng(0), 12).std() - 1) < 0.35
    film, vessels, lungs = draw_chest(draw_anatomy(0, 0))
    assert film.shape == vessels.shape == lungs["left"].shape == (224, 224)
    assert film[lungs["right"] > 0.9].mean() < film[112, 112], "lungs are darker than the spine"
