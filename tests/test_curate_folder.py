"""Curation of a folder: the same files after a kill, every kind of source, an audit, bounded
work.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import open_image
from mmedpo_utils.noise import lesion_mask
from mmedpo_utils.pairs import HeatMapTool, medklip_tool
from mmedpo_utils.preference_rows import read_manifest
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.scale.journal import Journal
from mmedpo_utils.scale.resumable_curation import curate_folder, image_batches
from tests.conftest import curated_pairs, tiny_medklip

NOISE = load_profile("phantom-smoke").noise
HEAT = np.exp(-((np.mgrid[:14, :14][0] - 4) ** 2 + (np.mgrid[:14, :14][1] - 9) ** 2) / 6) / 196
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["mmedpo_utils.curate"])


def tiny_look() -> HeatMapTool:
    """A MedKLIP of a few thousand weights, always the same."""
    return medklip_tool(tiny_medklip())


def still(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """A visual tool whose map never moves."""
    return np.stack([HEAT] * len(images)), np.full(len(images), 0.5)


def ask(names: list[str]) -> list[dict]:
    return [
        {
            "question_id": f"{name}-{number}",
            "image": name,
            "text": "<image>\nIs there a lesion?",
            "gpt4_answer": "yes",
        }
        for name in names
        for number in range(2)
    ]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 small films in two folders, some in colour, and one file that is no image."""
    root, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    for folder in ("a", "b"):
        (root / folder).mkdir()
    for number in range(64):
        shape = (96, 80, 3) if number % 5 == 0 else (96, 80)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
            root / "ab"[number % 2] / f"{number:02d}.png"
        )
    (root / "a" / "torn.png").write_bytes(b"\x89PNG torn")
    return root


def names_of(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))


def run(root: Path, folder: Path) -> None:
    """One curation in a process of its own."""
    torch.set_num_threads(1)
    curate_folder(ask(names_of(root)), root, folder, tiny_look(), NOISE, 0, 4, "tiny")


