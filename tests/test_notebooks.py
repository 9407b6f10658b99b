"""The notebooks: executed at smoke size, committed executed, written to the house's style."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path

import nbformat
import papermill
import pytest

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs import run_notebooks
from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("[0-9]*.ipynb"))
HOME = re.compile(r"(?<![\w.])/(?:root|tmp|home|Users|work)/\w")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All notebooks, executed in order in the smoke profile, in a folder of their own."""
    folder = tmp_path_factory.mktemp("smoke")
    # One process a training: two import all libraries twice, and test_launch trains in two.
    one = {"training.processes": 1, "training.gradient_accumulation_steps": 2}
    places = {"output": str(folder / "run"), "figures": str(folder / "figures")}
    profile = load_profile("phantom-smoke", places | one)
    profile.save(folder / "profile.yaml")
    seconds = run_notebooks.run(profile, str(folder / "profile.yaml"))
    return profile, seconds


def test_all_notebooks_run_in_the_smoke_profile(smoke):
    profile, seconds = smoke
    executed = sorted((profile.output / "notebooks").glob("*.ipynb"))
    assert [path.name for path in executed] == [path.name for path in NOTEBOOKS]
    assert 0 < seconds["peak_gib"] < 6
    for path in executed:
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        assert all(out.output_type != "error" for cell in cells for out in cell.outputs)
        shown = "".join(
            out.get("data", {}).get("text/html", "") for cell in cells for out in cell.outputs
        )
        for out in (out for cell in cells for out in cell.outputs):
            data = out.get("data", {})
            pictured = "<img" in data.get("text/html", "")
            assert not pictured or "image/png" in data, "other tools look for a PNG"
        texts = alternative_texts(out for cell in cells for out in cell.outputs)
        assert texts and all(len(text) >= 20 for text in texts), path.name
        empty = re.findall(r'<caption>([^<]*)</caption>\s*<tr><th scope="col">no rows', shown)
        assert set(empty) <= {"Eight of 0 answers that training changed"}, path.name


def test_a_run_leaves_manifests_adapters_predictions_and_figures(smoke):
    profile, _ = smoke
    rows = json.loads((profile.output / "pairs" / "train.json").read_text())
    assert {row["source"] for row in rows} == {"text", "visual"}
    for variant in profile.training.variants:
        folder = profile.output / "train" / f"{variant}-seed0"
        for name in (
            "profile.yaml",
            "versions.json",
            "events.jsonl",
            "result.json",
            "adapter/adapter_model.safetensors",
        ):
            assert (folder / name).is_file(), f"{variant}: {name}"
        assert load_profile(folder / "profile.yaml") == profile
    scores = json.loads((profile.output / "evaluation" / "scores.json").read_text())["models"]
    assert {"base", "mmedpo", "mmedpo_shuffled", *profile.training.variants} <= scores.keys()
    assert len(list(profile.figures.glob("*.png"))) >= 15
    table = run_notebooks.scores_as_text(scores)
    assert len(table.splitlines()) == len(scores) + 1 and "closed accuracy" in table


def test_a_second_run_reads_what_is_there(smoke):
    profile, _ = smoke
    stamps = {path: path.stat().st_mtime_ns for path in profile.output.glob("train/*/result.json")}
    run_notebooks.run_notebook(
        NOTEBOOKS[4], profile.output / "again.ipynb", str(profile.output.parent / "profile.yaml")
    )
    assert stamps and stamps == {path: path.stat().st_mtime_ns for path in stamps}, (
        "nothing is trained twice"
    )


@pytest.mark.slow
def test_real_images_go_through_notebooks_01_to_05(shared, tmp_path, monkeypatch):
    root = shared / "data" / "vqa_rad_mini"
    if not root.is_dir():
        pytest.skip(f"no {root}: the two VQA-RAD images and their rows")
    monkeypatch.setenv("MMEDPO_DATA_ROOT", str(root))
    # One variant in one process: the smoke profile above trains all of them.
    variants = load_profile("vqa-rad-mini").as_dict()["training"]["variants"]
    profile = load_profile(
        "vqa-rad-mini",
        {
            "output": str(tmp_path / "run"),
            "figures": str(tmp_path / "figures"),
            "training.processes": 1,
            "training.variants": {"mmedpo": variants["mmedpo"]},
        },
    )
    profile.save(tmp_path / "profile.yaml")
    for path in NOTEBOOKS[1:6]:
        run_notebooks.run_notebook(path, tmp_path / path.name, str(tmp_path / "profile.yaml"))
    rows = json.loads((profile.output / "pairs" / "train.json").read_text())
    released = json.loads((root / "train_preferences.json").read_text())
    text = [row for row in rows if row["source"] == "text"]
    assert [row["rejected_conversations"] for row in text] == [
        row["rejected_conversations"] for row in released
    ]
    assert len(list((profile.output / "pairs" / "noised").iterdir())) == 2
    predictions = (profile.output / "evaluation" / "mmedpo.jsonl").read_text().splitlines()
    assert len(predictions) == 6 and all(
        json.loads(line)["prediction"] is not None for line in predictions
    )


