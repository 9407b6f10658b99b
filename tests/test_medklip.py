"""The visual tool: the official network's outputs, its maps, its checkpoint, and what the shipped weights reach."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmedpo_utils.errors import InputError
from mmedpo_utils.medklip import (
    PHANTOM_CHECKPOINT,
    MedKLIP,
    MedKLIPConfig,
    confidence,
    heat_map,
    load_medklip,
    peak,
    pointing_hit,
    score_medklip,
)
from mmedpo_utils.phantom.build_medklip import read_report, training_films
from mmedpo_utils.phantom.texts import report
from mmedpo_utils.phantom.world import FINDINGS, films


@pytest.fixture(scope="module")
def model() -> MedKLIP:
    return load_medklip("phantom")


@pytest.fixture(scope="module")
def population():
    return films(80, seed=7, start=500)


@pytest.fixture(scope="module")
def images(population) -> list[Image.Image]:
    return [Image.fromarray(film.image) for film in population]


def official_key(key: str) -> str:
    """Our state-dict key of an official one; only the trunk's differ."""
    key = key.removeprefix("module.")
    key = key.replace("res_features.0.", "res_features.embedder.embedder.convolution.")
    key = key.replace("res_features.1.", "res_features.embedder.embedder.normalization.")
    block = re.fullmatch(r"res_features\.(\d)\.(\d)\.(.*)", key)
    if not block:
        return key
    rest = block[3].replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
    rest = re.sub(r"conv(\d)", lambda found: f"layer.{int(found[1]) - 1}.convolution", rest)
    rest = re.sub(r"bn(\d)", lambda found: f"layer.{int(found[1]) - 1}.normalization", rest)
    return f"res_features.encoder.stages.{int(block[1]) - 4}.layers.{block[2]}.{rest}"


def test_official_sizes_give_the_official_outputs(shared):
    golden = shared / "golden"
    specification = importlib.util.spec_from_file_location("recipe", golden / "recipe.py")
    recipe = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(recipe)
    expected = np.load(golden / "medklip" / "expected.npz")
    queries = tuple(json.loads((golden / "medklip" / "classes.json").read_text()))
    model = MedKLIP(MedKLIPConfig(queries, tuple(str(index) for index in range(51)))).eval()
    state = {official_key(key): torch.from_numpy(np.asarray(value))
             for key, value in recipe.state_dict(golden / "medklip" / "keys.json").items()}
    state |= {"disease_book": torch.from_numpy(recipe.tensor("disease_book", (75, 768))),
              "location_book": torch.from_numpy(recipe.tensor("ana_book", (51, 768)))}
    model.load_state_dict(state)
    names = ("00000001_000.png", "00027426_000.png", "synpic42202.jpg", "synpic32933.jpg")
    pixels = model.preprocess([Image.open(next((shared / "data").rglob(name))) for name in names])
    np.testing.assert_allclose(pixels[:, :, ::8, ::8], expected["pixel_grid"], atol=1e-6)
    with torch.inference_mode():
        output = model(pixels)
    np.testing.assert_allclose(output.logits, expected["logits"], atol=2e-5)
    np.testing.assert_allclose(heat_map(output), expected["map_disease"], atol=5e-7)
    np.testing.assert_allclose(confidence(output), expected["confidence"], atol=1e-5)
    for layer in range(4):
        np.testing.assert_allclose(output.attentions[:, layer].mean(1), expected[f"attn_layer{layer}"], atol=3e-6)


@torch.inference_mode()
def test_attention_rows_sum_to_one_and_the_map_is_their_mean(model, images):
    output = model(model.preprocess(images[:3]))
    count = len(model.queries)
    assert output.logits.shape == (3, count, 2) and output.attentions.shape == (3, 4, 4, count, 196)
    torch.testing.assert_close(output.attentions.sum(-1), torch.ones(3, 4, 4, count))
    rows = output.attentions[:, :, :, model.queries.index("nodule")]
    torch.testing.assert_close(heat_map(output, "nodule"), (rows.sum((1, 2)) / 16).reshape(3, 14, 14))
    torch.testing.assert_close(heat_map(output, "nodule", layer=2, head=1), rows[:, 2, 1].reshape(3, 14, 14))
    odds = (output.logits[:, -1, 1] - output.logits[:, -1, 0]).sigmoid()
    torch.testing.assert_close(confidence(output), odds)
    with pytest.raises(InputError, match="unknown query 'hernia'.*nodule"):
        heat_map(output, "hernia")


@torch.inference_mode()
def test_a_film_reads_the_same_alone_and_in_a_batch(model, images):
    batch, again, alone = (model(model.preprocess(part)) for part in (images[:4], images[:4], images[2:3]))
    assert torch.equal(batch.logits, again.logits) and torch.equal(batch.attentions, again.attentions)
    torch.testing.assert_close(batch.logits[2:3], alone.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.attentions[2:3], alone.attentions, atol=1e-5, rtol=1e-3)


def test_peak_and_hit_on_maps_drawn_by_hand():
    heat = torch.zeros(14, 14)
    heat[3, 10] = 1
    row, column = peak(heat)
    assert abs(row - 55.5) <= 1 and abs(column - 167.5) <= 1
    mask = np.zeros((224, 224), bool)
    mask[row, column + 8] = True
    assert pointing_hit(heat, mask)
    assert not pointing_hit(heat, np.roll(mask, 1, axis=1))


def test_the_shipped_weights_find_the_lesions(model, population, images):
    scores = score_medklip(model, images, [film.masks for film in population])
    card = json.loads((PHANTOM_CHECKPOINT / "scores.json").read_text())
    assert card["pointing_game"] >= 0.80 and card["pointing_game_nodule"] >= 0.60
    assert min(card["auc_per_query"].values()) >= 0.95
    assert scores["pointing_game"] >= card["pointing_game"] - 0.10
    assert set(scores["pointing_game_own"]) == set(FINDINGS)
    assert min(scores["auc_per_query"].values()) >= 0.95


def test_the_card_states_the_measured_scores():
    card = (PHANTOM_CHECKPOINT / "README.md").read_text(encoding="utf-8")
    scores = json.loads((PHANTOM_CHECKPOINT / "scores.json").read_text())
    for name in ("pointing_game", "pointing_game_nodule", "auc", "location_accuracy", "chance"):
        assert f"{100 * scores[name]:.1f}" in card, name
    for finding in FINDINGS:
        row = [scores[name][finding] for name in ("pointing_game_alone", "pointing_game_own", "auc_per_query")]
        assert f"| {finding} | " + " | ".join(f"{100 * value:.1f}" for value in row) + " |" in card
    assert "Not for clinical use" in card


def test_reports_give_back_the_facts():
    rng = np.random.default_rng(0)
    for film in training_films(40):
        assert read_report(report(film, rng)) == film.zones


def test_a_wrong_checkpoint_names_its_tensors(tmp_path: Path):
    shutil.copytree(PHANTOM_CHECKPOINT, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    state = load_file(path)
    state["classifier.bias"], state["stray"] = torch.zeros(3), torch.zeros(1)
    del state["res_l2.bias"]
    save_file(state, path)
    with pytest.raises(InputError, match=r"1 missing \(res_l2.bias\).*1 unexpected \(stray\).*"
                                         r"1 misshapen \(classifier.bias \[3\] instead of \[2\]\)"):
        load_medklip(tmp_path / "copy")
    path.write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_medklip(tmp_path / "copy")
    with pytest.raises(InputError, match="not a MedKLIP configuration"):
        load_medklip(tmp_path / "absent")
