"""What a training step costs on one GPU: ``python benchmarks/gpu_step.py``. Writes
``benchmarks/results/gpu_step.json``.

A LLaVA of LLaVA-Med-1.5's shape with random weights (they cost as much) is trained as the paper
does, with LoRA of rank 128 and gradient checkpointing, one pair at a time: in bf16, and in 4 bits
(NF4, double quantisation, paged 8-bit AdamW). Stock ``trl.DPOTrainer`` and ``MMedPOTrainer`` take
the same pairs, each in a process of its own:

- text: text pairs, the reference recomputed on both sides; ours also with FlexAttention, which
  trains on GPUs only;
- mixed: text and visual pairs by turns, three epochs; ours computes the reference once, and that is
  in its time.

Model FLOP utilisation is what a pair needs at least (`flops.pair_flops`, the same for both sides)
per second, over the card's dense bf16 peak. The random checkpoint takes 15 GB of the temporary
folder (TMPDIR). On another machine ``--device cpu --shape tiny`` walks the same code.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import MAX_LENGTH, ROOT, SHAPES, Job, Shape, Worker, draw_pairs, origin, save_lvlm
from flops import pair_flops
from transformers import LlavaProcessor

from mmedpo_utils.base.files import write_json
from mmedpo_utils.preference_rows import read_manifest
from mmedpo_utils.trainer import preference_dataset

# Dense bf16 TFLOPS of the makers' data sheets, by what torch calls the card.
PEAKS = {
    "H100 80GB HBM3": 989,
    "H200": 989,
    "A100": 312,
    "RTX A6000": 155,
    "L4": 121,
    "RTX 4090": 165,
}
EPOCHS = 3
WARM_UP = 2  # steps


def peak_tflops(card: str) -> int | None:
    """The card's dense bf16 peak; None where it is not known."""
    for name, peak in PEAKS.items():
        if re.search(rf"\b{name}\b", card):
            return peak
    return None


def methods(device: str, rank: int) -> dict[str, Job]:
    """Stock TRL on text pairs, by method."""
    bf16 = Job(
        side="trl",
        data="text",
        pairs=20,
        epochs=1,
        batch_size=1,
        lora_rank=rank,
        learning_rate=1e-6,
        device=device,
        gradient_checkpointing=True,
    )
    optimizer = "paged_adamw_8bit" if device == "cuda" else "adamw_torch"
    qlora = replace(bf16, quantization="nf4", optimizer=optimizer)
    return {"bf16_lora": bf16, "qlora": qlora}


def sides(text: Job) -> dict[str, dict[str, Job]]:
    """The configurations of a method, by data and side."""
    ours = replace(text, side="ours")
    on_text = {"trl": text, "ours": ours}
    if text.device == "cuda":
        on_text["ours_flex_attention"] = replace(ours, attention="flex_attention")
    mixed = replace(text, data="mixed", pairs=8, epochs=EPOCHS)
    on_mixed = {"trl": mixed, "ours": replace(mixed, side="ours", cache_reference=True)}
    return {"text": on_text, "mixed": on_mixed}


