"""From a control to the picture, in a real browser: ``python benchmarks/view_latency.py``. Writes
``results/view_latency.json``.

Each view is taken from the committed notebooks, and opened from a file in Chromium without a
window, as an exported page is. A change is one step of a slider or one option of a choice. Its time
runs from the control's event to the end of the frame in which the view has drawn: the script, and
the wait for the frame. All of it happens in the browser; no kernel is asked.

The kernel is asked by the form for one's own film: from the press of its button until MedKLIP's
view is made, and until the answers of two Med-LVLMs, both the shipped one, are made too. 40
phantom films, one question.

What the kernel does for a large network is measured for the token grid of LLaVA-Med (24 x 24 image
tokens, 32 layers, 32 heads; random weights, a narrow network): one answer of 8 tokens, in a process
of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import torch
from common import ROOT, Shape, origin, save_lvlm
from memory import peak_resident_bytes
from PIL import Image
from playwright.sync_api import Page as Tab
from playwright.sync_api import sync_playwright

from mmedpo_utils.base.files import write_json
from mmedpo_utils.lvlm import load_lvlm
from mmedpo_utils.medklip import load_medklip
from mmedpo_utils.phantom.world import films
from mmedpo_utils.show import own_view
from mmedpo_utils.show.answer_attention import read_answer
from mmedpo_utils.show.pages import BROWSER

# Each view, the notebook that shows it, and the controls that are moved.
VIEWS = {
    "medklip": (
        "01_medklip_attention",
        ["film", "finding", "threshold", "opacity", "mask", "signal"],
    ),
    "noise": ("02_lesion_noise", ["question", "noise on", "signal", "seed"]),
    "pairs": ("03_preference_pairs", ["source", "relevance", "pair", "wipe"]),
    "training": ("04_dpo_training", ["quantity", "mean of steps", "step"]),
    "answer": ("05_evaluation", ["question", "layer", "head", "threshold", "opacity"]),
    "cases": ("05_evaluation", ["case", "attention of", "opacity", "type"]),
}
CHANGES = 40
MAX_NEW_TOKENS = 64
ANSWER_TOKENS = 8
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
MEASURE = """async ([label, changes]) => {
    const holds = (one) => one.textContent.startsWith(label);
    const control = [...document.querySelectorAll("label")].find(holds)
        .querySelector("select, input");
    const frame = () => new Promise(requestAnimationFrame);
    const times = [];
    for (let n = 0; n < changes; n += 1) {
        await frame();
        await frame();
        const begun = performance.now();
        if (control.tagName === "SELECT") {
            control.selectedIndex = (control.selectedIndex + 1) % control.options.length;
            control.dispatchEvent(new Event("change"));
        } else {
            const [low, high] = [Number(control.min), Number(control.max)];
            control.value = low + ((high - low) * (n % 20)) / 19;
            control.dispatchEvent(new Event("input"));
        }
        await frame();
        // A task after the frame: what the frame drew is done.
        await new Promise((done) => setTimeout(done));
        times.push(performance.now() - begun);
    }
    return times;
}"""


def view_of(notebook: str, view: str) -> str:
    """The output that holds a view: the one with the first line of its script."""
    head = (BROWSER / f"{view}.js").read_text("utf-8").splitlines()[0]
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    for output in (output for cell in cells for output in cell.get("outputs", ())):
        text = output.get("data", {}).get("text/html", "")
        if head in text:
            return text
    raise SystemExit(f"notebooks/{notebook}.ipynb: no output holds the view {view}; run it first")


def large_answer() -> dict[str, float]:
    """Seconds and peak GiB of reading one answer of a network with LLaVA-Med's token grid."""
    shape = Shape(512, 1024, 32, 32, 8, 640, 96, 384, 3, 2)
    film = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336), dtype=np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        save_lvlm(Path(folder) / "lvlm", shape, "cpu")
        lvlm = load_lvlm(str(Path(folder) / "lvlm"), "cpu")
        begun = time.perf_counter()
        reading = read_answer(lvlm, film.convert("RGB"), "w1 w2", ANSWER_TOKENS)
        seconds = time.perf_counter() - begun
    return {
        "tokens": len(reading.words),
        "seconds": round(seconds, 1),
        "peak_gib": round(peak_resident_bytes() / 2**30, 2),
    }


def own_films(folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds from "ask" to each of the two views, over ``CHANGES`` films."""
    lvlm = load_lvlm("phantom", "cpu")
    made: list[float] = []
    own_view.display = lambda _: made.append(time.perf_counter())
    form = own_view.own_view({"base": lvlm, "again": lvlm}, load_medklip("phantom"), MAX_NEW_TOKENS)
    path, _, _, ask = form.children[1].children
    times: dict[str, list[float]] = {"medklip": [], "medklip_and_answers": []}
    for number, film in enumerate(films(CHANGES + 1, seed=0)):
        path.value = str(folder / f"{number}.png")
        Image.fromarray(film.image).save(path.value)
        made.clear()
        begun = time.perf_counter()
        ask.click()
        if number:  # the first one warms up
            for name, end in zip(times, made, strict=True):
                times[name].append(1000 * (end - begun))
    return {name: summary(found) for name, found in times.items()}


def summary(times: list[float]) -> dict[str, float]:
    """Median, 95th percentile and number of some milliseconds."""
    middle, high = statistics.median(times), float(np.quantile(times, 0.95))
    return {"median_ms": round(middle, 1), "p95_ms": round(high, 1), "changes": len(times)}


def measured(tab: Tab, labels: list[str]) -> list[float]:
    """Milliseconds of ``CHANGES`` changes, spread over the controls."""
    each = -(-CHANGES // len(labels))
    times: list[float] = []
    for label in labels:
        times += tab.evaluate(MEASURE, [label, each])
    return times[:CHANGES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT / "benchmarks" / "results" / "view_latency.json"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("Chromium is not installed (Debian: apt install chromium)")
    found = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, (notebook, labels) in VIEWS.items():
            text = f'<!doctype html><meta charset="utf-8">{view_of(notebook, name)}'
            (Path(folder) / f"{name}.html").write_text(text, encoding="utf-8")
            tab = browser.new_page(viewport={"width": 1366, "height": 900})
            tab.goto(f"file://{folder}/{name}.html")
            tab.wait_for_selector("[data-live] :is(canvas, svg)")
            found[name] = summary(measured(tab, labels))
            print(name, found[name], flush=True)
            tab.close()
        version = browser.version
        browser.close()
        load = os.getloadavg()[0]
        own = own_films(Path(folder))
    print("own film", own, flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        answer = pool.submit(large_answer).result()
    print("LLaVA-Med's grid", answer, flush=True)
    result = {**origin(torch.get_num_threads()), "chromium": version, "load": round(load, 2)}
    result |= {"views": found, "own_film": own, "answer_of_llava_meds_grid": answer}
    write_json(options.output, result)


if __name__ == "__main__":
    main()
