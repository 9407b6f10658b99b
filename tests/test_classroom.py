"""A classroom server: many readers, one checkout that none of them can write to."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import REPOSITORY

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")


def sums(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture()
def room() -> Iterator[Path]:
    """A folder that other users can reach; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture()
def checkout(room) -> Iterator[Path]:
    """A copy of what is committed, that nobody may write to."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    folder = room / "checkout"
    for name in listed.stdout.splitlines():
        if name.startswith(("tests/", ".")) or not (REPOSITORY / name).is_file():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, folder / name)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def student(command: list[str], home: Path) -> list[str]:
    """The command as one who may not write to the checkout: who runs the tests, or where that is
    root, who writes anywhere, a user of no name; or root without that power, where the user of no
    name cannot reach Python.
    """
    if os.geteuid():
        return command
    if shutil.which("setpriv") is None:
        pytest.skip("root without setpriv: every file can be written to")
    nobody = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    if subprocess.run([*nobody, sys.executable, "-c", ""], capture_output=True).returncode == 0:
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        return [*nobody, *command]
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]


@pytest.mark.slow
def test_a_read_only_checkout_runs_with_all_output_elsewhere(checkout, room):
    mine = room / "student"
    (mine / "home").mkdir(parents=True)
    program = ["-m", "mmedpo_utils.programs.main", "notebooks", "--profile", "phantom-smoke"]
    command = student([sys.executable, *program], mine)
    tried = student(["touch", str(checkout / "README.md"), str(checkout / "new")], mine)
    assert subprocess.run(tried, capture_output=True).returncode, "the checkout is read-only"
    before = sums(checkout)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(mine / "home"),
        "PYTHONPATH": str(checkout),
        "MMEDPO_OUTPUT": str(mine / "work"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        command,
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = mine / "work" / "runs" / "phantom-smoke"
    assert len(list((run / "notebooks").glob("*.ipynb"))) == 8
    assert list((run / "figures").glob("*.png")) and (run / "evaluation" / "scores.json").is_file()
    assert sums(checkout) == before
