"""Two processes through the real launcher, every ZeRO stage and every switch on, against one
process with every switch off.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmedpo_utils.launch import RunResult, train
from mmedpo_utils.preference_rows import write_manifest
from mmedpo_utils.profiles import load_profile

from .test_trainer import tiny_lvlm, tiny_pairs, uneven_rows

pytestmark = pytest.mark.slow
PLAIN = {
    "training.shared_prefix": False,
    "training.cache_reference": False,
    "training.processes": 1,
    "training.per_device_batch_size": 8,
}
LOGGED = {
    prefix + key
    for prefix in ("", "validation_")
    for key in (
        "loss",
        "chosen_logp",
        "rejected_logp",
        "margin",
        "text_loss",
        "visual_loss",
        "weight",
    )
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with a tiny model, images and 40 pairs of uneven lengths."""
    folder = tmp_path_factory.mktemp("zero")
    tiny_lvlm(folder / "model")
    rows = tiny_pairs(folder, 40)
    uneven = [row for start in range(0, 40, 8) for row in uneven_rows({"rows": rows[start:]})]
    write_manifest(folder / "run" / "pairs" / "train.json", uneven)
    (folder / "noised").rename(folder / "run" / "pairs" / "noised")
    return folder


def trained(workspace: Path, **changes) -> RunResult:
    profile = load_profile(
        "phantom-smoke",
        {
            "data.source": "folder",
            "data.root": str(workspace),
            "output": str(workspace / "run"),
            "training.max_length": 20,
            "lvlm.model": str(workspace / "model"),
            "lvlm.device": "cpu",
            "training.learning_rate": 1e-3,
            "training.epochs": None,
            "training.max_steps": 4,
            "training.projector_learning_rate": 1e-3,
            "training.lora_dropout": 0.0,
            "training.gradient_accumulation_steps": 1,
            **changes,
        },
    )
    return train(profile, "mmedpo", seed=1, live=False)


@pytest.fixture(scope="module")
def plain(workspace) -> tuple[list[dict], dict[str, torch.Tensor]]:
    run = trained(workspace, **PLAIN)
    return run.events, load_file(run.adapter / "adapter_model.safetensors")


def check(run: RunResult, plain: tuple[list[dict], dict[str, torch.Tensor]]) -> None:
    events, adapter = plain
    for found, expected in zip(run.events, events, strict=True):
        assert found["step"] == expected["step"]
        assert found.get("samples") == expected.get("samples")
        for key in expected.keys() & LOGGED:
            assert found[key] == pytest.approx(expected[key], abs=1e-4), (
                f"step {found['step']} {key}"
            )
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert tensors.keys() == adapter.keys() and any(
        "multi_modal_projector" in name for name in adapter
    )
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, adapter[name], atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("cached", [True, False])
def test_two_processes_with_every_switch_on_end_where_the_plain_run_ends(
    workspace, plain, stage, cached
):
    run = trained(
        workspace,
        **{
            "training.zero_stage": stage,
            "training.cache_reference": cached,
            "training.processes": 2,
            "training.per_device_batch_size": 2,
            "training.gradient_accumulation_steps": 2,
        },
    )
    assert run.result["processes"] == 2
    check(run, plain)


def test_stage_3_in_bfloat16_with_checkpointing_trains_with_exact_weights(workspace, plain):
    run = trained(
        workspace,
        **{
            "training.zero_stage": 3,
            "training.processes": 2,
            "training.precision": "bf16",
            "training.gradient_checkpointing": True,
            "training.per_device_batch_size": 2,
            "training.gradient_accumulation_steps": 2,
        },
    )
    for event, exact in zip(run.events, plain[0], strict=True):
        if "weight" in event:
            assert event["weight"] == pytest.approx(exact["weight"], abs=1e-6), (
                "bfloat16 would round it"
            )
            assert event["loss"] == pytest.approx(exact["loss"], abs=0.05)


def test_the_reference_file_is_the_same_whoever_wrote_it(workspace):
    files = {}
    for stage, processes in ((3, 2), (0, 1)):
        shutil.rmtree(workspace / "run" / "reference", ignore_errors=True)
        trained(
            workspace,
            **{
                "training.zero_stage": stage,
                "training.processes": processes,
                "training.epochs": None,
                "training.max_steps": 1,
            },
        )
        (file,) = (workspace / "run" / "reference").iterdir()
        files[stage] = file.name, json.loads(file.read_text())["values"]
    assert files[3][0] == files[0][0], "the key is the model's, divided among processes or not"
    assert files[3][1].keys() == files[0][1].keys() and len(files[0][1]) == 40
    for key, values in files[0][1].items():
        assert files[3][1][key] == pytest.approx(values, abs=1e-4)


def test_two_processes_share_every_epoch_of_grouped_pairs_although_their_dropout_differs(workspace):
    """The sum of the tokens read after two whole epochs tells whether a pair was lost or read
    twice.
    """
    read = [
        trained(
            workspace,
            **{
                "training.processes": processes,
                "training.per_device_batch_size": 4 // processes,
                "training.lora_dropout": 0.1,
                "training.group_by_length": True,
                "training.epochs": None,
                "training.max_steps": 18,
            },
        )
        for processes in (1, 2)
    ]
    pairs = [run.result["pairs"] for run in read]
    assert pairs == [36, 36], "nine steps of four pairs are an epoch"
    assert read[0].events[-1]["step"] == read[1].events[-1]["step"] == 18
    last = [max(event["tokens"] for event in run.events if "tokens" in event) for run in read]
    assert last[0] == last[1] > 0
