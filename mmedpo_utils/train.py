"""The training program: one variant, one seed. The deepspeed launcher starts it once per process, `launch` starts the launcher.

    python -m deepspeed.launcher.runner --num_accelerators 2 --module mmedpo_utils.train --profile P --variant V --run-folder R
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig

from .environment import versions
from .errors import InputError
from .files import write_json
from .lvlm import load_profile_lvlm, model_digest
from .manifests import read_manifest, row_source
from .profiles import Profile, Variant, check_device, load_profile
from .relevance import normalise
from .trainer import PROJECTOR, MMedPOTrainer, PreferenceCollator, preference_dataset

VALIDATION_SHARE = 0.1
VALIDATION_PAIRS = 64
LOGGED_STEPS = 250
FAILED = "=== a training process failed ==="


def run_digest(profile: Profile, variant: str, seed: int, manifest: Path) -> str:
    """SHA-256 (hexadecimal) of all that decides a run: the profile's sections, the variant, the seed, the manifest's bytes."""
    parts = [profile.digest("seed", "data", "visual_tool", "noise", "lvlm", "relevance", "training"), variant, str(seed),
             hashlib.sha256(manifest.read_bytes()).hexdigest()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def manifest_path(profile: Profile, variant: str) -> Path:
    """The preference manifest that ``variant`` trains on; notebook 03 writes train.json."""
    return profile.output / "pairs" / f"{profile.training.variants[variant].pairs}.json"


def training_weights(rows: Sequence[dict[str, Any]], variant: Variant, profile: Profile) -> np.ndarray:
    """Normalised relevance s' of every row; each source (text, visual) is normalised over its own scores. Shape: [N]."""
    sources, weights = np.array([row_source(row) for row in rows]), np.ones(len(rows))
    bounds = {key: getattr(profile.relevance, key) for key in ("mean", "variance", "low", "high")}
    for source in np.unique(sources):
        scores = [float(row["weighted_score"]) for row in rows if row_source(row) == source]
        weights[sources == source] = normalise(scores, variant.weights, **bounds)
    return weights


def held_out(rows: Sequence[dict[str, Any]], seed: int) -> np.ndarray:
    """Choose validation pairs: about a tenth of the patients (of the images, where patients are not named), 64 pairs at most.

    No patient is on both sides. With fewer than ten patients nothing is held out.

    Returns:
        True where a row is for validation. Shape: [N].
    """
    patients = np.array([str(row.get("patient_id", row["image"])) for row in rows])
    names = np.unique(patients)
    share = min(VALIDATION_SHARE, VALIDATION_PAIRS / len(rows))
    return np.isin(patients, np.random.default_rng(seed).permutation(names)[: int(share * len(names))])


