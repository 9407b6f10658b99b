"""The views inside JupyterLab: they start in a live kernel, keep their keys, and a notebook that is
not trusted shows the still picture.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.processes import free_port

from .conftest import CHROMIUM
from .test_views import changes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

CELL = """import numpy as np, torch
from PIL import Image
from mmedpo_utils.medklip import MedKLIPOutput
from mmedpo_utils.show.attention_view import medklip_view
rng = np.random.default_rng(0)
films = [Image.fromarray(rng.integers(0, 256, (224, 224), dtype=np.uint8)) for _ in range(3)]
maps = torch.tensor(rng.normal(size=(3, 2, 2, 2, 196))).softmax(-1)
output = MedKLIPOutput(("nodule", "disease"), torch.zeros(3, 2, 2), maps, torch.zeros(3, 2, 4))
medklip_view(films, output, ["axe", "bee", "cat"])"""


OWN = """from mmedpo_utils.lvlm import load_lvlm
from mmedpo_utils.medklip import load_medklip
from mmedpo_utils.show.own_view import own_view
own_view({"base": load_lvlm("phantom", "cpu")}, load_medklip("phantom"), 8)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A server on loopback with an empty home of its own; its address and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    port, token = free_port(), secrets.token_hex(8)
    environment = os.environ | {"HOME": str(folder), "JUPYTER_CONFIG_DIR": str(folder / "config")}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", f"--IdentityProvider.token={token}", f"--notebook-dir={folder}"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api?token={token}", timeout=1)
            break
        except OSError:
            time.sleep(0.5)
    yield f"{address}/lab/tree/{{}}?token={token}&reset", folder
    server.terminate()
    server.wait(20)


def opened(browser, lab, name: str, cells: list):
    """The notebook ``name`` in JupyterLab, and the hosts beside loopback that its page asks."""
    address, folder = lab
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / name)
    page = browser.new_page(viewport={"width": 1366, "height": 900})
    elsewhere: list[str] = []

    def asked(request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            elsewhere.append(request.url)

    page.on("request", asked)
    page.goto(address.format(name))
    page.wait_for_selector(".jp-Cell", timeout=60_000)
    return page, elsewhere


def closed(page, lab, name: str) -> None:
    """Keep what the page shows in the end as a picture beside the notebook, and close it."""
    page.screenshot(path=lab[1] / f"{name}.png")
    page.close()


def test_a_view_starts_in_a_live_kernel_and_keeps_its_keys(browser, lab):
    page, elsewhere = opened(browser, lab, "live.ipynb", [nbformat.v4.new_code_cell(CELL)])
    # What is run before the kernel is there is lost.
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    page.locator(".jp-Cell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector("[data-live] canvas", timeout=120_000)
    cells = page.locator(".jp-Cell").count()
    film = page.locator("[data-live] select").first
    assert changes(page, lambda: film.select_option("bee"))
    for control in page.locator("[data-live] :is(select, input[type=range], [role=radio])").all():
        control.focus()
        for key in ("x", "a", "b", "d", "d", "ArrowDown"):
            page.keyboard.press(key)
    assert page.locator(".jp-Cell").count() == cells, "no key has cut or inserted a cell"
    assert page.locator("[data-live]").count() == 1
    film.focus()
    page.keyboard.type("ax")
    assert film.input_value() == "axe"
    assert not elsewhere
    closed(page, lab, "live")


def test_a_notebook_that_is_not_trusted_shows_the_still_picture(browser, lab):
    namespace: dict = {}
    body, _, last = CELL.rpartition("\n")
    exec(body, namespace)
    view = eval(last, namespace)
    data, _ = view._repr_mimebundle_()
    output = nbformat.v4.new_output("execute_result", data, execution_count=1)
    cell = nbformat.v4.new_code_cell(CELL, outputs=[output], execution_count=1)
    page, elsewhere = opened(browser, lab, "untrusted.ipynb", [cell])
    page.wait_for_selector(".jp-OutputArea img", timeout=30_000)
    assert page.locator("[data-live]").count() == 0
    assert page.locator(".jp-OutputArea img").first.bounding_box()["width"] > 300
    assert not elsewhere
    closed(page, lab, "untrusted")


def test_ones_own_film_is_asked_by_the_form(browser, lab):
    _, folder = lab
    film = np.random.default_rng(0).integers(0, 256, (300, 200), dtype=np.uint8)
    Image.fromarray(film).save(folder / "mine.png")
    page, elsewhere = opened(browser, lab, "own.ipynb", [nbformat.v4.new_code_cell(OWN)])
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    page.locator(".jp-Cell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    path = page.get_by_label("path")
    path.wait_for(timeout=120_000)
    cells = page.locator(".jp-Cell").count()
    path.fill("mine.png")
    page.get_by_label("question").fill("Is there an axe?")
    page.get_by_role("button", name="ask").click()
    page.wait_for_function("() => document.querySelectorAll('[data-live]').length == 2")
    assert page.locator("[data-live] canvas").count() > 4
    question = page.locator("[data-live]").last.locator(".note").first.inner_text()
    assert "Is there an axe?" in question
    path.fill("absent.png")
    page.get_by_role("button", name="ask").click()
    page.get_by_text("absent.png: cannot be opened as an image").wait_for(timeout=30_000)
    assert page.locator("[data-live]").count() == 0
    assert page.locator(".jp-Cell").count() == cells and not elsewhere
    closed(page, lab, "own")
