"""The pins, the conda file and the project file say the same."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest
import yaml

from tests.conftest import REPOSITORY

PINS = dict(
    re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), flags=re.M)
)
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def test_every_dependency_is_pinned():
    pinned = {canonical(name) for name in PINS}
    wanted = {canonical(name) for name in (*PROJECT["dependencies"], *sum(EXTRAS.values(), []))}
    assert wanted <= pinned, f"add to constraints.txt: {sorted(wanted - pinned)}"


@pytest.mark.parametrize("name", sorted(canonical(name) for name in PROJECT["dependencies"]))
def test_the_running_version_is_the_pinned_one(name):
    pins = {canonical(pin): version for pin, version in PINS.items()}
    assert importlib.metadata.version(name).split("+")[0] == pins[name]


def test_conda_installs_the_package_with_the_same_pins():
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert "--constraint constraints.txt" in pip
    extras = re.search(r"\[(.*)\]", next(line for line in pip if line.startswith("--editable")))[
        1
    ].split(",")
    assert set(extras) == set(EXTRAS)
    python = next(entry for entry in conda["dependencies"] if str(entry).startswith("python="))
    assert PROJECT["requires-python"] == f">={python.removeprefix('python=')}"


def test_make_installs_all_extras_on_the_pins():
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "--constraint constraints.txt" in makefile
    assert f"'.[{','.join(sorted(EXTRAS))}]'" in makefile
