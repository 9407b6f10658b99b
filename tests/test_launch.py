"""Training started the way a notebook starts it: the real launcher, an interrupt, a crash, and
every input that decides a run.
"""

from __future__ import annotations

import _thread
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from safetensors.torch import load_file

from mmedpo_utils import launch
from mmedpo_utils.base.environment import cores_for
from mmedpo_utils.base.errors import InputError, Interrupted
from mmedpo_utils.base.processes import free_port
from mmedpo_utils.launch import TrainingError, load_run, train
from mmedpo_utils.launch_command import launch_command, process_count
from mmedpo_utils.lvlm import generate, load_lvlm
from mmedpo_utils.preference_rows import read_manifest, write_manifest
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs import launch as launch_program
from mmedpo_utils.programs import train as train_program
from mmedpo_utils.programs.plan import plan
from mmedpo_utils.programs.train import (
    EventWriter,
    build_trainer,
    deepspeed_config,
    sampled_questions,
    settle_environment,
    training_arguments,
)
from mmedpo_utils.relevance import training_weights
from mmedpo_utils.run_folder import manifest_path, read_events, run_digest
from mmedpo_utils.scale.estimate import held_out
from mmedpo_utils.scale.fast_trainer import FastTrainer
from mmedpo_utils.scale.nodes import check_hostfile, node_commands
from mmedpo_utils.show.plots import training_curves
from mmedpo_utils.trainer import MMedPOTrainer

from .conftest import REPOSITORY
from .test_trainer import tiny_lvlm, tiny_pairs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with a tiny model, images and the curated pairs of an output folder."""
    folder = tmp_path_factory.mktemp("launch")
    tiny_lvlm(folder / "model")
    write_manifest(folder / "run" / "pairs" / "train.json", tiny_pairs(folder, 40))
    (folder / "noised").rename(folder / "run" / "pairs" / "noised")
    return folder


def tiny_profile(workspace: Path, **changes):
    return load_profile(
        "phantom-smoke",
        {
            "data.source": "folder",
            "data.root": str(workspace),
            "output": str(workspace / "run"),
            "training.max_length": 64,
            "lvlm.model": str(workspace / "model"),
            "lvlm.device": "cpu",
            "training.learning_rate": 1e-2,
            **changes,
        },
    )


def processes_of(folder: Path) -> list[psutil.Process]:
    """Living processes (zombies left out) whose command line names ``folder``."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            str(folder) in part for part in process.info["cmdline"] or ()
        ):
            found.append(process)
    return found


def test_the_real_launcher_trains_with_zero_in_two_processes_and_a_second_call_loads(
    workspace, monkeypatch, capsys
):
    monkeypatch.setenv("SOME_API_KEY", "do-not-write-me-down")
    profile = tiny_profile(workspace)
    assert profile.training.zero_stage == 2 and process_count(profile) == 2
    run = train(profile, "mmedpo", seed=1, live=False)
    printed = capsys.readouterr().out
    assert (
        "python -m deepspeed.launcher.runner --num_accelerators 2" in printed
        and "--variant mmedpo --seed 1" in printed
    )
    assert (
        not run.loaded
        and run.result["processes"] == 2
        and run.result["pairs"] + run.result["validation_pairs"] == 40
    )
    planned = plan(profile, "mmedpo", 1)
    assert f"; {run.result['validation_pairs']} of them are held out" in planned
    assert f" epochs of {run.result['pairs']} pairs; " in planned
    steps = [event for event in run.events if "loss" in event]
    assert [event["step"] for event in steps] == [1, 2, 3, 4] and all(
        event["total_steps"] == 4 for event in steps
    )
    assert steps[0]["loss"] == pytest.approx(steps[0]["weight"] * math.log(2), abs=1e-5)
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["seconds_left"] == 0 and any(
        "validation_chosen_logp" in event for event in run.events
    )
    assert training_curves(run.events).axes
    image = Image.open(workspace / "images" / "0.png").convert("RGB")
    base, tuned = (
        load_lvlm(profile.lvlm.model, "cpu"),
        load_lvlm(profile.lvlm.model, "cpu", adapter=run.adapter),
    )
    batch = base.processor(images=image, text="<image> is there a nodule ?", return_tensors="pt")
    with torch.no_grad():
        change = (tuned.model(**batch).logits - base.model(**batch).logits).abs().max()
    assert change > 1e-3
    last = [event for event in run.events if "samples" in event][-1]
    assert last["step"] == 4 and len(last["samples"]) == profile.training.samples == 2
    films = [Image.open(workspace / "images" / said["image"]) for said in last["samples"]]
    films = [film.convert("RGB") for film in films]
    questions = [said["question"] for said in last["samples"]]
    answers = generate(tuned, films, questions, profile.lvlm.max_new_tokens, batch_size=2)
    assert [said["answer"] for said in last["samples"]] == [answer for (answer,) in answers]
    assert "samples" not in run.result["last"]
    assert load_profile(run.folder / "profile.yaml") == profile
    assert {"torch", "deepspeed", "platform"} <= set(
        json.loads((run.folder / "versions.json").read_text())
    )
    assert not any(
        b"do-not-write-me-down" in path.read_bytes()
        for path in run.folder.rglob("*")
        if path.is_file()
    )
    assert not processes_of(run.folder)
    again = train(profile, "mmedpo", seed=1, live=False)
    assert again.loaded and again.result == run.result and "loaded" in capsys.readouterr().out


