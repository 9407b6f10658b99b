"""Fixtures that several test modules share."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Before the libraries below, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from mmedpo_utils.base.errors import InputError  # noqa: E402
from mmedpo_utils.medklip import MedKLIP, MedKLIPConfig  # noqa: E402
from mmedpo_utils.pairs import visual_pairs  # noqa: E402
from mmedpo_utils.scale.resumable_curation import image_batches, noised_copies

from .original_llava import (  # noqa: E402
    CLIP,
    CONFIG,
    random_state,
    write_original,
    write_tower,
)

REPOSITORY = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


# Files that take minutes. They begin first, so that no worker is left with one at the end.
LONG = ("test_notebooks", "test_launch", "test_resume", "test_arena", "test_trainer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden outputs beside the checkout; the test skips where it is
    absent.
    """
    folder = Path(os.environ.get("MMEDPO_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(
            f"no golden data at {folder}: set MMEDPO_SHARED to the folder that holds golden/ and "
            "data/"
        )
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture()
def tab(browser, tmp_path) -> Iterator:
    """A page that fails the test where a script fails or asks a host for anything. What it shows in
    the end is kept as tab.png in the test's folder, which pytest keeps for three runs.
    """
    page = browser.new_page(viewport={"width": 1366, "height": 900})
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)

    def asked(request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            troubles.append(request.url)

    page.on("request", asked)
    yield page
    page.screenshot(path=tmp_path / "tab.png", full_page=True)
    page.close()
    assert not troubles


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Converted folders of a test lie in its own folder."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmedpo"


@pytest.fixture
def state(cache) -> dict[str, torch.Tensor]:
    return random_state(CONFIG, CLIP)


@pytest.fixture
def original(tmp_path, state) -> Path:
    """A checkpoint in two shards, its tower beside it."""
    write_tower(tmp_path / "clip", CLIP, state)
    return write_original(tmp_path / "original", CONFIG, state, 2)


@pytest.fixture
def golden(shared, tmp_path, cache):
    """The golden checkpoint in the original layout (three shards, tower beside it), its folder, its
    outputs and cases.
    """
    folder = shared / "golden" / "llavamed"
    spec = importlib.util.spec_from_file_location("recipe", shared / "golden" / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    weights = {
        key: torch.from_numpy(value)
        for key, value in recipe.state_dict(folder / "keys.json").items()
    }
    tower = write_tower(
        tmp_path / "tiny-clip",
        json.loads((folder / "tiny_clip_config.json").read_text()),
        weights,
        ["text_model.embeddings.position_ids", "logit_scale"],
    )
    shutil.copy(folder / "tiny_clip_preprocessor_config.json", tower / "preprocessor_config.json")
    source = write_original(
        tmp_path / "tiny", json.loads((folder / "config.json").read_text()), weights, 3
    )
    return (
        source,
        shared / "golden",
        np.load(folder / "expected.npz"),
        json.loads((folder / "cases.json").read_text()),
    )


def curated_pairs(questions, image_root, noised_root, tool, noise, seed, batch_size=32) -> list:
    """Visual pairs of the questions, without a journal; what cannot be used is an error."""
    batches = image_batches(questions, batch_size)
    records = []
    for batch in noised_copies(batches, image_root, noised_root, tool, noise, seed):
        for record in batch:
            if "skipped" in record:
                raise InputError(record["skipped"])
            records.append(record)
    return visual_pairs(questions, records)


def tiny_medklip() -> MedKLIP:
    """A MedKLIP of a few thousand weights, always the same."""
    torch.manual_seed(0)
    config = MedKLIPConfig(
        queries=("nodule", "disease"),
        locations=("right",),
        text_width=8,
        stem_width=8,
        stage_widths=(8, 8, 8),
        stage_depths=(1, 1, 1),
        block="basic",
        width=8,
        layers=1,
        heads=1,
        feed_forward=8,
    )
    model = MedKLIP(config)
    model.disease_book.normal_()
    return model.eval()
