"""The Med-LVLM in 4 bits on the CPU: what is quantised, against the dequantised weights, and
training and loading back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from mmedpo_utils.base.tensors import model_digest
from mmedpo_utils.lvlm import MedLVLM, generate, load_lvlm, load_profile_lvlm, prompt
from mmedpo_utils.preference_rows import read_manifest, write_manifest
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs.train import build_trainer, save_adapter, training_arguments

from .test_trainer import tiny_pairs

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed (extra gpu)"
)


def batch(lvlm: MedLVLM, folder: Path) -> dict[str, torch.Tensor]:
    images = [Image.open(folder / "images" / f"{number}.png").convert("RGB") for number in range(4)]
    return lvlm.processor(
        images=images, text=[prompt(lvlm.processor, "Is there a nodule?")] * 4, return_tensors="pt"
    )


@pytest.fixture
def pairs(tmp_path) -> Path:
    """An output folder with images and 12 curated pairs."""
    write_manifest(tmp_path / "run" / "pairs" / "train.json", tiny_pairs(tmp_path, 12))
    (tmp_path / "noised").rename(tmp_path / "run" / "pairs" / "noised")
    return tmp_path


def test_only_the_language_models_linear_layers_are_quantised():
    model = load_lvlm("phantom", "cpu", quantization="nf4").model
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    small = {
        name for name, module in linear.items() if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert (
        small == {name for name in linear if name.startswith("model.language_model.layers.")}
        and len(small) == 28
    )
    for name in small:
        state = linear[name].weight.quant_state
        assert (
            linear[name].weight.dtype == torch.uint8 and state.quant_type == "nf4" and state.nested
        )
    assert {
        parameter.dtype
        for name, parameter in linear.items()
        if name not in small
        for parameter in parameter.parameters()
    } == {torch.float32}


def test_outputs_and_gradients_are_those_of_the_dequantised_weights(pairs):
    """Also after the model has been looked at in eval mode, where bitsandbytes would repack its
    weights.
    """
    lvlm, plain = load_lvlm("phantom", "cpu", quantization="nf4"), load_lvlm("phantom", "cpu").model
    original = {
        name: module.weight.clone()
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name, module in lvlm.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            assert 0.02 < (weight - original[name]).norm() / original[name].norm() < 0.2, (
                "what 4 bits lose"
            )
            plain.get_submodule(name).weight.data = weight
    inputs = batch(lvlm, pairs)
    with torch.inference_mode():
        digest = model_digest(lvlm.model)
        torch.testing.assert_close(
            lvlm.model(**inputs).logits, plain(**inputs).logits, atol=1e-4, rtol=1e-4
        )
        assert (
            model_digest(lvlm.model)
            == digest
            == model_digest(load_lvlm("phantom", "cpu", quantization="nf4").model)
        )
    gradients = []
    for model in (lvlm.model, plain):
        torch.manual_seed(0)
        tuned = get_peft_model(
            model,
            LoraConfig(
                r=4,
                target_modules=["q_proj", "up_proj"],
                init_lora_weights=False,
                modules_to_save=["multi_modal_projector"],
                exclude_modules=r".*vision_tower.*",
            ),
        )
        tuned.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(
            {name: value.grad for name, value in tuned.named_parameters() if value.grad is not None}
        )
    assert len(gradients[0]) == 2 * 2 * 4 + 4
    for name, gradient in gradients[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-5, rtol=1e-3)


def test_it_trains_and_loads_back(pairs):
    profile = load_profile(
        "phantom-smoke",
        {
            "data.source": "folder",
            "data.root": str(pairs),
            "output": str(pairs / "run"),
            "training.learning_rate": 1e-2,
            "training.projector_learning_rate": 1e-3,
            "lvlm.quantization": "nf4",
            "lvlm.device": "cpu",
        },
    )
    rows = read_manifest(pairs / "run" / "pairs" / "train.json")
    arguments = training_arguments(profile, "mmedpo", 0, pairs / "out", len(rows), validate=False)
    trainer = build_trainer(
        profile, profile.training.variants["mmedpo"], rows, np.zeros(len(rows), bool), arguments, []
    )
    assert {
        parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad
    } == {torch.float32}
    frozen = {
        name: parameter.clone()
        for name, parameter in trainer.model.named_parameters()
        if not parameter.requires_grad
    }
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, rel=0.3) and losses[-1] != losses[0]
    assert all(
        torch.equal(parameter, frozen[name])
        for name, parameter in trainer.model.named_parameters()
        if name in frozen
    )
    (pairs / "out").mkdir(exist_ok=True)
    save_adapter(trainer, pairs / "out" / "adapter")
    base, back = load_profile_lvlm(profile), load_profile_lvlm(profile, pairs / "out" / "adapter")
    trained, inputs = MedLVLM(trainer.model.eval(), back.processor, back.device), batch(back, pairs)
    with torch.inference_mode():
        logits = [lvlm.model(**inputs).logits for lvlm in (trained, back, base)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
    assert (logits[2] - logits[0]).abs().max() > 0.05
    images = [Image.open(pairs / "images" / f"{number}.png") for number in range(4)]
    questions = ["Is there a nodule?", "Where is the opacity?"] * 2
    assert generate(trained, images, questions, 6, 4) == generate(back, images, questions, 6, 4)
