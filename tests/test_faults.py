"""The fault laboratory: each step of the kit that writes is killed, doubled, starved of disk and
damaged. Whatever happens, the same call again ends with the same bytes, or says in one sentence
what is wrong; and nothing half-written stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from .conftest import REPOSITORY
from .fault_steps import STEPS
from .test_fuzz import damage, few_or_many

QUICK = ("evaluate", "visual", "page")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Laboratory:
    """The program that forks steps, and what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.fault_steps"],
            cwd=REPOSITORY,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: object) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, step: str, folder: Path, largest_file: int | None = None) -> Started:
        self.count += 1
        log = self.folder / f"{self.count}.log"
        pid = self.ask([step, str(folder), str(log), largest_file])
        return Started(self, pid, log)

    def run(self, step: str, folder: Path) -> float:
        """A step from beginning to end; its seconds."""
        begun = time.monotonic()
        code, said = self.start(step, folder).ended()
        assert code == 0, said
        return time.monotonic() - begun


@dataclass
class Started:
    """One step that runs."""

    laboratory: Laboratory
    pid: int
    log: Path

    def ended(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        code = self.laboratory.ask(self.pid)
        return code, self.log.read_text() if self.log.is_file() else ""

    def kill(self) -> None:
        """Kill it and all that it started, wherever they are."""
        os.kill(self.pid, signal.SIGSTOP)  # it starts no more
        children = psutil.Process(self.pid).children(recursive=True)
        for pid in (self.pid, *(child.pid for child in children)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.ended()


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory) -> Iterator[Laboratory]:
    laboratory = Laboratory(tmp_path_factory.mktemp("laboratory"))
    yield laboratory
    laboratory.server.terminate()
    laboratory.server.communicate()


def written(step: str, folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a step writes, by path."""
    files = {file for pattern in STEPS[step].writes for file in (folder / "run").glob(pattern)}
    assert files, f"{step} has written nothing"
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.is_file()
    }


def left_behind(folder: Path) -> list[str]:
    """Hidden files and folders that are no lock of a training."""
    found = [path for path in folder.rglob("*") if path.name.startswith(".")]
    return [str(path) for path in found if not path.name.endswith((".train.lock", ".launch.lock"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, laboratory):
    """By step: a folder in which everything before it has run, the same after it, and its
    seconds.
    """
    made: dict[str, tuple[Path, Path, float]] = {}

    def prepare(step: str) -> tuple[Path, Path, float]:
        if step not in made:
            before = tmp_path_factory.mktemp(f"before-{step}")
            for earlier in STEPS[step].after:
                shutil.copytree(prepare(earlier)[1], before, dirs_exist_ok=True)
            after = tmp_path_factory.mktemp(f"after-{step}")
            shutil.copytree(before, after, dirs_exist_ok=True)
            seconds = laboratory.run(step, after)
            made[step] = (before, after, seconds)
        return made[step]

    return prepare


def fresh(before: Path, folder: Path) -> Path:
    shutil.copytree(before, folder, dirs_exist_ok=True)
    return folder


KILLS = 4


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_anywhere_the_same_call_again_gives_the_same_bytes(
    step, undisturbed, laboratory, tmp_path
):
    before, after, seconds = undisturbed(step)
    folder = fresh(before, tmp_path / "killed")
    chance = random.Random(step)
    for _ in range(KILLS):
        started = laboratory.start(step, folder)
        time.sleep(chance.uniform(0, seconds))
        started.kill()
    laboratory.run(step, folder)
    assert written(step, folder) == written(step, after)
    assert not left_behind(folder)


@pytest.mark.slow
@pytest.mark.parametrize("step", [step for step in STEPS if step != "merging"])
def test_two_at_once_give_the_same_bytes(step, undisturbed, laboratory, tmp_path):
    before, after, seconds = undisturbed(step)
    for turn in range(2):
        folder = fresh(before, tmp_path / f"doubled{turn}")
        first = laboratory.start(step, folder)
        second = laboratory.start(step, folder)
        ends = [first.ended(), second.ended()]
        refused = [said for code, said in ends if code]
        # A training is refused beside another; everything else waits for it.
        assert not refused or (step == "training" and len(refused) == 1), refused
        assert all("trains into this folder now" in said for said in refused)
        assert written(step, folder) == written(step, after)
        assert not left_behind(folder)


@pytest.mark.parametrize(
    "step", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in STEPS]
)
def test_where_the_disk_is_full_one_sentence_says_so_and_nothing_is_lost(
    step, undisturbed, laboratory, tmp_path
):
    before, after, _ = undisturbed(step)
    folder = fresh(before, tmp_path / "full")
    largest = max(path.stat().st_size for path in after.rglob("*") if path.is_file())
    earlier = [path.stat().st_size for path in before.rglob("*") if path.is_file()]
    own = [(after / name).stat().st_size for name in written(step, after)]
    # Some of its files find room, the largest of its own does not.
    started = laboratory.start(step, folder, largest_file=max(own) // 2)
    code, said = started.ended()
    assert code in (2, 3), (said, largest, max(earlier, default=0))
    assert "cannot be written" in said or "the disk is full" in said, said
    assert "Traceback" not in said.partition("Its last lines")[0]
    laboratory.run(step, folder)
    assert written(step, folder) == written(step, after)
    assert not left_behind(folder)


@pytest.mark.parametrize(
    "step", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in STEPS]
)
def test_a_file_that_was_cut_is_made_anew_or_named(step, undisturbed, laboratory, tmp_path):
    _, after, _ = undisturbed(step)
    folder = fresh(after, tmp_path / "cut")
    whole = written(step, after)
    by_kind = {Path(name).suffix + Path(name).parent.name: name for name in whole}
    for name in by_kind.values():
        file = folder / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        started = laboratory.start(step, folder)
        code, said = started.ended()
        assert "Traceback" not in said, said
        if code:
            assert code == 2 and file.name in said, said
            file.write_bytes(content)
        elif step != "merging":  # what is merged already is the reader's
            assert written(step, folder)[name] == whole[name], f"{name}: {said}"


NOTES = (".json", ".jsonl", ".yaml", ".sha256")


@pytest.mark.parametrize("seed", few_or_many(2, 8))
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in STEPS
        if name != "page"  # it keeps none
    ],
)
def test_damaged_notes_of_a_step_are_made_anew_or_named(
    step, seed, undisturbed, laboratory, tmp_path
):
    before, after, seconds = undisturbed(step)
    chance = random.Random(f"{step}{seed}")
    folder = tmp_path / "damaged"
    if seed % 2:
        fresh(after, folder)
    else:  # what it keeps on its way
        fresh(before, folder)
        started = laboratory.start(step, folder)
        time.sleep(chance.uniform(0.4, 1) * seconds)
        started.kill()
    earlier = {path.relative_to(before) for path in before.rglob("*")}
    notes = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in NOTES and path.stat().st_size and path.relative_to(folder) not in earlier
    ]
    assert notes or seed % 2 == 0, "a whole run has notes"
    for file in chance.sample(notes, min(len(notes), 2)):
        if not file.is_file():  # the run after the first damage has removed its checkpoint
            continue
        damage(file, chance)
        started = laboratory.start(step, folder)
        code, said = started.ended()
        assert "Traceback" not in said, (file, said)
        if code:
            assert code == 2 and file.name in said, (file, said)
            shutil.rmtree(folder)
            fresh(after, folder)
        elif step != "merging":  # what is merged already is the reader's
            found = {
                name: digest
                for name, digest in written(step, folder).items()
                if not Path(name).suffix.startswith(".kept")  # the damaged file, with a line
            }
            assert found == written(step, after), (file, said)
            assert not left_behind(folder)
