"""What a training step costs beside TRL's own trainer: ``python benchmarks/train_step.py``. Writes
``results/train_step.json``.

A random LLaVA (CLIP tower of 576 image tokens, Mistral) is trained with LoRA in float32 on the CPU,
by stock ``trl.DPOTrainer`` with its own vision collator and data format, and by ``MMedPOTrainer``:
same weights, pairs, order, learning rate, optimiser.

- text: text pairs, once through, the reference recomputed at every step on both sides;
- mixed: text and visual pairs by turns, three epochs. TRL's collator is taught to carry the second
    image, no more; its vision
  path cannot compute the reference ahead. Ours computes it once, and that is in its time;
- lengths: text pairs, short answers and reports by turns, ours alone, in their own order and
    grouped by length.

A time is that of the data set, the trainer, the reference and all steps; the model is loaded before
it begins. Each configuration is a process of its own; those of one group take turns, round by
round, and a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, SHAPES, Job, Shape, Worker, draw_pairs, origin, save_lvlm
from flops import head_flops, layers_flops, tower_flops

from mmedpo_utils.base.files import write_json

CORES = 2
SWITCHES = {
    "shared_prefix": ("text", "without_shared_prefix"),
    "cache_reference": ("mixed", "without_cache"),
    "group_by_length": ("lengths", "without_grouping"),
}
MEASURED_ON = {
    "text": "text pairs, the reference recomputed",
    "mixed": "text and visual pairs, three epochs",
    "lengths": "text pairs, short answers and reports by turns",
}


@dataclass(frozen=True)
class Size:
    """How much is measured: pairs of each group, and rounds."""

    shape: str
    text_pairs: int
    mixed_pairs: int
    length_pairs: int
    batch_size: int
    length_batch_size: int
    lora_rank: int
    rounds: int


SIZES = {"full": Size("small", 16, 8, 24, 2, 2, 16, 3), "quick": Size("tiny", 4, 4, 8, 2, 2, 4, 1)}
EPOCHS, LEARNING_RATE = 3, 1e-3


def groups(size: Size) -> dict[str, dict[str, Job]]:
    """The configurations that take turns, by group and name."""
    text = Job("trl", "text", size.text_pairs, 1, size.batch_size, size.lora_rank, LEARNING_RATE)
    mixed = replace(text, data="mixed", pairs=size.mixed_pairs, epochs=EPOCHS)
    ours, cached = replace(text, side="ours"), replace(mixed, side="ours", cache_reference=True)
    lengths = replace(
        ours,
        data="lengths",
        pairs=size.length_pairs,
        batch_size=size.length_batch_size,
        group_by_length=True,
    )
    return {
        "text": {
            "trl": text,
            "ours": ours,
            "without_shared_prefix": replace(ours, shared_prefix=False),
        },
        "mixed": {
            "trl": mixed,
            "ours": cached,
            "without_cache": replace(cached, cache_reference=False),
        },
        "lengths": {"ours": lengths, "without_grouping": replace(lengths, group_by_length=False)},
    }


def measure(
    jobs: dict[str, Job], folder: Path, size: Size, threads: int
) -> dict[str, list[dict[str, Any]]]:
    """Every round's result of every job; each round begins with another job."""
    data = next(iter(jobs.values()))
    draw_pairs(folder / data.data, data, SHAPES[size.shape])
    workers: dict[str, Worker] = {}
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    try:
        for name, job in jobs.items():
            workers[name] = Worker(f"{job.data}-{name}", job, folder, threads)
        for number in range(size.rounds):
            names = list(jobs)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                taken[name].append(workers[name].run())
    finally:
        for worker in workers.values():
            worker.close()
    return taken


def ratio(slow: list[dict[str, Any]], fast: list[dict[str, Any]]) -> float:
    """How many times as many pairs per second ``fast`` makes, the median over the rounds."""
    return round(
        statistics.median(
            one["seconds"] / other["seconds"] for one, other in zip(slow, fast, strict=True)
        ),
        3,
    )