def test_an_interrupt_leaves_no_process_and_no_result(workspace):
    profile = tiny_profile(workspace, **{"training.epochs": None, "training.max_steps": 5_000})
    folder, seen = profile.output / "train" / "dpo-seed0", []

    def interrupt() -> None:
        deadline = time.monotonic() + 90
        while (
            len(seen) < 4 and time.monotonic() < deadline
        ):  # the launcher, its child and two workers
            seen[:] = processes_of(folder)
            time.sleep(0.2)
        _thread.interrupt_main()

    usual = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job starts with it ignored
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(Interrupted, match="The same cell or command, run again, ") as caught:
            train(profile, "dpo", live=False)
    finally:
        signal.signal(signal.SIGINT, usual)
    shown = caught.value._render_traceback_()  # what IPython asks an error for
    assert shown == [f"Interrupted: {caught.value}"]
    assert len(seen) == 4 and not processes_of(folder)
    assert load_run(folder, run_digest(profile, "dpo", 0, manifest_path(profile, "dpo"))) is None


def test_a_notebook_shows_what_an_error_says_and_not_the_way_to_it(capsys):
    shell = InteractiveShell.instance()
    try:
        shell.run_cell("from mmedpo_utils.profiles import load_profile\nload_profile('phantm')")
        shown = capsys.readouterr().out
        assert "InputError: " in shown and "phantom" in shown
        assert len(shown.strip().splitlines()) == 1
        shell.run_cell("1 / 0")
        assert "Traceback" in capsys.readouterr().out, "other errors keep theirs"
    finally:
        InteractiveShell.clear_instance()


