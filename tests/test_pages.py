"""The notebooks as pages that need no network, opened in a real browser from files."""

from __future__ import annotations

import nbformat
import pytest

from mmedpo_utils.programs import export_pages
from mmedpo_utils.programs.export_pages import with_mathml

from .conftest import REPOSITORY

NOTEBOOKS = sorted(path.stem for path in (REPOSITORY / "notebooks").glob("[0-9]*.ipynb"))


def test_formulas_become_mathml_and_code_and_prices_stay():
    text = with_mathml("The $x^*$ costs `$5` and $y$.\n\n$$a \\odot b$$\n\n```\n$z$\n```")
    assert text.count("<math") == 3 and 'display="block"' in text
    assert "`$5`" in text and "```\n$z$\n```" in text
    assert with_mathml("5 $ or 6 $ and no formula") == "5 $ or 6 $ and no formula"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    assert export_pages.main(["--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebooks_page_works_from_a_file_alone(tab, pages, name):
    """The tab fails the test where a script fails or a host is asked for anything."""
    tab.goto(f"file://{pages / name}.html")
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", 4)
    views = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            views += "data-view=" in "".join(output.get("data", {}).get("text/html", ""))
    tab.wait_for_load_state("load")
    tab.wait_for_function(
        "(count) => document.querySelectorAll('[data-live]').length == count", arg=views
    )
    assert tab.get_by_text("The live view did not start").count() == 0
    formulas = sum("$" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert (tab.locator("math").count() > 0) == (formulas > 0)
    broken = tab.locator("img").evaluate_all(
        "(images) => images.filter((image) => !image.naturalWidth).map((image) => image.src)"
    )
    assert not broken
    linked = tab.locator("a").evaluate_all("(all) => all.map((one) => one.getAttribute('href'))")
    beside = {link.partition("#")[0] for link in linked if link and "/" not in link} - {""}
    texts = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    named = {stem for stem in NOTEBOOKS if f"({stem}.ipynb" in texts}
    assert beside == {f"{stem}.html" for stem in named}


def test_a_folder_without_notebooks_is_one_sentence(tmp_path, capsys):
    assert export_pages.main(["--notebooks", str(tmp_path), "--output", str(tmp_path / "o")]) != 0
    assert "holds no notebook" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
