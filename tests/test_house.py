"""The house: who may import whom, how large the table is, where hooks may be."""

from __future__ import annotations

import ast
import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mmedpo_utils
from mmedpo_utils.base.doors import DOORS, open_door

from .conftest import REPOSITORY

PACKAGE = REPOSITORY / "mmedpo_utils"
FILES = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
LOW = {"base", "phantom", "released"}
# What each room may import beside itself; "" is the core.
ARROWS = {
    "": {"base", "show", "phantom", "released"},
    "base": set(),
    "phantom": {"base"},
    "released": {"base"},
    "show": {"", *LOW},
    "convert": {"", "show", *LOW},
    "judges": {"", "show", *LOW},
    "scale": {"", "show", *LOW},
    "programs": {"", "show", "convert", "judges", "scale", *LOW},
}


def room(module: tuple[str, ...]) -> str:
    return module[0] if len(module) > 1 or module[0] in ARROWS else ""


def imported(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules of the package that a module imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("mmedpo_utils") for name in node.names), module
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        start = module[: len(module) - node.level] + tuple((node.module or "").split("."))
        start = tuple(part for part in start if part)
        for name in node.names:
            inside = (*start, name.name)
            found.add(inside if inside in FILES else start or ("__init__",))
    return found - {module}


@pytest.mark.parametrize("module", sorted(FILES), ids=".".join)
def test_arrows_between_rooms(module):
    mine = room(module)
    others = {room(other) for other in imported(module)} - {mine}
    assert others <= ARROWS[mine], f"{'.'.join(module)} imports {sorted(others - ARROWS[mine])}"


def test_no_circle():
    graph = {module: imported(module) for module in FILES}
    tuple(TopologicalSorter(graph).static_order())


def test_the_core_is_small_and_the_map_names_each_module_of_it():
    core = [path for module, path in FILES.items() if len(module) == 1]
    assert len(core) <= 16
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core) <= 3600
    named = set(re.findall(r"^    (\w+) ", mmedpo_utils.__doc__, flags=re.M))
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert named == {path.stem for path in core} - {"__init__"} | rooms


def test_each_door_opens():
    for name in DOORS:
        assert callable(open_door(name)), name


def test_hooks_and_replaced_methods_are_in_scale_alone():
    for module, path in FILES.items():
        if room(module) == "scale":
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"register_\w*hook|register_forward|\.forward = ", text), module


def test_notebooks_import_from_a_door_only_what_a_cell_is_about():
    """Beside the core, show, base and phantom; each of these is the subject of its cell."""
    found = set()
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            for line in "".join(cell["source"]).splitlines():
                named = re.match(r"from mmedpo_utils\.(\w+)(?:\.(\w+))? import (\w+)", line)
                if named and named[1] in ARROWS and named[1] not in {"base", "show", "phantom"}:
                    found.add(f"{named[1]}.{named[2] or named[3]}")
    assert found == {
        "judges.language_models",  # 03: who judges, and what it costs
        "programs.check",  # 00: the same table as the command
        "programs.plan",  # 04: the same plan as the command
        "released.evaluation",  # 05: the authors' rules beside ours
        "released.noise",  # 02: the authors' noise beside the paper's
        "released.published_audit",  # 06
        "scale.estimate",  # 04: memory of the recipes
    }


def test_code_cells_are_no_wider_than_88_columns():
    wide = []
    for path in sorted(Path(REPOSITORY / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                lines = "".join(cell["source"]).splitlines()
                wide += [f"{path.stem}: {line}" for line in lines if len(line) > 88]
    assert not wide
