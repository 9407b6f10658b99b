"""The kit's steps that write, each in a process of its own. The laboratory (test_faults.py) kills,
doubles, starves and damages them.

A new step is a function and a line in `STEPS`.

``python -m tests.fault_steps`` imports all that steps need once, and forks a process for each line
that it reads: the imports take ten times as long as a step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mmedpo_utils import curate
from mmedpo_utils.base.cards import load_card
from mmedpo_utils.base.errors import exit_status
from mmedpo_utils.dataset import FilmDataset, prepare_dataset
from mmedpo_utils.evaluate import predict_test_split
from mmedpo_utils.judges.language_models import build_judges
from mmedpo_utils.launch import TrainingError, train
from mmedpo_utils.lvlm import load_profile_lvlm
from mmedpo_utils.medklip import load_medklip
from mmedpo_utils.profiles import Profile, load_profile
from mmedpo_utils.programs.export import merge
from mmedpo_utils.show.pages import Page
from mmedpo_utils.show.training_view import training_view


def profile_of(folder: Path) -> Profile:
    """A small phantom run under ``folder``."""
    changes = {
        "output": str(folder / "run"),
        "figures": str(folder / "run" / "figures"),
        "data.train_patients": 12,
        "data.validation_patients": 4,
        "data.test_patients": 6,
        "curation.text_pairs": 12,
        "evaluation.questions": 12,
        "training.processes": 1,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 8,
        "training.epochs": None,
        "training.save_every": 2,
        "lvlm.device": "cpu",
    }
    return load_profile("phantom-smoke", changes)


def data(profile: Profile) -> FilmDataset:
    return prepare_dataset(profile)


def visual(profile: Profile) -> list:
    return curate.curate_visual(profile, data(profile), load_medklip("phantom"))


def text(profile: Profile) -> list:
    judges = build_judges(profile, load_card("phantom"))
    return curate.curate_text(profile, data(profile), load_profile_lvlm(profile), *judges)[0]


def pairs(profile: Profile) -> None:
    curate.write_training_pairs(profile, text(profile), visual(profile))


def evaluate(profile: Profile) -> None:
    predict_test_split(profile, data(profile), "base", None)


def training(profile: Profile) -> None:
    train(profile, "mmedpo", live=False)


def merging(profile: Profile) -> None:
    merged = profile.output / "merged"
    if not merged.exists():
        merge(profile.output / "train" / "mmedpo-seed0", merged)


def page(profile: Profile) -> None:
    events = [{"step": step, "loss": 1 / step} for step in range(1, 2000)]
    view: Page = training_view({"mmedpo": events})
    view.save(profile.output / "pages" / "training.html")


@dataclass(frozen=True)
class Step:
    """What a step does, which files it writes under ``run`` (as patterns), and the steps whose
    files it reads.
    """

    do: Callable[[Profile], object]
    writes: tuple[str, ...]
    after: tuple[str, ...] = ()


ADAPTER = "train/mmedpo-seed0/adapter/adapter_"
STEPS = {
    "data": Step(data, ("data/**/*.png", "data/*.json*")),
    "visual": Step(visual, ("pairs/visual.json", "pairs/audit.json", "pairs/noised/*"), ("data",)),
    "text": Step(text, ("pairs/text.json", "pairs/debates.json"), ("data",)),
    "pairs": Step(pairs, ("pairs/train.json",), ("visual", "text")),
    "evaluate": Step(evaluate, ("evaluation/base.jsonl",), ("data",)),
    "training": Step(
        training, (f"{ADAPTER}model.safetensors", f"{ADAPTER}config.json"), ("pairs",)
    ),
    "merging": Step(merging, ("merged/*.safetensors", "merged/*.json"), ("training",)),
    "page": Step(page, ("pages/training.html",)),
}


def run_step(name: str, folder: Path) -> int:
    """A step as a program would run it; its exit code."""
    try:
        return exit_status(partial(STEPS[name].do, profile_of(folder)))
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 3


def begin(name: str, folder: str, log: str, largest_file: int | None) -> int:
    """Fork a process that runs a step; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        code = run_step(name, Path(folder))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Answer each line: a list begins a step, a number waits for that process and gives its exit
    code.
    """
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1])
        else:
            answer = begin(*asked)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
