"""A classroom server: many readers, one checkout that none of them can write to."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import REPOSITORY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")


def sums(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture()
def checkout(tmp_path) -> Iterator[Path]:
    """A copy of what is committed, that nobody may write to."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    folder = tmp_path / "checkout"
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


@pytest.mark.slow
def test_a_read_only_checkout_runs_with_all_output_elsewhere(checkout, tmp_path):
    mine = tmp_path / "student"
    (mine / "home").mkdir(parents=True)
    command = [sys.executable, "-m", "mmedpo_utils.programs.main", "notebooks"]
    command += ["--profile", "phantom-smoke"]
    if os.geteuid() == 0:  # root writes where nobody may, until it gives that power away
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv: every file can be written to")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
        tried = [*command[:3], "touch", str(checkout / "README.md"), str(checkout / "new")]
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