def least_flops(job: Job, shape: Shape, folder: Path) -> float:
    """What a pair of the job's data needs at least, on average over its pairs."""
    data = folder / job.data
    rows = read_manifest(data / "pairs.json")[: job.pairs]
    processor = LlavaProcessor.from_pretrained(folder / "model")
    weights = [1.0] * len(rows)
    pairs = preference_dataset(
        rows, weights, processor, data / "images", data / "noised", MAX_LENGTH
    )
    # The reference has to be computed once, however often a pair is seen.
    references = 1 / job.epochs
    needed = []
    for pair in pairs:
        prompt = len(pair["prompt_ids"])
        answers = (len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        flops = pair_flops(shape, prompt, answers, pair["visual"], job.lora_rank, references)
        needed.append(flops)
    return statistics.mean(needed)


def seconds_per_pair(job: Job, taken: dict[str, Any]) -> float:
    """Steps (the median of the odd and of the even ones: text and visual pairs come by turns) and
    the reference's share.
    """
    steps = taken["step_seconds"][WARM_UP:]
    step = (statistics.median(steps[::2]) + statistics.median(steps[1::2])) / 2
    return step / job.batch_size + taken["ahead_seconds"] / (job.pairs * job.epochs)


def measure(name: str, job: Job, folder: Path, flops: float, peak: int | None) -> dict[str, Any]:
    """One training in a process of its own; the ``error`` alone where it fails, as where the GPU's
    memory is not enough.
    """
    try:
        worker = Worker(name, job, folder, torch.get_num_threads())
        taken = worker.run()
        worker.close()
    except RuntimeError as error:
        return {"error": str(error).strip().splitlines()[-1]}
    seconds = seconds_per_pair(job, taken)
    utilisation = None
    if peak is not None:
        utilisation = round(flops / seconds / (peak * 1e12), 4)
    return {
        "seconds_per_pair": round(seconds, 4),
        "peak_gib": round(taken["peak_bytes"] / 2**30, 2),
        "model_flop_utilisation": utilisation,
        "step_seconds": [round(step, 4) for step in taken["step_seconds"]],
        "ahead_seconds": round(taken["ahead_seconds"], 3),
        "losses": [round(loss, 5) for loss in taken["losses"]],
    }


def measure_all(shape: Shape, device: str, rank: int, card: str, folder: Path) -> dict[str, Any]:
    """Every configuration's numbers, by method, data and side, and the ratios between the sides."""
    saving = multiprocessing.get_context("spawn").Process(
        target=save_lvlm, args=(folder / "model", shape, device)
    )
    saving.start()  # in its own process, which gives the GPU's memory back
    saving.join()
    results: dict[str, Any] = {}
    for method, text in methods(device, rank).items():
        for data, jobs in sides(text).items():
            if not (folder / data).is_dir():
                draw_pairs(folder / data, jobs["trl"], shape)
            flops = least_flops(jobs["trl"], shape, folder)
            found: dict[str, dict[str, Any]] = {}
            for side, job in jobs.items():
                name = f"{method}-{data}-{side}"
                found[side] = measure(name, job, folder, flops, peak_tflops(card))
                seconds = found[side].get("seconds_per_pair", found[side].get("error"))
                print(name, seconds, flush=True)
            results.setdefault(method, {})[data] = {
                "ratio": _ratio(found["trl"], found["ours"]),
                "tflop_per_pair": round(flops / 1e12, 6),
                **found,
            }
    return results


def _ratio(trl: dict[str, Any], ours: dict[str, Any]) -> float | None:
    """Stock TRL's seconds by ours; None where one of them failed."""
    if "error" in trl or "error" in ours:
        return None
    return round(trl["seconds_per_pair"] / ours["seconds_per_pair"], 3)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), default="llava-med-1.5", help="sizes of the network"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to train")
    parser.add_argument("--lora-rank", type=int, default=128, help="rank of the adapter")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_step.json"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --shape tiny walks the same code")
    card = torch.cuda.get_device_name(0) if options.device == "cuda" else "CPU"
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as folder:
        results = measure_all(shape, options.device, options.lora_rank, card, Path(folder))
    model = {
        "shape": options.shape,
        **asdict(shape),
        "image_tokens": shape.image_tokens,
        "lora_rank": options.lora_rank,
        "gradient_checkpointing": True,
        "batch_size": 1,
        "epochs_of_mixed": EPOCHS,
    }
    written = {
        "device": card,
        "peak_dense_bf16_tflops": peak_tflops(card),
        "results": results,
        "warm_up_steps": WARM_UP,
        "model": model,
        **origin(os.cpu_count()),
    }
    write_json(options.output, written)
    print(f"{options.output.name} written")


if __name__ == "__main__":
    main()
