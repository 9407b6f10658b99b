"""The training benchmarks: they run, both sides see the same losses, and the operations counted
without values are those of a network that runs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from mmedpo_utils.scale.shared_prefix import attention_mask
from mmedpo_utils.trainer import adapter_config

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from common import SHAPES, lvlm_config, save_lvlm  # noqa: E402
from flops import layers_flops, pair_flops  # noqa: E402
from gpu_step import methods as gpu_methods  # noqa: E402
from gpu_step import peak_tflops, seconds_per_pair, sides  # noqa: E402

SWITCHES = {"shared_prefix", "cache_reference", "group_by_length"}


def run(script: str, output: Path, *options: str) -> dict:
    subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--output", str(output), *options],
        check=True,
        capture_output=True,
        timeout=600,
    )
    return json.loads(output.read_text())


@pytest.mark.slow
def test_the_quick_training_benchmark_sees_trls_losses(tmp_path):
    result = run("train_step.py", tmp_path / "train_step.json", "--quick")
    assert 0 <= result["max_loss_difference"] < 1e-4
    for group, steps in (("text", 2), ("mixed", 6)):
        stock, ours = result["losses"][group]["trl"], result["losses"][group]["ours"]
        assert len(stock) == steps and ours == pytest.approx(stock, abs=1e-4)
        assert stock[0] == pytest.approx(math.log(2), abs=1e-4), (
            "policy and reference are equal at the first step"
        )
        assert max(stock) - min(stock) > 1e-3, (
            "training moves the loss, so that equal losses say something"
        )
        for side, rates in result["pairs_per_second"][group].items():
            assert (
                len(rates) == result["rounds"] == 1
                and rates[0] > 0
                and result["peak_bytes"][group][side] > 1e8
            )
    assert set(result["switches"]) == set(result["switches_measured_on"]) == SWITCHES
    assert all(result[key] > 0 for key in ("text_ratio", "mixed_ratio", "memory_ratio"))
    seconds = result["seconds"]["text"]
    assert result["text_ratio"] == pytest.approx(seconds["trl"][0] / seconds["ours"][0], rel=0.05)
    assert {"machine", "versions", "date", "commit", "model", "pairs"} <= set(result)


@pytest.mark.slow
def test_the_gpu_benchmark_walks_its_code_on_the_cpu(tmp_path):
    result = run(
        "gpu_step.py",
        tmp_path / "gpu_step.json",
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--lora-rank",
        "4",
    )
    assert (
        set(result["results"]) == {"bf16_lora", "qlora"}
        and result["peak_dense_bf16_tflops"] is None
    )
    for method, tolerance in (("bf16_lora", 1e-4), ("qlora", 1e-2)):
        for data in ("text", "mixed"):
            found = result["results"][method][data]
            assert found["ratio"] > 0 and found["ours"]["peak_gib"] > 0
            assert found["ours"]["losses"] == pytest.approx(found["trl"]["losses"], abs=tolerance)


def test_the_count_is_what_a_forward_and_backward_pass_costs(tmp_path):
    shape, rank, prompt, answer = SHAPES["tiny"], 4, 30, 6
    save_lvlm(tmp_path, shape, "cpu")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    model = get_peft_model(model, adapter_config(rank, 2 * rank, 0.0))
    ids = torch.full((1, prompt + answer), 9)
    ids[0, 1 : 1 + shape.image_tokens] = model.config.image_token_id
    with FlopCounterMode(display=False) as counter:
        logits = model(
            input_ids=ids,
            pixel_values=torch.rand(1, 3, shape.image_size, shape.image_size),
            logits_to_keep=answer,
        ).logits
        logits.sum().backward()
    tokens, seen = prompt + answer, (prompt + answer) * (prompt + answer + 1) // 2
    hidden_half = (
        3 * 4 * (tokens**2 - seen) * shape.layers * shape.hidden_size
    )  # eager attention computes what the mask hides
    whole_tower = replace(
        shape, tower_layers=shape.tower_layers + 1
    )  # transformers also runs the layer that nothing reads
    pair = pair_flops(whole_tower, prompt, (answer, answer), True, rank, references=0)
    assert 2 * (counter.get_total_flops() - hidden_half) == pair
    both, policy = (
        pair_flops(shape, prompt, (answer, answer), True, rank, references) for references in (1, 0)
    )
    with torch.no_grad(), model.disable_adapter(), FlopCounterMode(display=False) as counter:
        model.get_base_model().model.multi_modal_projector(
            torch.zeros(1, shape.image_tokens, shape.tower_hidden_size)
        )
        hidden = model.get_base_model().model.language_model(
            inputs_embeds=torch.zeros(1, tokens, shape.hidden_size)
        )
        model.get_base_model().lm_head(hidden.last_hidden_state[:, -answer:])
    assert 2 * (counter.get_total_flops() - hidden_half // 3) == both - policy


def test_the_large_shape_is_llava_meds():
    shape = SHAPES["llava-med-1.5"]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(lvlm_config(shape))
    sizes = {
        name: sum(value.numel() for value in part.parameters())
        for name, part in model.model.named_children()
    }
    assert sizes["language_model"] + model.lm_head.weight.numel() == 7_241_732_096, "Mistral-7B"
    assert sizes["vision_tower"] == 303_507_456 and shape.image_tokens == 576, (
        "CLIP ViT-L/14 at 336 pixels"
    )
    assert sizes["multi_modal_projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_two_answers_see_what_the_shared_mask_lets_them_see():
    shape, prompt, answers = SHAPES["tiny"], 7, (3, 2)
    branches = torch.tensor([[0] * prompt + [1] * answers[0] + [2] * answers[1]])
    seen = int(attention_mask(branches).sum())
    assert (
        layers_flops(shape, prompt, answers, None)["attention"]
        == 4 * seen * shape.layers * shape.hidden_size
    )


def test_cards_are_known_by_their_whole_names():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA RTX A6000": 155,
        "NVIDIA L4": 121,
        "NVIDIA GeForce RTX 4090": 165,
        "NVIDIA L40S": None,
        "NVIDIA H100 PCIe": None,
        "NVIDIA RTX 6000 Ada Generation": None,
    }
    assert {name: peak_tflops(name) for name in peaks} == peaks


def test_a_pairs_seconds_leave_the_first_steps_out_and_weigh_both_kinds_alike():
    job = sides(gpu_methods("cpu", 4)["bf16_lora"])["mixed"]["ours"]
    steps = [90.0, 90.0, 1.0, 3.0, 1.0, 3.0, 7.0, 3.0]
    assert seconds_per_pair(job, {"step_seconds": steps, "ahead_seconds": 48.0}) == pytest.approx(
        2 + 48 / (8 * 3)
    )