def contents(folder: Path) -> dict[str, str]:
    """Every file under ``folder`` by its digest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def journaled(folder: Path) -> dict[str, int]:
    """The noised images that whole journal lines vouch for, with their time of writing."""
    path = folder / "visual.jsonl"
    lines = path.read_bytes().split(b"\n")[1:-1] if path.is_file() else []
    records = [record for line in lines for record in json.loads(line) if "skipped" not in record]
    return {
        record["rejected_image"]: (folder / "noised" / record["rejected_image"]).stat().st_mtime_ns
        for record in records
    }


def test_killed_at_five_points_and_resumed_gives_the_same_files(
    films: Path, tmp_path: Path
) -> None:
    run(films, tmp_path / "whole")
    draw, kept = random.Random(0), {}
    for point in sorted(draw.sample(range(2, 50), 5)):
        process = FORKSERVER.Process(target=run, args=(films, tmp_path / "killed"))
        process.start()
        while process.is_alive() and sum(1 for _ in (tmp_path / "killed").rglob("*.png")) < point:
            time.sleep(0.0005)
        time.sleep(draw.random() / 200)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "each run is killed before it ends"
        now = journaled(tmp_path / "killed")
        assert kept.items() <= now.items(), "no row is lost, no journaled image is written again"
        kept = now
    assert 0 < len(kept) < 64
    process = FORKSERVER.Process(target=run, args=(films, tmp_path / "killed"))
    process.start()
    process.join()
    assert process.exitcode == 0 and kept.items() <= journaled(tmp_path / "killed").items()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "noised").rglob("*"))) == 64 + 2


def test_a_torn_line_a_lost_image_and_other_inputs(films: Path, tmp_path: Path) -> None:
    questions, looked = ask(names_of(films)), []

    def look(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        looked.append(len(images))
        return still(images)

    def curate(**changes: object) -> int:
        looked.clear()
        settings = {
            "tool": look,
            "noise": NOISE,
            "seed": 0,
            "batch_size": 8,
            "inputs": "still",
        } | changes
        curate_folder(questions, films, tmp_path, **settings)
        return sum(looked)

    assert curate() == 64 and curate() == 0
    whole, journal = contents(tmp_path), tmp_path / "visual.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    assert curate() == 1 and contents(tmp_path) == whole, (
        "65 names in batches of 8: the last batch has one"
    )
    journal.write_bytes(journal.read_bytes() + b'[{"image": "a/0')
    assert curate() == 0 and contents(tmp_path) == whole
    # Two processes that wrote one journal: its entries are those of other batches.
    head, *entries = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([head, entries[0], entries[0], *entries[1:-1]]))
    assert curate() > 0 and contents(tmp_path) == whole, "no row is lost"
    (tmp_path / "noised" / "b" / "01.png").unlink()
    (tmp_path / "noised" / "b" / ".01.png.mmedpo.png").write_bytes(b"half")
    assert 0 < curate() < 40 and contents(tmp_path) == whole
    assert curate(seed=1) == 64 and contents(tmp_path) != whole
    assert curate() == 64 and contents(tmp_path) == whole
    assert curate(inputs="another") == 64


def test_the_audit_says_what_was_done_and_skipped(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def look(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        return still(images)[0], np.array(
            [0.95 if image.mode == "RGB" else 0.05 for image in images]
        )

    questions = ask(["a/absent.png", *names_of(films)])
    audit = curate_folder(questions, films, tmp_path, look, NOISE, 0, 16, "still")
    assert audit == json.loads((tmp_path / "audit.json").read_text())
    assert (audit["images"], audit["rows"], audit["rows_skipped"], audit["unchanged"]) == (
        64,
        128,
        4,
        0,
    )
    assert {entry["image"]: entry["rows"] for entry in audit["skipped"]} == {
        "a/absent.png": 2,
        "a/torn.png": 2,
    }
    assert (
        "is missing" in audit["skipped"][0]["why"]
        and "cannot be opened as an image" in audit["skipped"][1]["why"]
    )
    assert (
        audit["coverage"]["mean"] == pytest.approx(0.15, abs=0.005)
        and sum(audit["coverage"]["bins"]) == 64
    )
    assert audit["confidence"]["bins"] == [51, *[0] * 8, 13]
    assert audit["confidence"]["mean"] == pytest.approx((51 * 0.05 + 13 * 0.95) / 64, abs=1e-6)
    assert "128 rows of 64 images, 4 rows skipped" in capsys.readouterr().out
    rows = read_manifest(tmp_path / "visual.json", films, tmp_path / "noised")
    assert [row["id"] for row in rows] == [
        question["question_id"]
        for question in questions
        if question["image"] not in ("a/absent.png", "a/torn.png")
    ]
    with pytest.raises(InputError, match="none of 1 images can be used.*is missing"):
        curate_folder(questions[:1], films, tmp_path / "none", look, NOISE, 0, 16, "still")


def test_an_image_that_was_corrected_is_taken_up(films: Path, tmp_path: Path) -> None:
    images, questions = tmp_path / "images", ask(["1.png", "2.png", "3.png"])
    images.mkdir()
    for name in ("1.png", "3.png"):
        Image.fromarray(np.full((32, 32), 90, np.uint8)).save(images / name)
    first = curate_folder(questions, images, tmp_path / "pairs", still, NOISE, 0, 1, "still")
    assert [entry["image"] for entry in first["skipped"]] == ["2.png"]
    Image.fromarray(np.full((32, 32), 60, np.uint8)).save(images / "2.png")
    again = curate_folder(questions, images, tmp_path / "pairs", still, NOISE, 0, 1, "still")
    assert (again["skipped"], again["images"], again["rows"]) == ([], 3, 6)


def test_progress_is_shown_in_a_long_run(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("mmedpo_utils.scale.resumable_curation.PROGRESS_SECONDS", 0)
    curate_folder(ask(names_of(films)), films, tmp_path, still, NOISE, 0, 32, "still")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"visual pairs: {done} of 65 images" for done in (32, 64, 65)]


def test_neither_order_nor_batch_size_changes_a_file(films: Path, tmp_path: Path) -> None:
    look, names = tiny_look(), [name for name in names_of(films) if "torn" not in name][:24]
    rows = curated_pairs(ask(names), films, tmp_path / "first", look, NOISE, 0, 24)
    for folder, order, size in (
        ("turned", names[::-1], 24),
        ("small", names, 5),
        ("single", names, 1),
    ):
        other = curated_pairs(ask(order), films, tmp_path / folder, look, NOISE, 0, size)
        assert sorted(other, key=str) == sorted(rows, key=str) and contents(
            tmp_path / folder
        ) == contents(tmp_path / "first")


def save_sources(root: Path) -> list[str]:
    """One file of each kind of source, larger on one side, and the names of all."""
    rng = np.random.default_rng(0)
    grey, colour = (
        rng.integers(0, 256, (60, 90), dtype=np.uint8),
        rng.integers(0, 256, (60, 90, 3), dtype=np.uint8),
    )
    turned = Image.fromarray(colour).getexif()
    turned[0x0112] = 6
    clear = Image.fromarray(colour)
    clear.putalpha(Image.fromarray(grey))
    Image.fromarray(grey).save(root / "grey.png")
    Image.fromarray(colour).save(root / "colour.jpg")
    Image.fromarray(grey.astype(np.uint16) * 17).save(root / "deep.png")
    Image.fromarray(colour).quantize(16).save(root / "palette.png")
    clear.save(root / "alpha.png")
    Image.fromarray(colour).save(root / "turned.jpg", exif=turned)
    return ["grey.png", "colour.jpg", "deep.png", "palette.png", "alpha.png", "turned.jpg"]


@pytest.mark.parametrize("kind", ["localized", "released", "global"])
def test_every_kind_of_source_gives_a_plain_png_of_its_upright_size(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "images").mkdir()
    names = save_sources(tmp_path / "images")
    rows = curated_pairs(
        ask(names), tmp_path / "images", tmp_path / "noised", still, replace(NOISE, kind=kind), 0
    )
    for row in rows:
        source = open_image(tmp_path / "images" / row["image"])
        with Image.open(tmp_path / "noised" / row["rejected_image"]) as noised:
            assert (
                noised.format == "PNG"
                and noised.mode == source.mode in ("L", "RGB")
                and noised.size == source.size
            )
            assert not noised.getexif() and "transparency" not in noised.info
            before, after = np.asarray(source), np.asarray(noised)
        assert source.size == ((60, 90) if row["image"] == "turned.jpg" else (90, 60))
        assert source.mode == ("L" if row["image"] in ("grey.png", "deep.png") else "RGB")
        mask = lesion_mask(HEAT, before.shape[:2], NOISE.mask, NOISE.quantile) > 0
        if kind == "localized":
            assert (
                np.array_equal(before[~mask], after[~mask])
                and (before[mask] != after[mask]).mean() > 0.9
            )
        else:
            assert (before != after).mean() > 0.85


def test_copies_that_would_share_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'a.jpg' and 'a.jpg.png'.*rename one"):
        image_batches(ask(["a.jpg.png", "b.png", "a.jpg"]), 2)
    assert image_batches(ask(["b.png", "./b.png", "a.png", "c.png"]), 3) == [
        ["./b.png", "a.png", "b.png"],
        ["c.png"],
    ]


def test_a_journal_that_cannot_be_kept_says_where(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="taken.*cannot be written"):
        Journal(tmp_path / "taken" / "visual.jsonl", "digest")