def deepspeed_config(zero_stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration; "auto" values follow the trainer's arguments."""
    stage = {"stage3_gather_16bit_weights_on_model_save": True} if zero_stage == 3 else {"reduce_bucket_size": 50_000_000}
    return {"zero_optimization": {"stage": zero_stage, **stage}, "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": "auto"}, "gradient_clipping": "auto", "gradient_accumulation_steps": "auto",
            "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}


def training_arguments(profile: Profile, variant: Variant, seed: int, folder: Path, validate: bool) -> DPOConfig:
    """The trainer's arguments. The global batch stays the profile's, however many processes really run."""
    values, world = profile.training, int(os.environ.get("WORLD_SIZE", 1))
    cuda = check_device(profile.lvlm.device) == "cuda"
    return DPOConfig(
        output_dir=str(folder), seed=seed, beta=values.beta, loss_type="sft" if variant.objective == "sft" else "sigmoid",
        learning_rate=values.learning_rate, lr_scheduler_type=values.scheduler, max_steps=values.max_steps,
        warmup_steps=math.ceil(values.warmup_ratio * values.max_steps), max_length=values.max_length,
        bf16=values.precision == "bf16", disable_dropout=False,
        per_device_train_batch_size=values.per_device_batch_size, per_device_eval_batch_size=2 * values.per_device_batch_size,
        gradient_accumulation_steps=max(1, values.gradient_accumulation_steps * values.processes // world),
        gradient_checkpointing=cuda, use_cpu=not cuda, dataloader_pin_memory=cuda, remove_unused_columns=False,
        eval_strategy="steps" if validate else "no", eval_steps=values.validation_every,
        logging_steps=max(1, values.max_steps // LOGGED_STEPS), save_strategy="no", report_to="none", disable_tqdm=True,
        deepspeed=deepspeed_config(values.zero_stage) if world > 1 else None)


class EventWriter(TrainerCallback):
    """Append one JSON line per logged step to ``events.jsonl``: what the live plot draws."""

    def __init__(self, folder: Path, pairs_per_step: int) -> None:
        self.path, self.pairs_per_step, self.began = folder / "events.jsonl", pairs_per_step, time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start the clock at the first step."""
        if state.global_step == 0:
            self.began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        """Write a training event, or a validation event whose values are named ``validation_*``."""
        logs = logs or {}
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        seconds, step = time.monotonic() - self.began, state.global_step
        event = {"step": step, "total_steps": state.max_steps, "seconds": round(seconds, 2),
                 "seconds_left": round(seconds / max(step, 1) * (state.max_steps - step), 1),
                 "pairs_per_second": round(step * self.pairs_per_step / max(seconds, 1e-9), 2)}
        event |= {key.replace("eval_", "validation_"): float(value) for key, value in logs.items()
                  if not key.endswith(("runtime", "per_second")) and np.isfinite(value)}
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")


def build_trainer(profile: Profile, variant: Variant, seed: int, folder: Path, rows: Sequence[dict[str, Any]]) -> MMedPOTrainer:
    """Model, LoRA, data and arguments put together. ``rows`` are the variant's pairs, validation pairs among them."""
    weights, validation = training_weights(rows, variant, profile), held_out(rows, seed)
    arguments = training_arguments(profile, variant, seed, folder, bool(validation.any()))
    values, nf4 = profile.training, profile.lvlm.quantization == "nf4"
    lvlm = load_profile_lvlm(profile, device=profile.lvlm.device if nf4 else "cpu")

    def dataset(chosen: np.ndarray) -> Any:
        return preference_dataset([row for row, keep in zip(rows, chosen) if keep], weights[chosen], lvlm.processor,
                                  profile.image_root, profile.output / "pairs" / "noised", values.max_length)

    trainer = MMedPOTrainer(
        lvlm.model, projector_learning_rate=values.projector_learning_rate, args=arguments,
        reference_cache=profile.output / "reference" / f"{model_digest(lvlm.model)[:16]}.json",
        train_dataset=dataset(~validation), eval_dataset=dataset(validation) if validation.any() else None,
        data_collator=PreferenceCollator(lvlm.processor.tokenizer.pad_token_id, values.max_length, processor=lvlm.processor),
        processing_class=lvlm.processor,
        peft_config=LoraConfig(r=values.lora_rank, lora_alpha=values.lora_alpha, lora_dropout=values.lora_dropout,
                               target_modules="all-linear", modules_to_save=[PROJECTOR],
                               exclude_modules=rf".*(vision_tower|{PROJECTOR}).*"),
        callbacks=[EventWriter(folder, arguments.train_batch_size * arguments.gradient_accumulation_steps
                               * arguments.world_size)])
    trainer.remove_callback(PrinterCallback)
    return trainer


def save_adapter(trainer: MMedPOTrainer, folder: Path) -> None:
    """Write the adapter (LoRA and projector, safetensors, PEFT's format) to ``folder``, whole or not at all."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        draft = folder.with_name(".adapter")
        trainer.model.save_pretrained(draft, state_dict=state)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)


def run(profile: Profile, name: str, seed: int, folder: Path) -> None:
    """Train variant ``name`` and fill the run folder; ``result.json`` is written last.

    Raises:
        InputError: the manifest or an image cannot be used, or no pair is of the variant's sources.
    """
    began, variant, manifest = time.monotonic(), profile.training.variants[name], manifest_path(profile, name)
    rows = [row for row in read_manifest(manifest) if row_source(row) in variant.sources]
    if not rows:
        raise InputError(f"{manifest}: has no pairs of the sources {', '.join(variant.sources)} that variant {name!r} trains on; "
                         "run notebook 03, or change the variant's `sources`")
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(profile, variant, seed, folder, rows)
    if trainer.is_world_process_zero():
        for earlier in ("result.json", "events.jsonl"):
            (folder / earlier).unlink(missing_ok=True)
        write_json(folder / "versions.json", {**versions(), "platform": platform.platform()})
    if profile.training.zero_stage < 3 or not trainer.is_deepspeed_enabled:
        trainer.precompute_reference()
    ready = time.monotonic()
    trainer.train()
    trained = time.monotonic()
    save_adapter(trainer, folder / "adapter")
    if trainer.is_world_process_zero():
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
        last: dict[str, float] = {}
        for event in events:
            last |= event
        weights = trainer.train_dataset["weight"]
        write_json(folder / "result.json", {
            "digest": run_digest(profile, name, seed, manifest), "variant": name, "seed": seed,
            "processes": trainer.args.world_size,
            "pairs": len(weights), "validation_pairs": len(trainer.eval_dataset or ()), "mean_weight": float(np.mean(weights)),
            "seconds": {"start": ready - began, "steps": trained - ready, "total": time.monotonic() - began}, "last": last})


def main() -> None:
    """Parse the command line, share the cores between the processes, train."""
    parser = argparse.ArgumentParser(description="Train one variant of a profile.")
    parser.add_argument("--profile", required=True, help="a profile's name, or the path of a (resolved) profile")
    parser.add_argument("--variant", required=True, help="a name under the profile's training.variants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the LoRA weights and of the order of the pairs")
    parser.add_argument("--run-folder", type=Path, required=True, help="folder that receives events, adapter and result")
    options = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    transformers_logging.disable_progress_bar()
    try:
        profile = load_profile(options.profile)
        if check_device(profile.lvlm.device) == "cpu" and world > 1:
            os.environ["DS_ACCELERATOR"] = "cpu"
            import deepspeed

            deepspeed.ops.__compatible_ops__ = {}  # gloo does the work; with it filled, a C++ extension is built first
        run(profile, options.variant, options.seed, options.run_folder)
    except Exception:
        sys.stderr.write(f"{FAILED}\n{traceback.format_exc()}")  # in one piece, so that two processes do not mix their lines
        sys.exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
