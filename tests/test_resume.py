"""A run that is killed, interrupted, or out of disk goes on from its last whole checkpoint and ends
as if nothing had been.
"""

from __future__ import annotations

import _thread
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from mmedpo_utils.base.checkpoints import MARKER, checkpoints, newest_checkpoint
from mmedpo_utils.base.errors import InputError, Interrupted
from mmedpo_utils.base.files import write_json_lines
from mmedpo_utils.base.locks import run_lock
from mmedpo_utils.launch import TrainingError, train
from mmedpo_utils.run_folder import manifest_path, prepare_folder, read_events, run_digest

from .conftest import REPOSITORY
from .test_launch import processes_of, tiny_profile, workspace  # noqa: F401

HARD = {
    "training.lora_dropout": 0.2,
    "training.gradient_accumulation_steps": 2,
    "training.group_by_length": True,
    "training.max_steps": None,
    "training.epochs": 5,
    "training.validation_every": 4,
    "training.save_every": 3,
    "training.weight_decay": 0.1,
}
KEYS = ("step", "loss", "validation_loss", "margin", "tokens")


@pytest.fixture(scope="module")
def whole(workspace):  # noqa: F811
    """Runs that nothing interrupts, by number of processes."""
    runs = {}

    def run(processes: int):
        if processes not in runs:
            runs[processes] = train(
                hard_profile(workspace, f"whole{processes}", processes), "mmedpo", live=False
            )
        return runs[processes]

    return run


def hard_profile(workspace: Path, name: str, processes: int, **changes):  # noqa: F811
    """A profile with an output folder of its own, on the same pairs; the global batch is the same
    for 1 and 2 processes.
    """
    output = workspace / name
    if not output.exists():
        shutil.copytree(workspace / "run" / "pairs", output / "pairs")
    return tiny_profile(
        workspace, **{**HARD, "output": str(output), "training.processes": processes, **changes}
    )


def workers(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in processes_of(folder)
        if not any("deepspeed" in word for word in process.cmdline())
    ]