def loss_difference(taken: dict[str, list[dict[str, Any]]]) -> float:
    """The largest difference at any step of any round between a configuration's losses and
    TRL's.
    """
    if len({result["initial"] for results in taken.values() for result in results}) > 1:
        raise RuntimeError("the configurations did not begin with the same weights")
    return max(
        abs(one - other)
        for results in taken.values()
        for result, baseline in zip(results, taken["trl"], strict=True)
        for one, other in zip(result["losses"], baseline["losses"], strict=True)
    )


def shares(shape: Shape) -> dict[str, float]:
    """Vision tower and lm_head (at every position) over the language model's layers, in operations
    of a forward pass.
    """
    tokens = shape.image_tokens + 30
    layers = sum(layers_flops(shape, tokens, (), None).values())
    head = head_flops(shape, tokens, None)
    return {
        "vision_tower": round(tower_flops(shape) / layers, 4),
        "lm_head": round(head / layers, 4),
    }


def summary(taken: dict[str, dict[str, list[dict[str, Any]]]], size: Size) -> dict[str, Any]:
    """The result file's own numbers."""
    memory = {
        group: {name: results[0]["peak_bytes"] for name, results in taken[group].items()}
        for group in taken
    }
    passes = {
        "text": size.text_pairs,
        "mixed": size.mixed_pairs * EPOCHS,
        "lengths": size.length_pairs,
    }
    return {
        "text_ratio": ratio(taken["text"]["trl"], taken["text"]["ours"]),
        "mixed_ratio": ratio(taken["mixed"]["trl"], taken["mixed"]["ours"]),
        "switches": {
            name: ratio(taken[group][without], taken[group]["ours"])
            for name, (group, without) in SWITCHES.items()
        },
        "switches_measured_on": {name: MEASURED_ON[group] for name, (group, _) in SWITCHES.items()},
        "max_loss_difference": max(loss_difference(taken[group]) for group in ("text", "mixed")),
        "memory_ratio": round(
            max(memory[group]["ours"] / memory[group]["trl"] for group in ("text", "mixed")), 3
        ),
        "pairs_per_second": {
            group: {
                name: [round(passes[group] / result["seconds"], 3) for result in results]
                for name, results in taken[group].items()
            }
            for group in taken
        },
        "seconds": {
            group: {
                name: [round(result["seconds"], 2) for result in results]
                for name, results in taken[group].items()
            }
            for group in taken
        },
        "losses": {
            group: {
                name: [round(loss, 6) for loss in taken[group][name][0]["losses"]]
                for name in ("trl", "ours")
            }
            for group in ("text", "mixed")
        },
        "peak_bytes": memory,
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model, one round: does it run, do the losses agree?",
    )
    parser.add_argument("--rounds", type=int, help="how often each configuration is timed")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "train_step.json"
    )
    options = parser.parse_args()
    size = SIZES["quick" if options.quick else "full"]
    size = replace(size, rounds=options.rounds or size.rounds)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    threads = min(CORES, torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        save_lvlm(Path(folder) / "model", SHAPES[size.shape], "cpu")
        taken = {
            group: measure(jobs, Path(folder), size, threads)
            for group, jobs in groups(size).items()
        }
    result = {
        **summary(taken, size),
        "rounds": size.rounds,
        "learning_rate": LEARNING_RATE,
        "epochs_of_mixed": EPOCHS,
        "model": {
            **asdict(SHAPES[size.shape]),
            "image_tokens": SHAPES[size.shape].image_tokens,
            "precision": "float32",
            "lora_rank": size.lora_rank,
            "gradient_checkpointing": False,
        },
        "shares": {name: shares(SHAPES[name]) for name in (size.shape, "llava-med-1.5")},
        "pairs": {
            "text": size.text_pairs,
            "mixed": size.mixed_pairs,
            "lengths": size.length_pairs,
            "batch_size": size.batch_size,
            "batch_size_of_lengths": size.length_batch_size,
        },
        **origin(threads),
    }
    write_json(options.output, result)
    print(
        f"text pairs {result['text_ratio']} times TRL's pairs per second, text and visual "
        f"{result['mixed_ratio']} times; "
        f"losses differ by {result['max_loss_difference']:.1e} at most; peak memory "
        f"{result['memory_ratio']} times; "
        f"{options.output.name} written"
    )


if __name__ == "__main__":
    main()
