"""The estimate against models that are built, DeepSpeed's own estimators and a measured step."""

from __future__ import annotations

import copy
import re
import time
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from peft import get_peft_model
from transformers import LlavaForConditionalGeneration

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.lvlm import load_lvlm
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs import plan
from mmedpo_utils.scale import estimate
from mmedpo_utils.scale.estimate import (
    GIB,
    NF4_BYTES,
    WORKING_SPACE,
    PairSize,
    memory_per_gpu,
    model_config,
    parameter_counts,
    total_steps,
)
from mmedpo_utils.show import plots
from mmedpo_utils.trainer import adapter_config

LLAVA_MED, READ = model_config("microsoft/llava-med-v1.5-mistral-7b")
PAPER = load_profile("paper-vqa-rad").training
SIZE = PairSize(617, 57)
BOTH = ("lora", "projector")


def part_of(name: str) -> str:
    for words, part in (
        ("lora_", "lora"),
        ("vision_tower", "tower"),
        ("projector", "projector"),
        ("lm_head", "head"),
        ("embed_tokens", "embeddings"),
        ("norm", "norms"),
    ):
        if words in name:
            return part
    return "matrices"


@pytest.mark.parametrize(
    ("model", "rank"), [("microsoft/llava-med-v1.5-mistral-7b", 128), ("phantom", 32)]
)
def test_parameters_are_those_of_a_model_that_is_built(model, rank):
    config, read = model_config(model)
    assert read == (model == "phantom")
    with torch.device("meta"):
        built = get_peft_model(
            LlavaForConditionalGeneration(config), adapter_config(rank, 2 * rank, 0.0, ("lora",))
        )
    found = dict.fromkeys(parameter_counts(config, rank), 0)
    for name, parameter in built.named_parameters():
        found[part_of(name)] += parameter.numel()
    assert found == parameter_counts(config, rank)
    if model != "phantom":
        assert 7.5e9 < sum(found.values()) - found["lora"] < 7.6e9


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_zero_memory_is_what_deepspeed_estimates_where_all_is_trained(processes, monkeypatch):
    counts = {**dict.fromkeys(parameter_counts(LLAVA_MED, 128), 0), "projector": 10**9}
    monkeypatch.setattr(estimate, "parameter_counts", lambda config, rank: counts)
    for offload in (False, True):
        training = replace(PAPER, zero_stage=2, offload="cpu" if offload else "none")
        _, expected = estimate_zero2_model_states_mem_needs(10**9, processes, 1, offload)
        parts = memory_per_gpu(LLAVA_MED, training, "none", BOTH, SIZE, processes)
        # theirs counts a trained model's weights once; here the projector as it was stays beside
        # the trained one
        assert parts["weights"] + parts["gradients"] + parts["optimiser"] == pytest.approx(
            expected + 2e9, rel=1e-6
        )
    counts["projector"], counts["lora"] = 0, 10**9
    parts = memory_per_gpu(LLAVA_MED, replace(PAPER, zero_stage=3), "none", BOTH, SIZE, processes)
    _, expected, _ = estimate_zero3_model_states_mem_needs(10**9, 0, processes, 1, False, False)
    ours = parts["weights"] + parts["gradients"] + parts["optimiser"]
    assert ours == pytest.approx(expected + 2e9 / processes, rel=1e-6), (
        "theirs leaves the 16-bit weights out at stage 3"
    )


