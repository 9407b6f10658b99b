"""The visual tool: the official network's outputs, its maps, its checkpoint, and what the shipped
weights reach.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.convert.medklip_official import OFFICIAL_QUERIES, query_embeddings
from mmedpo_utils.medklip import (
    PHANTOM_CHECKPOINT,
    MedKLIP,
    confidence,
    heat_map,
    load_medklip,
    peak,
    pointing_hit,
)
from mmedpo_utils.phantom.texts import report
from mmedpo_utils.phantom.world import FINDINGS, draw_film, films
from mmedpo_utils.programs.build_phantom_medklip import read_report, training_films
from mmedpo_utils.show.medklip_scores import read_films, score_maps, score_medklip


@pytest.fixture(scope="module")
def model() -> MedKLIP:
    return load_medklip("phantom")


@pytest.fixture(scope="module")
def population():
    return films(80, seed=7, start=500)


@pytest.fixture(scope="module")
def images(population) -> list[Image.Image]:
    return [Image.fromarray(film.image) for film in population]


def recipe_of(shared: Path):
    """The golden folder's own rule for weights, and the official state that it gives."""
    specification = importlib.util.spec_from_file_location(
        "recipe", shared / "golden" / "recipe.py"
    )
    recipe = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(recipe)
    state = {
        key: torch.from_numpy(np.asarray(value))
        for key, value in recipe.state_dict(shared / "golden" / "medklip" / "keys.json").items()
    }
    return recipe, state


