"""Pairs: curated rows are in the released format, reproducible, and the real films go through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import open_image
from mmedpo_utils.base.rows import question_text
from mmedpo_utils.noise import lesion_mask, noise_mask, noised_pixels
from mmedpo_utils.pairs import (
    medklip_tool,
    merge_pairs,
    pick_questions,
    stays_true,
    text_pairs,
)
from mmedpo_utils.phantom.panel import FactJudge, as_sentence, fact_panel, wording
from mmedpo_utils.phantom.texts import write_dataset
from mmedpo_utils.preference_rows import (
    answer_text,
    read_manifest,
    read_questions,
    rows_to_questions,
    write_manifest,
)
from mmedpo_utils.profiles import Profile, load_profile
from mmedpo_utils.show.audit import audit_manifest
from tests.conftest import curated_pairs, tiny_medklip

NOISE = load_profile("phantom-smoke").noise
HEAT = np.exp(-((np.mgrid[:14, :14][0] - 4) ** 2 + (np.mgrid[:14, :14][1] - 9) ** 2) / 6) / 196


def look(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """A visual tool whose map never moves; its confidence is the film's mean brightness."""
    return np.stack([HEAT] * len(images)), np.array(
        [np.asarray(image).mean() / 255 for image in images]
    )


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    profile = load_profile("phantom-smoke", {"output": str(tmp_path_factory.mktemp("run"))})
    write_dataset(profile.output / "data", {"train": 8, "validation": 1, "test": 1}, seed=0)
    return profile


def asked(profile: Profile) -> list[dict]:
    return read_questions(profile.output / "data" / "train_questions.jsonl", profile.image_root)


def curate(questions: list[dict], **changes: object) -> tuple[list[dict], list[dict]]:
    settings = {
        "candidates": [["yes", "left upper"]] * len(questions),
        "judge": FactJudge(),
        "members": fact_panel(),
        "threshold": 0.5,
        "rounds": 5,
        "seed": 0,
    } | changes
    return text_pairs(questions, **settings)


def test_text_rows_reject_what_contradicts(profile: Profile, tmp_path: Path) -> None:
    questions = asked(profile)
    rows, debates = curate(questions)
    write_manifest(tmp_path / "text.json", rows)
    assert read_manifest(tmp_path / "text.json", profile.image_root) == rows
    assert [row["weighted_score"] for row in rows] == [record["score"] for record in debates]
    assert all(
        answer_text(row) == question["gpt4_answer"]
        for row, question in zip(rows, questions, strict=True)
    )
    assert all(record["conflict"] >= 0.5 and record["history"] for record in debates)
    for row in rows:
        expected = (
            "sampled" if answer_text(row, rejected=True) in ("yes", "left upper") else "written"
        )
        assert row["origin"] == expected or answer_text(row) == "no"
    assert {row["origin"] for row in rows} == {"sampled", "written"}


def test_text_rows_do_not_depend_on_the_order(profile: Profile) -> None:
    questions = asked(profile)
    rows, _ = curate(questions)
    turned, _ = curate(questions[::-1])
    assert turned[::-1] == rows
    assert curate(questions, seed=1)[0] != rows


def test_what_is_worded_is_what_the_panel_judges_and_the_row_keeps(profile: Profile) -> None:
    questions = asked(profile)
    plain, _ = curate(questions)
    rows, debates = curate(questions, wording=wording(1.0, seed=0))
    short = [row for row in plain if row["question_type"] != "report"]
    for row, before, record in zip(rows, plain, debates, strict=True):
        text = answer_text(row, rejected=True)
        assert (
            text
            == record["rejected"]
            == as_sentence(question_text(row), answer_text(before, rejected=True))
        )
        assert row["weighted_score"] == before["weighted_score"], "the claim is the same"
    assert short and all("." in answer_text(row, rejected=True) for row in rows)


def test_a_visual_pair_that_says_no_stays_true(profile: Profile, tmp_path: Path) -> None:
    questions = asked(profile)
    visual = curated_pairs(questions, profile.image_root, tmp_path / "noised", look, NOISE, seed=0)
    text, _ = curate(questions)
    assert not any(map(stays_true, text)), "a text pair has no noise"
    assert [stays_true(row) for row in visual] == [answer_text(row) == "no" for row in visual]
    assert 0 < sum(map(stays_true, visual)) < len(visual)


def test_visual_rows_noise_the_lesion_only(profile: Profile, tmp_path: Path) -> None:
    questions = asked(profile)
    rows = curated_pairs(questions, profile.image_root, tmp_path / "noised", look, NOISE, seed=0)
    write_manifest(tmp_path / "visual.json", rows)
    assert read_manifest(tmp_path / "visual.json", profile.image_root, tmp_path / "noised") == rows
    mask = lesion_mask(HEAT, (224, 224), NOISE.mask, NOISE.quantile) > 0
    for row in rows:
        clean = np.asarray(open_image(profile.image_root / row["image"]), dtype=int)
        noised = np.asarray(open_image(tmp_path / "noised" / row["rejected_image"]), dtype=int)
        assert (
            np.array_equal(clean[~mask], noised[~mask])
            and (clean[mask] != noised[mask]).mean() > 0.9
        )
        assert answer_text(row) == answer_text(row, rejected=True)
        assert row["weighted_score"] == pytest.approx(clean.mean() / 255, abs=1e-6)
    assert len(list((tmp_path / "noised").iterdir())) == len({row["image"] for row in rows}), (
        "no file is left behind"
    )