def test_bytes_of_a_measured_step_of_the_phantom_model():
    lvlm = load_lvlm("phantom", "cpu")
    model = get_peft_model(lvlm.model, adapter_config(8, 16, 0.0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    sum(parameter.square().sum() for parameter in trained).backward()
    optimiser.step()
    training = replace(load_profile("phantom").training, lora_rank=8, processes=1, zero_stage=0)
    parts = memory_per_gpu(lvlm.model.config, training, "none", BOTH, SIZE, 1)
    moments = [
        value for state in optimiser.state.values() for key, value in state.items() if key != "step"
    ]
    assert parts["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert parts["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    assert parts["optimiser"] == sum(value.nbytes for value in moments)
    alone = memory_per_gpu(lvlm.model.config, training, "none", ("projector",), SIZE, 1)
    assert alone["optimiser"] == 8 * parameter_counts(lvlm.model.config, 8)["projector"]


def test_each_way_to_save_memory_saves_it():
    def total(quantization="none", processes=4, **changes):
        parts = memory_per_gpu(
            LLAVA_MED, replace(PAPER, **changes), quantization, BOTH, SIZE, processes
        )
        return sum(value for part, value in parts.items() if part != "cpu")

    stages = [total(zero_stage=stage) for stage in range(4)]
    assert stages == sorted(stages, reverse=True) and len(set(stages)) == 4
    assert total(offload="cpu") < total() < 48 * GIB and total(zero_stage=2, offload="cpu") < total(
        zero_stage=2
    )
    assert total(gradient_checkpointing=False) > total() + 5 * GIB
    alone, small = (total(kind, 1, optimizer="paged_adamw_8bit") for kind in ("none", "nf4"))
    counts = parameter_counts(LLAVA_MED, 128)
    assert alone - small == pytest.approx(counts["matrices"] * (2 - NF4_BYTES)) and small < 24 * GIB
    parts = memory_per_gpu(LLAVA_MED, replace(PAPER, offload="cpu"), "none", BOTH, SIZE, 4)
    assert parts["cpu"] > 2 * counts["matrices"] and parts["working space"] == WORKING_SPACE


def test_a_model_of_seven_billion_parameters_is_counted_in_a_moment():
    estimate._meta_model.cache_clear()
    began = time.process_time()
    parameter_counts(LLAVA_MED, 128)
    assert time.process_time() - began < 2
    assert estimate.meta_model(LLAVA_MED) is estimate.meta_model(copy.deepcopy(LLAVA_MED))


def test_a_configuration_of_no_model_is_refused():
    config = copy.deepcopy(LLAVA_MED)
    config.text_config.hidden_act = "nonsense"
    with pytest.raises(InputError, match="no model that can be built .*nonsense"):
        parameter_counts(config, 128)


def test_a_profiles_memory_is_drawn(capsys):
    runs = {
        name: estimate.profile_memory(load_profile(name), "mmedpo")[0]
        for name in ("paper-vqa-rad", "qlora-1gpu")
    }
    figure = plots.memory_bars(runs)
    assert [text.get_text().strip() for text in figure.axes[0].texts] == [
        f"{sum(parts.values()):.1f}" for parts in runs.values()
    ]
    plan.dry_run(load_profile("qlora-1gpu"), "mmedpo")
    assert f"estimated: {sum(runs['qlora-1gpu'].values()):.1f} GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "pairs", "processes", "expected"),
    [
        ({}, 1797, 4, 1350),
        ({"epochs": 0.5}, 10, 4, 2),
        ({"epochs": None, "max_steps": 7}, 1797, 4, 7),
        ({"gradient_accumulation_steps": 2}, 1797, 4, 675),
        ({}, 1797, 2, 1350),
    ],
)
def test_steps_of_a_run(values, pairs, processes, expected):
    assert total_steps(replace(PAPER, **values), pairs, processes) == expected


@pytest.mark.parametrize(
    "name", ["paper-vqa-rad", "qlora-1gpu", "zero3-offload", "multi-node", "phantom"]
)
def test_a_dry_run_needs_no_gpu_weights_or_pairs_and_starts_nothing(
    name, capsys, tmp_path, monkeypatch
):
    profile = load_profile(name, {"output": str(tmp_path / "run")})
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(
        "subprocess.Popen", lambda *_, **__: pytest.fail("a dry run starts nothing")
    )
    plan.dry_run(profile, "mmedpo", 3)
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert (
        "not made yet" in printed
        and "GiB" in printed
        and re.search(r"^Length: \d+ steps of \d+ pairs, ", printed, re.MULTILINE)
        and f"name: {name}" in printed
    )
    commands = [line for line in printed.splitlines() if line.startswith("$ ")]
    assert len(commands) == (3 if name == "multi-node" else 2)
    assert commands[0].startswith("$ mmedpo launch --profile ")
    assert "--variant mmedpo --seed 3" in commands[0]
    if name == "multi-node":
        for rank, line in enumerate(commands[1:]):
            assert f"--no_ssh --node_rank {rank} --master_addr FIRST_NODE --master_port" in line
    elif name != "qlora-1gpu":
        assert f"--num_accelerators {profile.training.processes}" in commands[1]


def test_a_hostfile_is_printed_in_both_forms(capsys, tmp_path):
    (tmp_path / "hosts").write_text("first slots=2\nsecond slots=2\n")
    changes = {"output": str(tmp_path / "run"), "training.hostfile": str(tmp_path / "hosts")}
    plan.dry_run(load_profile("multi-node", changes), "mmedpo")
    lines = [
        line for line in capsys.readouterr().out.splitlines() if "deepspeed.launcher.runner" in line
    ]
    assert len(lines) == 3 and all(f"--hostfile {tmp_path}/hosts" in line for line in lines)
    assert ["--no_ssh" in line for line in lines] == [False, True, True]
