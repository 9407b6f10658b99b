"""A model that would answer without its image, or bring code of its own, is refused when it is
loaded.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmedpo_utils.base.errors import InputError, first_line
from mmedpo_utils.base.sections import LanguageModel
from mmedpo_utils.convert.medklip_official import OFFICIAL_QUERIES, query_embeddings
from mmedpo_utils.judges.chat import LocalModel
from mmedpo_utils.lvlm import (
    PHANTOM_WEIGHTS,
    generate,
    image_attention,
    image_token_count,
    load_lvlm,
)
from mmedpo_utils.medklip import PHANTOM_CHECKPOINT, load_medklip
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs.check import check_profile
from mmedpo_utils.scale.estimate import model_config

from .foreign_code import CLASSES, bring_code
from .test_adapters import Mark


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the shipped Med-LVLM, to spoil."""
    return Path(shutil.copytree(PHANTOM_WEIGHTS, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None takes a key out."""
    stored = json.loads(file.read_text()) | values
    kept = {key: value for key, value in stored.items() if value is not None}
    file.write_text(json.dumps(kept))


TEMPLATES = {
    "no mark": (
        "{{ bos_token }}[INST] {{ messages[0].content[1].text }} [/INST]",
        "writes 0 <image> marks",
    ),
    "two marks": ("<image><image>{{ messages[0].content[1].text }}", "writes 2 <image> marks"),
    "fails": ("{{ messages[7].content[0].text }}", "cannot write a prompt"),
    "is no template": ("{% if %}", "cannot write a prompt"),
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_template_without_the_image_is_refused(folder, fault):
    template, told = TEMPLATES[fault]
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=told) as refused:
        load_lvlm(folder, "cpu")
    assert "lvlm.template" in str(refused.value) and "\n" not in str(refused.value)


def test_another_image_token_than_the_tokenizers_is_refused(folder):
    change(folder / "config.json", image_token_index=5, image_token_id=5)
    with pytest.raises(
        InputError,
        match=r"config\.json: `image_token_index` is 5, and the tokenizer's <image> is 4",
    ):
        load_lvlm(folder, "cpu")


def test_a_template_that_is_changed_after_loading_is_refused_too():
    lvlm = load_lvlm("phantom", "cpu")
    lvlm.processor.chat_template = TEMPLATES["no mark"][0]
    film, question = [Image.new("L", (64, 64))], ["Is there a nodule?"]
    for ask in (
        lambda: generate(lvlm, film, question, 4, 1),
        lambda: image_attention(lvlm, film, question, 1),
    ):
        with pytest.raises(InputError, match=r"holds \[0\] image tokens, and an image has 64"):
            ask()


KEYS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


@pytest.mark.parametrize("absent", [KEYS, *[(key,) for key in KEYS]], ids=str)
def test_what_the_processor_leaves_out_comes_from_the_configuration(folder, absent):
    """Training, generation and the model's own forward pass then count the same image tokens."""
    change(folder / "processor_config.json", **dict.fromkeys(absent))
    lvlm = load_lvlm(folder, "cpu")
    whole = load_lvlm("phantom", "cpu")
    assert image_token_count(lvlm.processor) == image_token_count(whole.processor) == 64
    batch = lvlm.processor(
        images=Image.new("RGB", (64, 64)), text="<image> Is there a nodule?", return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(lvlm.model(**batch).logits, whole.model(**batch).logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 14),
        ("vision_feature_select_strategy", "full"),
        ("num_additional_image_tokens", 0),
    ],
)
def test_a_processor_of_another_model_is_refused(folder, key, value):
    change(folder / "processor_config.json", **{key: value})
    with pytest.raises(InputError, match=rf"processor_config\.json: `{key}` is .*needs"):
        load_lvlm(folder, "cpu")


def test_images_of_another_size_are_refused(folder):
    file = folder / "processor_config.json"
    images = json.loads(file.read_text())["image_processor"]
    for key in ("crop_size", "size"):
        images[key] = {name: 112 for name in images[key]}
    change(file, image_processor=images)
    with pytest.raises(
        InputError, match="makes 16 tokens of an image, and config.json's vision tower 64"
    ):
        load_lvlm(folder, "cpu")


def test_a_folder_without_a_llava_processor_is_refused(folder):
    (folder / "processor_config.json").unlink()
    with pytest.raises(InputError, match="processor"):
        load_lvlm(folder, "cpu")


def test_tensors_that_no_place_is_found_for_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    first = next(name for name in tensors if "language_model" in name and "q_proj" in name)
    lora = {first.replace(".weight", ".lora_A.default.weight"): torch.zeros(4, 128)}
    save_file(tensors | lora, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="1 weights are left over.*lora_A"):
        load_lvlm(folder, "cpu")


@pytest.fixture
def says_yes(monkeypatch) -> None:
    """A reader at the terminal who answers y to whatever is asked."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))


@pytest.mark.parametrize("file", CLASSES)
def test_code_that_a_model_brings_is_never_run_nor_asked_for(
    folder, tmp_path, says_yes, capsys, file
):
    bring_code(folder, file, tmp_path / "ran")
    profile = load_profile("phantom", {"lvlm.model": str(folder)})
    model_config(str(folder))  # the plan of a dry run
    lines = check_profile(profile)
    with contextlib.suppress(InputError):
        load_lvlm(folder, "cpu")
    assert "[y/N]" not in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()
    if file == "config.json":  # the other two are read by the classes that are installed
        assert any("code of its own" in line.to_do for line in lines if line.what == "base model")
        with pytest.raises(InputError) as refused:
            load_lvlm(folder, "cpu")
        assert "\n" not in str(refused.value) and "trust_remote_code=True" not in str(refused.value)


def test_nor_by_a_checkpoint_in_the_original_layout(original, tmp_path, says_yes, capsys):
    bring_code(original, "tokenizer_config.json", tmp_path / "ran")
    with contextlib.suppress(InputError):
        load_lvlm(original, "cpu")
    assert "[y/N]" not in capsys.readouterr().out and not (tmp_path / "ran").exists()


def test_nor_by_a_judge_or_a_text_encoder(tmp_path, says_yes, capsys):
    theirs = bring_code(tmp_path / "theirs", "config.json", tmp_path / "ran")
    bring_code(theirs, "tokenizer_config.json", tmp_path / "ran")
    descriptions = tmp_path / "descriptions.json"
    descriptions.write_text(json.dumps(dict.fromkeys(OFFICIAL_QUERIES, "a finding")))
    local = LanguageModel("transformers", str(theirs), None, None, "none", 0.0, 0.0)
    for load in (
        lambda: LocalModel(local, "cpu"),
        lambda: query_embeddings(descriptions, str(theirs)),
    ):
        with pytest.raises(InputError, match="cannot be loaded") as refused:
            load()
        assert "\n" not in str(refused.value) and "trust_remote_code" not in str(refused.value)
    assert "[y/N]" not in capsys.readouterr().out and not (tmp_path / "ran").exists()


def test_an_error_never_advises_to_switch_a_safeguard_off(tmp_path, original):
    """Pickles that hold more than tensors, at each door where one may come in."""
    bad = {"model": {"a": Mark(tmp_path / "ran")}}
    torch.save(bad, tmp_path / "medklip.pth")
    for file in original.glob("*.safetensors*"):
        file.unlink()
    torch.save(bad, original / "pytorch_model.bin")
    for load in (
        lambda: load_medklip(tmp_path / "medklip.pth"),
        lambda: load_lvlm(original, "cpu"),
    ):
        with pytest.raises(InputError, match="more than tensors") as refused:
            load()
        assert "weights_only" not in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_foreign_error_in_one_short_line():
    error = RuntimeError("\x1b[31mbad\x1b[0m \x07thing\n" + "more " * 900)
    assert first_line(error) == "bad thing"
    assert len(first_line(RuntimeError("x" * 9_000))) < 400 and first_line(KeyError()) == "KeyError"
    steering = RuntimeError("\x1b]0;title\x07a\x9b2J \x1bcb\u202e \x1b[?25lc\x85")
    assert first_line(steering) == "a b c" and first_line(KeyError(101)) == "KeyError: 101"


@pytest.mark.parametrize("content", [b"hello" * 30, b"", b"PK\x03\x04" + bytes(300), b"cos\nx"])
def test_a_file_that_is_no_pickle_is_one_error(tmp_path, content):
    (tmp_path / "medklip.pth").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as MedKLIP weights") as refused:
        load_medklip(tmp_path / "medklip.pth")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("key", ["heads", "width", "layers", "stage_widths", "queries", "block"])
@pytest.mark.parametrize("value", [-1, 1.5, "x", []], ids=str)
def test_a_medklip_configuration_of_nonsense_is_one_error(tmp_path, key, value):
    folder = Path(shutil.copytree(PHANTOM_CHECKPOINT, tmp_path / "model"))
    change(folder / "config.json", **{key: value})
    with pytest.raises(InputError) as refused:
        load_medklip(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1_000