def test_the_official_file_gives_the_official_outputs(shared, tmp_path, monkeypatch):
    golden = shared / "golden"
    recipe, state = recipe_of(shared)
    expected = np.load(golden / "medklip" / "expected.npz")
    book = torch.from_numpy(recipe.tensor("disease_book", (75, 768)))
    monkeypatch.setattr("mmedpo_utils.convert.medklip_official.query_embeddings", lambda *_: book)
    torch.save({"model": state}, tmp_path / "official.pth")
    model = load_medklip(tmp_path / "official.pth")
    assert model.queries == tuple(json.loads((golden / "medklip" / "classes.json").read_text()))
    names = ("00000001_000.png", "00027426_000.png", "synpic42202.jpg", "synpic32933.jpg")
    pixels = model.preprocess([Image.open(golden / "images" / name) for name in names])
    np.testing.assert_allclose(pixels[:, :, ::8, ::8], expected["pixel_grid"], atol=1e-6)
    with torch.inference_mode():
        output = model(pixels)
    np.testing.assert_allclose(output.logits, expected["logits"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(heat_map(output), expected["map_disease"], rtol=0, atol=5e-7)
    np.testing.assert_allclose(confidence(output), expected["confidence"], rtol=0, atol=1e-5)
    for layer in range(4):
        np.testing.assert_allclose(
            output.attentions[:, layer].mean(1), expected[f"attn_layer{layer}"], rtol=0, atol=3e-6
        )


def test_every_form_of_the_file_gives_the_same_network(shared, tmp_path, monkeypatch):
    recipe, state = recipe_of(shared)
    book = torch.from_numpy(recipe.tensor("disease_book", (75, 768)))
    monkeypatch.setattr("mmedpo_utils.convert.medklip_official.query_embeddings", lambda *_: book)
    torch.save({"model": state}, tmp_path / "official.pth")
    expected = load_medklip(tmp_path / "official.pth").state_dict()
    assert torch.equal(expected["cl_fc.weight"], state["module.cl_fc.weight"]), (
        "stored, though the maps don't need it"
    )
    torch.save(
        {key.removeprefix("module."): value for key, value in state.items()}, tmp_path / "bare.pth"
    )
    save_file(state, tmp_path / "official.safetensors")
    save_file(expected, tmp_path / "ours.safetensors")
    for name in ("bare.pth", "official.safetensors", "ours.safetensors"):
        if name == "ours.safetensors":
            monkeypatch.setattr(
                "mmedpo_utils.convert.medklip_official.query_embeddings",
                lambda *_: pytest.fail("the file holds them"),
            )
        found = load_medklip(tmp_path / name).state_dict()
        assert found.keys() == expected.keys() and all(
            torch.equal(found[key], expected[key]) for key in found
        ), name


def test_a_wrong_official_file_names_what_is_wrong(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mmedpo_utils.convert.medklip_official.query_embeddings", lambda *_: torch.zeros(75, 768)
    )
    _, state = recipe_of(shared)
    path = tmp_path / "checkpoint.pth"

    def refusal(stored: object) -> str:
        torch.save(stored, path)
        with pytest.raises(InputError) as raised:
            load_medklip(path)
        assert str(path) in str(raised.value)
        return str(raised.value)

    short = {key: value for key, value in state.items() if key != "module.res_l1.bias"}
    said = refusal(
        {
            "model": short
            | {"module.stray": torch.zeros(1), "module.classifier.bias": torch.zeros(3)}
        }
    )
    assert "1 missing (res_l1.bias)" in said and "1 unexpected (stray)" in said
    assert "classifier.bias [3] instead of [2]" in said
    assert "missing (res_features.encoder.stages.0.layers.0.layer.0.convolution.weight)" in refusal(
        {
            key: value
            for key, value in state.items()
            if key != "module.res_features.4.0.conv1.weight"
        }
    )
    assert "res_l1.bias under two names" in refusal(state | {"res_l1.bias": torch.zeros(1024)})
    assert "'epoch': expected a tensor" in refusal({"model": {"epoch": 3}})
    assert "found list" in refusal([1, 2]) and "found dict" in refusal({"model": {}})
    assert "cannot be read as MedKLIP weights" in refusal({"model": Planted(str(tmp_path / "ran"))})
    assert not (tmp_path / "ran").exists(), "a pickle never runs code"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="cannot be read as MedKLIP weights"):
        load_medklip(path)


class Planted:
    """Makes the file ``path`` when it is unpickled carelessly."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.path),))


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> Path:
    """A BERT of width 8 with a word vocabulary, saved like any other."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "about", *OFFICIAL_QUERIES]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    return folder


def test_text_embeddings_are_the_first_token_and_are_computed_once(
    tmp_path, tiny_bert, monkeypatch
):
    texts = {
        ("eumonia" if query == "pneumonia" else query): f"about {query}"
        for query in OFFICIAL_QUERIES
    }
    texts["scar"] = "about scar " * 60
    path = tmp_path / "descriptions.json"
    path.write_text(json.dumps(dict(reversed(texts.items()))), encoding="utf-8")
    embeddings = query_embeddings(path, str(tiny_bert))
    tokenizer, bert = (
        AutoTokenizer.from_pretrained(tiny_bert),
        AutoModel.from_pretrained(tiny_bert).eval(),
    )
    assert embeddings.shape == (75, 8)
    for query in ("normal", "pneumonia", "disease", "scar"):
        alone = tokenizer(
            ["about scar " * 31 if query == "scar" else f"about {query}"], return_tensors="pt"
        )
        with torch.inference_mode():
            state = bert(**alone).last_hidden_state[0, 0]
        torch.testing.assert_close(
            embeddings[OFFICIAL_QUERIES.index(query)], state, atol=1e-5, rtol=1e-4
        )
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.AutoModel.from_pretrained", lambda *_: pytest.fail("computed twice")
        )
        assert torch.equal(query_embeddings(path, str(tiny_bert)), embeddings)
    assert len(list(tmp_path.iterdir())) == 2, "one cache file, nothing half-written"
    path.write_text(json.dumps(texts | {"normal": "about disease"}), encoding="utf-8")
    changed = query_embeddings(path, str(tiny_bert))
    assert not torch.equal(changed[0], embeddings[0]) and torch.equal(changed[1], embeddings[1])


def test_unusable_descriptions_and_encoders_say_so(tmp_path, tiny_bert):
    path = tmp_path / "descriptions.json"
    with pytest.raises(InputError, match='fetch "observation explanation.json"'):
        query_embeddings(path, str(tiny_bert))
    path.write_text("[]")
    with pytest.raises(InputError, match="found list"):
        query_embeddings(path, str(tiny_bert))
    texts = {query: f"about {query}" for query in OFFICIAL_QUERIES}
    path.write_text(json.dumps(texts | {"normal": "", "disease": 3}))
    with pytest.raises(InputError, match=r"2 of 75 queries \(normal, disease\)"):
        query_embeddings(path, str(tiny_bert))
    path.write_text(json.dumps(texts))
    with pytest.raises(InputError, match="text encoder .*absent.*cannot be loaded"):
        query_embeddings(path, str(tmp_path / "absent"))
    query_embeddings(path, str(tiny_bert))
    next(tmp_path.glob("query_embeddings-*")).write_bytes(b"torn")
    with pytest.raises(InputError, match="delete it"):
        query_embeddings(path, str(tiny_bert))