def at_step(folder: Path, step: int, act) -> threading.Thread:
    """In the background, wait until the run has logged ``step``, then call ``act``."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(event["step"] >= step for event in read_events(folder)):
                return act()
            time.sleep(0.01)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_one(folder: Path, which: int = -1) -> None:
    sorted(workers(folder), key=lambda process: process.pid)[which].send_signal(signal.SIGKILL)


def assert_same(run, other) -> None:
    """Both adapters within 1e-6, both logs with the same steps and values, each once."""
    ours, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (run, other))
    assert ours.keys() == theirs.keys() and any("projector" in name for name in ours)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-6
    logs = [
        [{key: event[key] for key in KEYS if key in event} for event in one.events]
        for one in (run, other)
    ]
    assert [event["step"] for event in logs[0]] == [event["step"] for event in logs[1]]
    assert all(event == pytest.approx(twin, abs=1e-5) for event, twin in zip(*logs))


def killed_and_resumed(profile, step: int, which: int):
    """Kill worker ``which`` after ``step``; check the message and what is left; call again."""
    folder = profile.output / "train" / "mmedpo-seed0"
    thread = at_step(folder, step, lambda: kill_one(folder, which))
    with pytest.raises(
        TrainingError, match="a process was killed from outside.*goes on from step"
    ) as caught:
        train(profile, "mmedpo", live=False)
    thread.join()
    assert not processes_of(folder) and len(checkpoints(folder)) == 1
    assert f"from step {next(iter(checkpoints(folder)))}, whose checkpoint is whole" in str(
        caught.value
    )
    return train(profile, "mmedpo", live=False)


def test_a_killed_process_and_the_same_call_again_end_with_the_same_adapter(
    workspace,  # noqa: F811
    whole,
    capsys,
):
    run = killed_and_resumed(hard_profile(workspace, "killed", 1), random.randint(4, 30), 0)
    assert (
        run.result["resumed_from"]
        and f"goes on from step {run.result['resumed_from']}" in capsys.readouterr().out
    )
    assert_same(run, whole(1))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_five_random_kills_of_a_rank(workspace, whole, number):  # noqa: F811
    step = random.randint(4, 20)
    print(f"rank {number % 2} is killed after step {step}")
    assert_same(
        killed_and_resumed(hard_profile(workspace, f"killed{number}", 2), step, number % 2),
        whole(2),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (3, "none"), (3, "cpu")])
def test_a_kill_under_other_zero_stages(workspace, stage, offload):  # noqa: F811
    changes = {"training.zero_stage": stage, "training.offload": offload, "training.epochs": 3}
    whole, killed = (
        hard_profile(workspace, f"{name}{stage}{offload}", 2, **changes)
        for name in ("left", "killed")
    )
    assert_same(
        killed_and_resumed(killed, random.randint(4, 10), 1), train(whole, "mmedpo", live=False)
    )


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(workspace, whole):  # noqa: F811
    profile = hard_profile(workspace, "full", 1)
    folder = profile.output / "train" / "mmedpo-seed0"
    (last,) = checkpoints(whole(1).folder).values()
    largest = max(path.stat().st_size for path in last.iterdir())

    def fill_the_disk() -> None:
        for worker in workers(folder):
            worker.rlimit(psutil.RLIMIT_FSIZE, (largest // 2, largest // 2))

    at_step(folder, 4, fill_the_disk)
    with pytest.raises(TrainingError, match="the disk is full.*goes on from step") as caught:
        train(profile, "mmedpo", live=False)
    left = checkpoints(folder)
    assert (
        len(left) == 1
        and all((path / MARKER).is_file() for path in left.values())
        and not processes_of(folder)
    )
    assert f"goes on from step {next(iter(left))}" in str(caught.value)
    assert_same(train(profile, "mmedpo", live=False), whole(1))


@pytest.mark.slow
def test_an_interrupt_in_the_notebook_goes_on_as_well(workspace, whole):  # noqa: F811
    profile = hard_profile(workspace, "interrupted", 2)
    folder = profile.output / "train" / "mmedpo-seed0"
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        at_step(folder, random.randint(4, 20), _thread.interrupt_main)
        with pytest.raises(Interrupted, match="run again, goes on from step"):
            train(profile, "mmedpo", live=False)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert not processes_of(folder)
    assert_same(train(profile, "mmedpo", live=False), whole(2))


def fake_checkpoint(folder: Path, step: int, **marker) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if marker:
        (path / MARKER).write_text(json.dumps(marker))
    return path


def test_the_newest_whole_checkpoint_of_the_same_inputs_counts(tmp_path):
    older = fake_checkpoint(tmp_path, 9, digest="a", processes=2, files={})
    newer = fake_checkpoint(tmp_path, 12, digest="a", processes=2, files={})
    fake_checkpoint(tmp_path, 15)
    (fake_checkpoint(tmp_path, 18) / MARKER).write_text('{"dig')
    assert newest_checkpoint(tmp_path, "a", 2) == newest_checkpoint(tmp_path, "a") == newer
    assert (
        newest_checkpoint(tmp_path, "b", 2) is None and newest_checkpoint(tmp_path, "a", 4) is None
    )
    write_json_lines(tmp_path / "events.jsonl", [{"step": step} for step in (9, 12, 12, 13)])
    prepare_folder(tmp_path, newer)
    assert [event["step"] for event in read_events(tmp_path)] == [9, 12, 12]
    assert set(checkpoints(tmp_path)) == {9, 12, 18} and older.is_dir()
    (tmp_path / "profile.yaml").write_text("kept")
    prepare_folder(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.yaml"]


def test_a_second_training_of_the_same_folder_is_refused_until_the_first_has_died(workspace):  # noqa: F811
    profile = hard_profile(workspace, "locked", 1)
    folder = profile.output / "train" / "mmedpo-seed0"
    program = (
        "import sys, time; from pathlib import Path; from mmedpo_utils.base.locks import run_lock\n"
        "with run_lock(Path(sys.argv[1]), 'train'):\n    print('locked', flush=True); "
        "time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(
            InputError, match=f"process {holder.pid} on .* trains into this folder now"
        ):
            train(profile, "mmedpo", live=False)
        assert not folder.exists()
    finally:
        holder.kill()
        holder.wait()
    with run_lock(folder, "train"):
        assert f"process {os.getpid()}" in folder.with_name(".mmedpo-seed0.train.lock").read_text()


def test_other_inputs_start_anew_and_logging_alone_changes_nothing(workspace):  # noqa: F811
    profile = hard_profile(workspace, "digest", 1)
    digest = run_digest(profile, "mmedpo", 0, manifest_path(profile, "mmedpo"))
    same = {
        "training.report_to": "tensorboard",
        "training.logging_steps": 5,
        "training.save_every": 7,
    }
    other = {
        "training.epochs": 2,
        "training.weight_decay": 0.0,
        "training.reference": "released",
        "lvlm.template": "v1",
    }
    for changes, equal in ((same, True), *(({key: value}, False) for key, value in other.items())):
        if "training.reference" in changes:
            changes = {**changes, "training.cache_reference": False}
        changed = hard_profile(workspace, "digest", 1, **changes)
        assert (
            run_digest(changed, "mmedpo", 0, manifest_path(changed, "mmedpo")) == digest
        ) == equal, changes