def test_visual_rows_do_not_depend_on_the_order(profile: Profile, tmp_path: Path) -> None:
    questions = asked(profile)
    rows = curated_pairs(questions, profile.image_root, tmp_path / "a", look, NOISE, seed=0)
    assert (
        curated_pairs(questions[::-1], profile.image_root, tmp_path / "b", look, NOISE, seed=0)[
            ::-1
        ]
        == rows
    )
    curated_pairs(questions, profile.image_root, tmp_path / "c", look, NOISE, seed=1)
    for path in (tmp_path / "a").iterdir():
        same, other = ((tmp_path / folder / path.name).read_bytes() for folder in "bc")
        assert path.read_bytes() == same != other


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_kinds_of_noise(mode: str) -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (60, 90), dtype=np.uint8)
    ).convert(mode)
    changed = {}
    for kind in ("localized", "released", "global"):
        original = np.asarray(image)
        mask = noise_mask(HEAT, original.shape[:2], kind, NOISE.mask, NOISE.quantile)
        pixels = noised_pixels(original, mask, kind, NOISE.signal, np.random.default_rng(0))
        assert pixels.shape == original.shape and pixels.dtype == np.uint8
        changed[kind] = (pixels != original).mean()
        if kind == "released":
            assert ((pixels <= 51) | (pixels >= 206)).mean() > 0.9, "black and white speckle"
    assert (
        changed["localized"] == pytest.approx(0.15, abs=0.01)
        and min(changed["released"], changed["global"]) > 0.85
    )


def test_noise_that_changes_nothing_is_warned_of(profile: Profile, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 1 images are left unchanged"):
        one = asked(profile)[:1]
        curated_pairs(one, profile.image_root, tmp_path, look, replace(NOISE, quantile=1.0), 0)


def test_names_stay_apart_and_inside(tmp_path: Path) -> None:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    questions = []
    for name in ("deep/a.png", "deep/a.jpg", "deep/../deep/a.png"):
        Image.new("L", (20, 20), 90).save(tmp_path / "images" / name)
        questions.append(
            {"question_id": name, "image": name, "text": "<image>\nq", "gpt4_answer": "a"}
        )
    rows = curated_pairs(questions, tmp_path / "images", tmp_path / "noised", look, NOISE, 0)
    assert [row["rejected_image"] for row in rows] == ["deep/a.png", "deep/a.jpg.png", "deep/a.png"]
    with pytest.raises(InputError, match="outside"):
        curated_pairs(
            [questions[0] | {"image": "../x.png"}],
            tmp_path / "images",
            tmp_path / "noised",
            look,
            NOISE,
            0,
        )


def test_merge_keeps_both_sources(profile: Profile, tmp_path: Path) -> None:
    questions = pick_questions(asked(profile), 6, seed=0)
    text, _ = curate(questions)
    released = [{key: value for key, value in text[0].items() if key not in ("origin", "source")}]
    visual = curated_pairs(questions, profile.image_root, tmp_path / "noised", look, NOISE, 0)
    audit = audit_manifest(merge_pairs(text + released, visual))
    assert (audit["rows"], audit["sources"], audit["duplicate_ids"]) == (
        13,
        {"text": 7, "visual": 6},
        1,
    )
    assert audit["origins"]["released"] == 1


def test_pick_questions_is_a_seeded_subset_in_order() -> None:
    questions = [{"question_id": number} for number in range(50)]
    picked, again, other = (pick_questions(questions, 10, seed) for seed in (1, 1, 2))
    assert len(picked) == 10 and picked == again != other
    assert picked == sorted(picked, key=lambda row: row["question_id"])
    assert pick_questions(questions, 99, 0) == questions


def test_real_films_make_curated_pairs(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEDPO_DATA_ROOT", str(shared / "data/vqa_rad_mini"))
    mini = load_profile("vqa-rad-mini")
    text = read_manifest(mini.data.root / "train_preferences.json", mini.image_root)
    questions = rows_to_questions(text)
    rows = merge_pairs(
        text,
        curated_pairs(questions, mini.image_root, tmp_path / "noised", look, mini.noise, mini.seed),
    )
    write_manifest(tmp_path / "train.json", rows)
    assert (
        audit_manifest(
            read_manifest(tmp_path / "train.json", mini.image_root, tmp_path / "noised")
        )["rows"]
        == 14
    )


def test_medklip_tool_has_the_shapes_and_ranges() -> None:
    heat, scores = medklip_tool(tiny_medklip())(
        [Image.new("L", (50, 70)), Image.new("RGB", (224, 224))]
    )
    assert (
        heat.shape == (2, 14, 14) and scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()
    )
    np.testing.assert_allclose(heat.sum((1, 2)), 1, atol=1e-5)