def test_a_crash_raises_with_the_workers_own_error_and_can_be_repeated(workspace, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(workspace, broken, ignore=shutil.ignore_patterns("train"))
    (broken / "images" / "7.png").write_bytes(b"no image")
    profile = tiny_profile(broken, **{"training.processes": 1})
    with pytest.raises(TrainingError, match=r"exit code 1(.|\n)*InputError: .*7\.png") as caught:
        train(profile, "stage2", live=False)
    assert 'File "' in str(caught.value)
    folder = profile.output / "train" / "stage2-seed0"
    assert not (folder / "result.json").exists() and not (folder / "adapter").exists()
    shutil.copy(workspace / "images" / "7.png", broken / "images" / "7.png")
    (folder / "notes.txt").write_text("mine")
    (folder / "versions.json").write_text("stale")
    assert train(profile, "stage2", live=False).result["processes"] == 1
    assert (folder / "notes.txt").read_text() == "mine"
    assert "torch" in (folder / "versions.json").read_text()


def test_bad_requests_are_refused_before_anything_starts(workspace, tmp_path):
    profile = tiny_profile(workspace)
    with pytest.raises(InputError, match="'grpo': unknown.*mmedpo"):
        train(profile, "grpo")
    with pytest.raises(InputError, match="no preference pairs yet; run notebook 03"):
        train(tiny_profile(workspace, output=str(tmp_path)), "dpo")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU"):
            train(tiny_profile(workspace, **{"lvlm.device": "cuda"}), "dpo")
    assert not (tmp_path / "train").exists()


def test_two_commands_take_different_ports_and_one_process_needs_no_launcher(workspace):
    profile = tiny_profile(workspace)
    folder = profile.output / "train" / "dpo-seed0"
    first, second = (launch_command(profile, "dpo", 0, folder) for _ in range(2))
    assert first[first.index("--master_port") + 1] != second[second.index("--master_port") + 1]
    one_process = tiny_profile(workspace, **{"training.processes": 1})
    alone = launch_command(one_process, "dpo", 0, folder)
    assert alone[1:3] == ["-m", "mmedpo_utils.programs.train"] and "deepspeed" not in " ".join(
        alone
    )


def test_half_a_line_of_events_is_left_for_the_next_look(tmp_path):
    assert read_events(tmp_path) == []
    (tmp_path / "events.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_events(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_run_from_before_a_key_was_retired_is_still_known(workspace):
    """Its digest was made of the profile as it was then, with the key among the deciding ones."""
    profile = tiny_profile(workspace)
    manifest = manifest_path(profile, "dpo")
    values = profile.as_dict()
    then = {
        "reuse_vision_features": True,
        "variants": {"dpo": values["training"]["variants"]["dpo"]},
    }
    machine = ("logging_steps", "samples", "save_every", "report_to", "nodes", "hostfile")
    training = {key: value for key, value in values["training"].items() if key not in machine}
    sections = ("seed", "data", "visual_tool", "noise", "lvlm", "relevance")
    deciding = {key: values[key] for key in sections}
    deciding["training"] = training | then
    deciding["training_seed"] = 3
    deciding["manifest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
    expected = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    assert run_digest(profile, "dpo", 3, manifest) == expected


def test_every_input_changes_the_digest(workspace, tmp_path):
    profile, other = tiny_profile(workspace), tmp_path / "other.json"
    manifest = manifest_path(profile, "dpo")
    other.write_bytes(manifest.read_bytes() + b"\n")
    changed = tiny_profile(workspace, **{"training.beta": 0.2})
    digests = {
        run_digest(profile, "dpo", 0, manifest),
        run_digest(profile, "sft", 0, manifest),
        run_digest(profile, "dpo", 1, manifest),
        run_digest(profile, "dpo", 0, other),
        run_digest(changed, "dpo", 0, manifest),
        run_digest(tiny_profile(workspace, seed=7), "dpo", 0, manifest),
    }
    assert len(digests) == 6 and run_digest(profile, "dpo", 0, manifest) in digests


@pytest.mark.parametrize(
    ("processes", "accumulation", "gpus", "expected"),
    [(4, 1, 4, 4), (4, 1, 3, 2), (4, 3, 3, 3), (3, 1, 2, 1), (2, 1, 8, 2)],
)
def test_the_number_of_processes_keeps_the_global_batch(
    workspace, monkeypatch, processes, accumulation, gpus, expected
):
    monkeypatch.setattr("mmedpo_utils.launch_command.check_device", lambda device: "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    profile = tiny_profile(
        workspace,
        **{"training.processes": processes, "training.gradient_accumulation_steps": accumulation},
    )
    count = process_count(profile)
    assert (
        count == expected
        and count * (accumulation * processes // count) == processes * accumulation
    )


def test_weights_are_normalised_within_each_source(workspace):
    profile, rows = tiny_profile(workspace), tiny_pairs(workspace / "more", 40)
    for row in rows:
        row["weighted_score"] *= 0.1 if row["rejected_image"] else 1.0
    visual = np.array([row["rejected_image"] is not None for row in rows])
    weights = training_weights(rows, profile.training.variants["mmedpo"], profile)
    for source in (visual, ~visual):
        assert weights[source].mean() == pytest.approx(1, abs=0.05) and set(weights[source]) >= {
            0.75,
            1.25,
        }
    assert (training_weights(rows, profile.training.variants["dpo"], profile) == 1).all()


def test_a_run_that_leaves_the_finite_numbers_stops(tmp_path):
    state = SimpleNamespace(is_world_process_zero=True, global_step=7, max_steps=9)
    writer = EventWriter(tmp_path, 4, load_profile("phantom"), [])
    writer.on_step_begin(None, state, None)
    writer.on_log(None, state, None, {"loss": 0.5, "chosen_logp": -1.0, "text_loss": math.nan})
    with pytest.raises(InputError, match="step 7: chosen_logp is nan.*training.learning_rate"):
        writer.on_log(None, state, None, {"loss": 0.5, "chosen_logp": math.nan})
    assert [event["loss"] for event in read_events(tmp_path)] == [0.5]


@pytest.mark.parametrize(
    ("shared_prefix", "cache_reference", "kind"),
    [
        (True, True, FastTrainer),
        (True, False, FastTrainer),
        (False, True, FastTrainer),
        (False, False, MMedPOTrainer),
    ],
)
def test_a_profile_that_asks_for_no_saving_gets_the_plain_trainer(
    workspace, tmp_path, shared_prefix, cache_reference, kind
):
    asked = {"training.shared_prefix": shared_prefix, "training.cache_reference": cache_reference}
    profile = tiny_profile(workspace, **{"training.processes": 1}, **asked)
    rows = read_manifest(manifest_path(profile, "mmedpo"))[:4]
    arguments = training_arguments(profile, "mmedpo", 0, tmp_path, len(rows), validate=False)
    variant = profile.training.variants["mmedpo"]
    trainer = build_trainer(profile, variant, rows, np.zeros(len(rows), bool), arguments, [])
    assert type(trainer) is kind


def test_a_training_whose_weights_are_not_numbers_any_more_stops_at_its_first_log(
    workspace, tmp_path
):
    profile = tiny_profile(workspace, **{"training.processes": 1})
    rows = read_manifest(manifest_path(profile, "mmedpo"))
    arguments = training_arguments(profile, "mmedpo", 0, tmp_path, len(rows), validate=False)
    trainer = build_trainer(
        profile,
        profile.training.variants["mmedpo"],
        rows,
        np.zeros(len(rows), bool),
        arguments,
        [EventWriter(tmp_path, 4, load_profile("phantom"), [])],
    )
    trainer.precompute_reference()
    next(
        parameter for name, parameter in trainer.model.named_parameters() if "lora_A" in name
    ).data.fill_(math.nan)
    with pytest.raises(InputError, match="step 1: .* is nan"):
        trainer.train()
    assert not read_events(tmp_path)


def test_the_gpus_that_are_visible_are_the_ones_that_train(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    line = launch_command(load_profile("phantom"), "dpo", 0, tmp_path)
    assert line[line.index("--include") + 1] == "localhost:2,3" and "--num_accelerators" not in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f,GPU-2e")
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        launch_command(load_profile("phantom"), "dpo", 0, tmp_path)


def test_no_patient_is_on_both_sides_of_the_validation_split(tmp_path):
    rows = [{"patient_id": f"p{number // 7}", "image": f"{number}.png"} for number in range(700)]
    chosen = held_out(rows, seed=0)
    assert 0 < chosen.sum() <= 64
    sides = [
        {row["patient_id"] for row, held in zip(rows, chosen) if held == side}
        for side in (True, False)
    ]
    assert not sides[0] & sides[1]
    assert (held_out(rows, 0) == chosen).all() and (held_out(rows, 1) != chosen).any()
    assert not held_out(rows[:21], seed=0).any()


def test_questions_on_the_way_are_of_all_kinds_and_none_comes_twice():
    rows = [
        {
            "id": number,
            "image": f"{film}.png",
            "question_type": kind,
            "conversations": [{"from": "human", "value": f"<image>\n{kind}?"}],
        }
        for number, (film, kind) in enumerate(
            [(0, "presence"), (0, "presence"), (1, "presence"), (0, "side"), (0, "report")]
        )
    ]
    assert [row["id"] for row in sampled_questions(rows, 4)] == [0, 3, 4, 2]
    assert [row["id"] for row in sampled_questions(rows, 2)] == [0, 3]
    assert len(sampled_questions(rows, 9)) == 4 and sampled_questions(rows, 0) == []


def test_pairs_without_a_patient_are_held_out_by_image():
    absent = [{"id": number, "image": f"{number}.png"} for number in range(40)]
    null, blank = ([row | {"patient_id": value} for row in absent] for value in (None, ""))
    assert held_out(absent, 0).sum() == 4
    assert (held_out(null, 0) == held_out(absent, 0)).all() and (
        held_out(blank, 0) == held_out(absent, 0)
    ).all()


@pytest.mark.parametrize(
    ("stage", "offload"),
    [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu")],
)
def test_keys_of_stage_3_are_left_out_below_it(stage, offload):
    profile = load_profile("phantom", {"training.zero_stage": stage, "training.offload": offload})
    values = deepspeed_config(profile)["zero_optimization"]
    assert values["stage"] == stage and any(key.startswith("stage3") for key in values) == (
        stage == 3
    )
    assert [key for key in values if key.startswith("offload")] == {
        ("cpu", 2): ["offload_optimizer"],
        ("cpu", 3): ["offload_optimizer", "offload_param"],
    }.get((offload, stage), [])


def test_a_terminal_and_a_cell_start_the_same_run_and_tensorboard_is_filled(workspace, capsys):
    changes = {
        "training.processes": 1,
        "training.report_to": "tensorboard",
        "output": str(workspace / "board"),
    }
    shutil.copytree(workspace / "run" / "pairs", workspace / "board" / "pairs")
    profile, file = tiny_profile(workspace, **changes), workspace / "mine.yaml"
    profile.save(file)
    words = [
        sys.executable,
        "-m",
        "mmedpo_utils.programs.launch",
        "--profile",
        str(file),
        "--variant",
        "dpo",
    ]
    terminal = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert terminal.returncode == 0 and "step 4/4  loss" in terminal.stdout, terminal.stderr
    run = train(profile, "dpo", live=False)
    assert run.loaded and "loaded" in capsys.readouterr().out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    logged = [event["loss"] for event in run.events if "loss" in event]
    assert [point.value for point in board.Scalars("train/loss")] == pytest.approx(
        logged, abs=1e-5
    ) and len(logged) == 4
    pasted = next(
        line[2:] for line in terminal.stdout.splitlines() if line.startswith("$ ")
    ).replace("python", sys.executable, 1)
    again = subprocess.run(
        shlex.split(pasted), cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and "finished already" in again.stdout
    for package in ("wandb", "trackio"):
        with pytest.raises(
            InputError, match=f"report_to.*{package} is not installed; run `pip install {package}`"
        ):
            train(
                tiny_profile(workspace, **{**changes, "training.report_to": package}),
                "dpo",
                live=False,
            )


def test_a_wrong_command_ends_with_one_line(workspace, monkeypatch, capsys):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["launch", "--profile", "phantom", "--variant", "grpo"])
    assert launch_program.main() == 2
    assert (
        capsys.readouterr().err.startswith("error: variant 'grpo': unknown")
        and not capsys.readouterr().out
    )


def test_processes_share_the_cores_that_they_may_use(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cores_for(1) == cores_for(4) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cores_for(1) == 1 and cores_for(2) == 2 and cores_for(4) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert cores_for(1) == cores_for(2) == 8


@pytest.mark.slow
def test_a_port_that_is_taken_meanwhile_is_tried_again_elsewhere(workspace, monkeypatch, capsys):
    shutil.copytree(workspace / "run" / "pairs", workspace / "ports" / "pairs")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], free_port()])
        monkeypatch.setattr("mmedpo_utils.launch_command.free_port", lambda: next(ports))
        run = train(tiny_profile(workspace, output=str(workspace / "ports")), "dpo", live=False)
    assert run.result["processes"] == 2 and capsys.readouterr().out.count("--master_port") == 2


@pytest.mark.slow
def test_two_runs_at_once_do_not_collide(workspace):
    shutil.copytree(workspace / "run" / "pairs", workspace / "twice" / "pairs")
    profile = tiny_profile(workspace, output=str(workspace / "twice"))
    runs, threads = {}, []
    for seed in (0, 1):
        threads.append(
            threading.Thread(
                target=lambda seed=seed: runs.update(
                    {seed: train(profile, "mmedpo", seed, live=False)}
                )
            )
        )
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert sorted(run.result["seed"] for run in runs.values()) == [0, 1]
    for run in runs.values():
        alone = tiny_profile(workspace, output=str(workspace / f"alone{run.result['seed']}"))
        shutil.copytree(workspace / "run" / "pairs", alone.output / "pairs")
        assert_equal_adapters(run, train(alone, "mmedpo", run.result["seed"], live=False), 1e-6)


def assert_equal_adapters(run, other, tolerance: float) -> None:
    ours, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (run, other))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= tolerance


@pytest.mark.slow
def test_two_nodes_over_loopback_train_what_one_node_trains(workspace, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    profiles = {}
    for nodes in (1, 2):
        output = workspace / f"nodes{nodes}"
        shutil.copytree(workspace / "run" / "pairs", output / "pairs")
        profiles[nodes] = tiny_profile(workspace, output=str(output), **{"training.nodes": nodes})
    expected = train(profiles[1], "mmedpo", live=False)
    printed, others, usual = [], [], launch.printed

    def start_the_other(arguments: list[str]) -> str:
        """Do what the cell asks for: run the printed command of node 1 in another terminal."""
        if "--node_rank" in arguments and arguments[arguments.index("--node_rank") + 1] == "1":
            others.append(subprocess.Popen(arguments, cwd=REPOSITORY))
        printed.append(usual(arguments))
        return printed[-1]

    monkeypatch.setattr(launch, "printed", start_the_other)
    run = train(profiles[2], "mmedpo", live=False)
    assert others[0].wait(60) == 0 and len(others) == 1 and "--no_ssh --node_rank 0" in printed[0]
    assert run.result["processes"] == 2 and not processes_of(run.folder)
    assert [event["step"] for event in run.events] == [event["step"] for event in expected.events]
    assert_equal_adapters(run, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mmedpo", "sft", "dpo"])
def test_every_zero_stage_trains_the_same_adapter(workspace, objective):
    runs = {}
    for stage, offload in (
        (0, "none"),
        (1, "none"),
        (2, "none"),
        (3, "none"),
        (2, "cpu"),
        (3, "cpu"),
    ):
        profile = tiny_profile(
            workspace,
            output=str(workspace / f"zero{stage}{offload}"),
            **{"training.zero_stage": stage, "training.offload": offload},
        )
        if not profile.output.exists():
            shutil.copytree(workspace / "run" / "pairs", profile.output / "pairs")
        runs[stage, offload] = train(profile, objective, live=False)
    for run in runs.values():
        assert_equal_adapters(run, runs[0, "none"], 1e-5)


LEFTOVER = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29613",
    "MPI_LOCALRANKID": "0",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_TORCH_DEVICE": "cuda",
    "FSDP_SHARDING_STRATEGY": "1",
}


def test_what_another_job_left_in_the_environment_decides_nothing(workspace, tmp_path, monkeypatch):
    """A pod's WORLD_SIZE would make one process wait for a second; accelerate's own settings would
    replace the profile's.
    """
    profile = tiny_profile(
        workspace,
        name="leftover",
        **{"training.processes": 1, "training.epochs": None, "training.max_steps": 1},
    )
    for name, value in LEFTOVER.items():
        monkeypatch.setenv(name, value)
    result = train(profile, "sft", live=False).result
    assert result["processes"] == 1 and result["last"]["step"] == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_only_a_process_that_trains_alone_forgets_the_others(monkeypatch, processes):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name, value in LEFTOVER.items():
        monkeypatch.setenv(name, value)
    settle_environment(processes)
    left = LEFTOVER.keys() & os.environ.keys()
    deciding = {name for name in LEFTOVER if name.startswith(("ACCELERATE_", "FSDP_"))}
    assert left == (set() if processes == 1 else LEFTOVER.keys() - deciding)


def test_a_plain_call_of_the_program_trains_alone_too(monkeypatch, tmp_path):
    """Without a launcher, and without a word on the number of processes."""
    for name, value in LEFTOVER.items():
        monkeypatch.setenv(name, value)
    seen = []
    # It would wait ten minutes for the others.
    monkeypatch.setattr("deepspeed.init_distributed", lambda *_: pytest.fail("joins others"))
    monkeypatch.setattr("mmedpo_utils.programs.train.run", lambda *_: seen.append(dict(os.environ)))
    words = "train --profile phantom-smoke --variant sft --cores 1 --run-folder".split()
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "x")
    threads = torch.get_num_threads()
    train_program.main()
    torch.set_num_threads(threads)
    assert len(seen) == 1 and not LEFTOVER.keys() & seen[0].keys()


def test_the_command_in_the_programs_docstring_is_one_that_it_takes(monkeypatch):
    """The launcher adds --local_rank unless it is told not to, and the program knows no such
    one.
    """
    told = " ".join(train_program.__doc__.split())
    command = re.search(r"python -m (deepspeed\S+ .* --run-folder R)", told)[1].split()
    assert "--no_local_rank" in command[: command.index("--module")]
    count = command[command.index("--num_accelerators") + 1]
    assert command[command.index("--processes") + 1] == count


@pytest.mark.parametrize(
    ("value", "cores"),
    [("4,2", 2), ("1,2", 1), (" 1 ", 1), ("", 2), ("many", 2), ("0", 2), ("-1", 2)],
)
def test_the_first_number_of_threads_counts(monkeypatch, value, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cores_for(1) == cores


def test_master_port_is_for_several_nodes_and_a_port(workspace, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29613")
    folder = workspace / "x"
    line = launch_command(tiny_profile(workspace), "dpo", 0, folder)
    assert line[line.index("--master_port") + 1] != "29613", "a pod's leftover may be taken"
    several = tiny_profile(workspace, **{"training.nodes": 2, "training.processes": 2})
    assert all(
        "29613" in line
        for line in node_commands(several, "dpo", 0, folder, ssh=False, dry_run=True)
    )
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:29613")
    with pytest.raises(InputError, match="MASTER_PORT: expected a port"):
        node_commands(several, "dpo", 0, folder, ssh=False, dry_run=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("", "lists 0 nodes with 0 slots"),
        ("a slots=1\n", "lists 1 nodes with 1 slots"),
        (
            "a slots=2\nb slots=2\n",
            "4 slots; expected the profile's `training.nodes` .2. and `training.processes` .2.",
        ),
        ("-oProxyCommand=touch slots=1\nb slots=1\n", "row 0: expected NAME slots=NUMBER"),
        ("a\nb slots=1\n", "row 0: expected"),
    ],
)
def test_a_hostfile_that_is_not_the_profiles_starts_nothing(
    workspace, tmp_path, monkeypatch, text, told
):
    """The launcher takes a missing list for one machine, and a longer one for more processes than
    the profile says.
    """
    monkeypatch.setattr(shutil, "which", lambda name: name)
    hosts = tmp_path / "hosts"
    if text is not None:
        hosts.write_text(text)
    changes = {"training.nodes": 2, "training.processes": 2, "training.hostfile": str(hosts)}
    with pytest.raises(InputError, match=told):
        train(tiny_profile(workspace, **changes), "dpo")
    hosts.write_text("# two\nnode-1.cluster slots=1\n10.0.0.2  slots=1 # the second\n\n")
    check_hostfile(tiny_profile(workspace, **changes))


def test_what_starts_a_training_does_not_import_transformers():
    """It takes ten seconds, and the processes that train import it themselves."""
    program = "import sys, mmedpo_utils.programs.launch; print('transformers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout == "False\n", said.stderr