def test_a_failing_cell_stops_the_run_and_names_the_error(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("raise KeyError('lesion')")]
    )
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(papermill.PapermillExecutionError, match="lesion"):
        run_notebooks.run_notebook(tmp_path / "bad.ipynb", tmp_path / "out.ipynb", "phantom")


def test_the_command_line_refuses_to_publish_credentialed_data(tmp_path, monkeypatch, capsys):
    profile = load_profile(
        "vqa-rad-mini",
        {
            "data.source": "mimic-cxr",
            "data.card": "mimic-cxr",
            "data.root": str(tmp_path),
            "output": str(tmp_path / "run"),
            "figures": str(tmp_path / "run" / "figures"),
        },
    )
    profile.save(tmp_path / "mimic.yaml")
    monkeypatch.setattr(
        "sys.argv", ["tutorial", "--profile", str(tmp_path / "mimic.yaml"), "--in-place"]
    )
    assert run_notebooks.main() == 2
    assert (
        "mimic-cxr is credentialed data" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )
    monkeypatch.setattr("sys.argv", ["tutorial", "--profile", "fantom"])
    assert run_notebooks.main() == 2 and "`phantom`" in capsys.readouterr().err


def test_a_profile_in_the_working_folder_reaches_kernels_that_run_elsewhere(tmp_path, monkeypatch):
    def stop(profile, name, in_place):
        raise InputError(name)

    load_profile("phantom-smoke").save(tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_notebooks, "run", stop)
    monkeypatch.setattr("sys.argv", ["tutorial", "--profile", "mine.yaml"])
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert run_notebooks.main() == 2
    assert errors.getvalue().strip() == str(tmp_path / "mine.yaml")


def test_peak_memory_sees_an_allocation():
    watch = run_notebooks.PeakMemory()
    watch.start()
    block = bytearray(os.urandom(1)) * (600 * 2**20)
    watch._stop_event.wait(0.6)
    peak = watch.stop()
    assert peak > 0.6 and len(block) > 0


def test_clean_drops_the_executors_marks_only():
    cell = nbformat.v4.new_code_cell("1")
    cell.metadata.update(papermill={"duration": 1}, tags=["solution"])
    injected = nbformat.v4.new_code_cell(
        "profile_name = 'x'", metadata={"tags": ["injected-parameters"]}
    )
    notebook = nbformat.v4.new_notebook(
        cells=[cell, injected], metadata={"papermill": {}, "language_info": {"name": "python"}}
    )
    cleaned = run_notebooks.clean(notebook)
    assert [dict(c.metadata) for c in cleaned.cells] == [{"tags": ["solution"]}]
    assert "papermill" not in cleaned.metadata and "language_info" in cleaned.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_executed_and_clean(path: Path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    # A view in the browser holds its films.
    views = 'data-view=\\"' in path.read_text("utf-8")
    assert path.stat().st_size < (3 if views else 1) * 2**20
    for cell in code:
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", (
                f"cell {cell.execution_count}"
            )
    text = path.read_text()
    assert not HOME.search(text) and ">no rows<" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_teaches(path: Path):
    notebook = nbformat.read(path, 4)
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    source = "\n".join(cell.source for cell in notebook.cells)
    assert tags.count("parameters") == 1 and tags.count("solution") >= 2
    assert (
        "**Purpose.**" in source
        and "| Time |" in source
        and "| Reads |" in source
        and "| Writes |" in source
    )
    assert any(
        "assert " in cell.source for cell in notebook.cells if cell.cell_type == "code"
    ) or path.stem.startswith("01")
    lengths = [len(cell.source.splitlines()) for cell in notebook.cells if cell.cell_type == "code"]
    assert max(lengths) <= 40


def alternative_texts(outputs) -> list[str]:
    """The alternative text of every figure: PNG outputs keep it in their metadata, HTML in alt."""
    texts = []
    for out in outputs:
        data = out.get("data", {})
        if "image/png" in data:
            texts.append(out.metadata.get("image/png", {}).get("alt", ""))
        for image in re.findall(r"<img [^>]*>", data.get("text/html", "")):
            found = re.search(r'alt="([^"]*)"', image)
            texts.append(found[1] if found else "")
    return texts


def test_figures_carry_alternative_text_in_the_committed_notebooks():
    for path in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        texts = alternative_texts(out for cell in cells for out in cell.outputs)
        assert texts and all(len(text) >= 20 for text in texts), path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_code_cell_fits_a_laptop(path: Path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    wide = [line for cell in cells for line in cell.source.splitlines() if len(line) > 88]
    assert not wide


def test_the_list_of_figures_names_each_file_and_the_notebook_that_draws_it():
    listed = {}
    for line in (REPOSITORY / "figures" / "README.md").read_text().splitlines():
        if found := re.match(r"\| `(\w+)` \| \[\d\d\]\(\.\./notebooks/(\w+)\.ipynb\)", line):
            listed[found[1]] = found[2]
    drawn = {}
    for path in NOTEBOOKS:
        for name in re.findall(r'figures / \\"(\w+)\.png', path.read_text("utf-8")):
            drawn[name] = path.stem
    assert listed == drawn
    files = {path.stem for path in (REPOSITORY / "figures").glob("*.png")}
    assert files == set(listed)