@torch.inference_mode()
def test_attention_rows_sum_to_one_and_the_map_is_their_mean(model, images):
    output = model(model.preprocess(images[:3]))
    count = len(model.queries)
    assert output.logits.shape == (3, count, 2) and output.attentions.shape == (3, 4, 4, count, 196)
    torch.testing.assert_close(output.attentions.sum(-1), torch.ones(3, 4, 4, count))
    rows = output.attentions[:, :, :, model.queries.index("nodule")]
    torch.testing.assert_close(
        heat_map(output, "nodule"), (rows.sum((1, 2)) / 16).reshape(3, 14, 14)
    )
    torch.testing.assert_close(
        heat_map(output, "nodule", layer=2, head=1), rows[:, 2, 1].reshape(3, 14, 14)
    )
    odds = (output.logits[:, -1, 1] - output.logits[:, -1, 0]).sigmoid()
    torch.testing.assert_close(confidence(output), odds)
    with pytest.raises(InputError, match="unknown query 'hernia'.*nodule"):
        heat_map(output, "hernia")


@torch.inference_mode()
def test_a_film_reads_the_same_alone_and_in_a_batch(model, images):
    batch, again, alone = (
        model(model.preprocess(part)) for part in (images[:4], images[:4], images[2:3])
    )
    assert torch.equal(batch.logits, again.logits) and torch.equal(
        batch.attentions, again.attentions
    )
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
    scores = score_medklip(read_films(model, images), [film.masks for film in population])
    card = json.loads((PHANTOM_CHECKPOINT / "scores.json").read_text())
    assert card["pointing_game"] >= 6 * card["chance"] and card["pointing_game_nodule"] >= 0.45
    assert 0.93 <= card["auc"] <= 0.995
    assert scores["pointing_game"] >= card["pointing_game"] - 0.15
    assert set(scores["pointing_game_own"]) == set(FINDINGS)
    assert scores["auc"] >= card["auc"] - 0.05


def test_the_shipped_maps_differ_and_noise_on_the_lesion_alone_lowers_the_confidence(
    model, population, images
):
    scores = score_maps(
        model, read_films(model, images), images, [film.masks for film in population]
    )
    assert scores["correlation_between_maps"] <= 0.7
    assert 8 <= scores["effective_cells"] <= 60
    assert scores["lesion_in_mask"] >= 0.65 and scores["largest_part"] >= 0.5
    assert scores["undecided"] >= 0.2
    clean = scores["confidence_clean"]
    assert scores["confidence_lesion_noised"] <= clean * 0.8  # a third in the card, on 400 films
    assert scores["confidence_elsewhere_noised"] >= clean * 0.9


def test_films_without_a_lesion_have_no_map_to_score(model):
    healthy = [Image.fromarray(draw_film(number, 0, ()).image) for number in range(2)]
    assert set(score_maps(model, read_films(model, healthy), healthy, [{}, {}])) == {"undecided"}


def test_the_card_states_the_measured_scores():
    card = (PHANTOM_CHECKPOINT / "README.md").read_text(encoding="utf-8")
    scores = json.loads((PHANTOM_CHECKPOINT / "scores.json").read_text())
    for name in ("pointing_game", "pointing_game_nodule", "auc", "location_accuracy", "chance"):
        assert f"{100 * scores[name]:.1f}" in card, name
    for finding in FINDINGS:
        row = [
            scores[name][finding]
            for name in ("pointing_game_alone", "pointing_game_own", "auc_per_query")
        ]
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
    with pytest.raises(
        InputError,
        match=r"1 missing \(res_l2.bias\).*1 unexpected \(stray\).*"
        r"1 misshapen \(classifier.bias \[3\] instead of \[2\]\)",
    ):
        load_medklip(tmp_path / "copy")
    path.write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_medklip(tmp_path / "copy")
    with pytest.raises(InputError, match="not a MedKLIP configuration"):
        load_medklip(tmp_path / "absent")
