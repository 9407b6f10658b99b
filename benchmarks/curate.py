"""What curation costs beside its network: ``python benchmarks/curate.py``. Writes
``benchmarks/results/curate.json``.

Three ways through the same films with the same network of the official sizes (random weights: they
cost as much):

- forward: the bare batched forward, on tensors that are ready in memory;
- curation: ``curate_folder`` as a reader runs it: decoding, forward, mask, noise, PNG files,
  journal, manifest, audit;
- released: the released script's way of working: one film at a time, from opening it to writing its
  copy. Its noise and its PNG compression are ours, so that only the way of working differs.

They take turns, round by round; the ratios are medians over the rounds. Memory is the peak of a
process of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from memory import peak_resident_bytes
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mmedpo_utils.base.environment import provenance  # noqa: E402
from mmedpo_utils.base.files import write_json  # noqa: E402
from mmedpo_utils.base.images import open_image  # noqa: E402
from mmedpo_utils.base.rows import Row  # noqa: E402
from mmedpo_utils.convert.medklip_official import OFFICIAL_QUERIES  # noqa: E402
from mmedpo_utils.medklip import MedKLIP, MedKLIPConfig, confidence, heat_map  # noqa: E402
from mmedpo_utils.noise import noise_mask, noised_pixels  # noqa: E402
from mmedpo_utils.pairs import medklip_tool  # noqa: E402
from mmedpo_utils.phantom.world import films  # noqa: E402
from mmedpo_utils.profiles import load_profile  # noqa: E402
from mmedpo_utils.scale.resumable_curation import PNG, curate_folder  # noqa: E402

CORES = 2
BATCH_SIZE = 32
MEMORY_SIZE = 256  # height and width of the memory runs' films, in pixels
PATIENTS = 16
NOISE = load_profile("phantom").noise


def draw_films(folder: Path, count: int, size: int) -> list[Row]:
    """Write ``count`` grey films of ``size`` x ``size`` pixels, with a detector's grain, and ask
    one question about each.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    drawn = []
    for film in films(PATIENTS, seed=0):
        resized = Image.fromarray(film.image).resize((size, size), Image.Resampling.BICUBIC)
        drawn.append(np.asarray(resized))
    questions = []
    for number in range(count):
        name = f"{number:05d}.png"
        # Grain of its own for each: no two files are equal, and none compresses too well.
        grainy = drawn[number % PATIENTS] + rng.normal(0, 3, (size, size))
        pixels = np.clip(np.round(grainy), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
        question = {
            "question_id": number,
            "image": name,
            "gpt4_answer": "yes",
            "text": "<image>\nIs there a lesion?",
        }
        questions.append(question)
    return questions


def official_network() -> MedKLIP:
    """MedKLIP of the official sizes with random weights."""
    torch.manual_seed(0)
    model = MedKLIP(MedKLIPConfig(OFFICIAL_QUERIES, ()))
    book = model.disease_book
    assert isinstance(book, torch.Tensor)
    book.normal_(0, 0.5)
    return model.eval().requires_grad_(False)


def one_at_a_time(model: MedKLIP, questions: list[Row], images: Path, noised: Path) -> None:
    """The released script's loop: each film is opened, looked at alone, noised and written before
    the next.
    """
    noised.mkdir()
    for question in questions:
        image = open_image(images / question["image"])
        with torch.inference_mode():
            output = model(model.preprocess([image]))
        rng = np.random.default_rng(question["question_id"])
        pixels = np.asarray(image)
        heat = heat_map(output)[0].numpy()
        mask = noise_mask(heat, pixels.shape[:2], NOISE.kind, NOISE.mask, NOISE.quantile)
        copy = noised_pixels(pixels, mask, NOISE.kind, NOISE.signal, rng)
        Image.fromarray(copy).save(noised / question["image"], **PNG)
        question["weighted_score"] = float(confidence(output)[0])


@torch.inference_mode()
def bare_forward(model: MedKLIP, pixels: torch.Tensor) -> None:
    """The network on ready tensors [N, 3, 224, 224], in the batches of the curation."""
    for batch in pixels.split(BATCH_SIZE):
        model(batch)


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """How long ``work`` takes on its arguments."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def measure_time(count: int, size: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each way through ``count`` films, one value per round."""
    images = folder / "images"
    questions = draw_films(images, count, size)
    model = official_network()
    ready = [model.preprocess([open_image(images / item["image"])]) for item in questions]
    pixels = torch.cat(ready)
    look = medklip_tool(model)
    taken: dict[str, list[float]] = {"forward": [], "curation": [], "released": []}
    bare_forward(model, pixels[:BATCH_SIZE])  # to warm up
    for number in range(rounds):
        target = folder / f"round-{number}"
        forward = seconds(bare_forward, model, pixels)
        curation = seconds(
            curate_folder, questions, images, target, look, NOISE, 0, BATCH_SIZE, "benchmark"
        )
        released = seconds(one_at_a_time, model, questions, images, target / "alone")
        taken["forward"].append(forward)
        taken["curation"].append(curation)
        taken["released"].append(released)
    return taken


def median_ratio(one: list[float], other: list[float]) -> float:
    """The median over the rounds of one way's seconds by another's of the same round."""
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)


def measure_memory(count: int, folder: Path) -> int:
    """Peak resident bytes of a process that curates ``count`` films of 256 x 256 pixels."""
    own_folder = str(folder / f"memory-{count}")
    command = [sys.executable, __file__, "--memory-of", str(count), "--folder", own_folder]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(printed.split()[-1])


def curate_and_print_peak(count: int, folder: Path) -> None:
    """What the process of ``measure_memory`` does."""
    images = folder / "images"
    questions = draw_films(images, count, MEMORY_SIZE)
    look = medklip_tool(official_network())
    curate_folder(questions, images, folder / "pairs", look, NOISE, 0, BATCH_SIZE, "benchmark")
    print(peak_resident_bytes())


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400, help="films of the timing")
    parser.add_argument("--size", type=int, default=512, help="their height and width in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is timed")
    parser.add_argument(
        "--memory-images",
        type=int,
        nargs=2,
        default=(200, 2000),
        help="films of the two memory runs",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "curate.json"
    )
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(CORES)
    if arguments.memory_of:
        curate_and_print_peak(arguments.memory_of, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        peaks = [measure_memory(count, Path(folder)) for count in arguments.memory_images]
        taken = measure_time(arguments.images, arguments.size, arguments.rounds, Path(folder))
    result = {
        "ratio_to_forward": median_ratio(taken["curation"], taken["forward"]),
        "ratio_to_released": median_ratio(taken["curation"], taken["released"]),
        "memory_ratio": round(peaks[1] / peaks[0], 3),
        "seconds": {way: np.round(values, 2).tolist() for way, values in taken.items()},
        "images": arguments.images,
        "size": arguments.size,
        "batch_size": BATCH_SIZE,
        "noise": NOISE.kind,
        "memory": {
            "images": list(arguments.memory_images),
            "size": MEMORY_SIZE,
            "peak_bytes": peaks,
        },
        **provenance(
            processor=platform.machine(),
            system=platform.system(),
            cores_used=torch.get_num_threads(),
        ),
    }
    write_json(arguments.output, result)
    print(
        f"curation: {result['ratio_to_forward']} times the bare forward, "
        f"{result['ratio_to_released']} times the released way; peak memory "
        f"{result['memory_ratio']} times; {arguments.output.name} written"
    )


if __name__ == "__main__":
    main()
