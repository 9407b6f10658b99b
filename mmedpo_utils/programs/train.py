"""The training program: one variant, one seed. The deepspeed launcher starts it once per process,
`launch` starts the launcher.

    python -m deepspeed.launcher.runner --num_accelerators 2 --no_local_rank
    --module mmedpo_utils.programs.train --processes 2 --profile P --variant V --run-folder R

It goes on from the newest whole checkpoint of the same inputs; a finished run is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging
from trl import DPOConfig

from ..base.checkpoint_keeper import CheckpointKeeper
from ..base.checkpoints import newest_checkpoint
from ..base.doors import open_door
from ..base.environment import check_device, versions
from ..base.errors import InputError
from ..base.files import write_json
from ..base.images import open_image, resolve_image
from ..base.locks import holder, run_lock
from ..base.precision import train_in_32_bits
from ..base.rows import Row, question_text
from ..base.sections import Variant
from ..base.tensors import model_digest
from ..curate import training_rows
from ..evaluate import profile_decoding
from ..lvlm import MedLVLM, generate, load_profile_lvlm
from ..preference_rows import answer_text
from ..profiles import Profile, load_profile
from ..relevance import training_weights
from ..run_folder import (
    FAILED,
    adapter_sums,
    finished_result,
    last_values,
    manifest_path,
    prepare_folder,
    read_events,
    run_digest,
)
from ..scale.estimate import accumulation, held_out, total_steps
from ..scale.fast_trainer import FastTrainer, PackingCollator
from ..trainer import MMedPOTrainer, PreferenceCollator, adapter_config, preference_dataset
from .export import write_model_card
from .run_arguments import add_run_arguments

SHARED_DISK_SECONDS = 30
DECIDING_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
OF_SEVERAL = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PMI_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)


def deepspeed_config(profile: Profile) -> dict[str, Any]:
    """DeepSpeed's configuration; "auto" values follow the trainer's arguments."""
    stage = profile.training.zero_stage
    offload = profile.training.offload == "cpu"
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 50_000_000}
    if stage == 3:
        zero |= {
            "stage3_max_live_parameters": 300_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }


def training_arguments(
    profile: Profile, name: str, seed: int, folder: Path, pairs: int, validate: bool
) -> DPOConfig:
    """The trainer's arguments. Building them joins this process to the others, and prepares ZeRO
    stage 3 for loading.

    Args:
        name: the variant.
        pairs: how many pairs are trained on.
        validate: whether there are validation pairs.
    """
    values = profile.training
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = check_device(profile.lvlm.device) == "cuda"
    steps = total_steps(values, pairs, world)
    paged = cuda and values.optimizer == "paged_adamw_8bit"
    return DPOConfig(
        output_dir=str(folder),
        run_name=f"{profile.name}-{name}-seed{seed}",
        seed=seed,
        beta=values.beta,
        loss_type="sft" if values.variants[name].objective == "sft" else "sigmoid",
        learning_rate=values.learning_rate,
        lr_scheduler_type=values.scheduler,
        weight_decay=values.weight_decay,
        optim="paged_adamw_8bit" if paged else "adamw_torch",
        max_steps=steps,
        warmup_steps=math.ceil(values.warmup_ratio * steps),
        max_length=values.max_length,
        bf16=values.precision == "bf16",
        tf32=values.tf32 if cuda else None,
        disable_dropout=False,
        per_device_train_batch_size=values.per_device_batch_size,
        per_device_eval_batch_size=2 * values.per_device_batch_size,
        gradient_accumulation_steps=accumulation(values, world),
        gradient_checkpointing=values.gradient_checkpointing,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        eval_strategy="steps" if validate else "no",
        eval_steps=values.validation_every,
        logging_steps=values.logging_steps,
        report_to=values.report_to,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=values.save_every,
        train_sampling_strategy="group_by_length" if values.group_by_length else "random",
        deepspeed=deepspeed_config(profile) if world > 1 else None,
    )


def sampled_questions(rows: Sequence[Row], count: int) -> list[Row]:
    """The held-out pairs whose questions are asked at each look: the first of every kind of
    question, then the second, and so on; a question that two pairs share comes once.
    """
    different = {(row["image"], question_text(row)): row for row in reversed(rows)}
    of_kind: Counter[Any] = Counter()
    ranked = []
    for row in reversed(different.values()):
        kind = row.get("question_type")
        ranked.append((of_kind[kind], row))
        of_kind[kind] += 1
    ranked.sort(key=lambda item: item[0])
    return [row for _, row in ranked[:count]]


class EventWriter(TrainerCallback):
    """Append one JSON line per logged step to ``events.jsonl``: what the live plot draws.

    Args:
        folder: the run folder.
        pairs_per_step: over all processes.
        profile: says where images lie, and how long an answer may be.
        asked: pairs whose questions the model answers at each look at the held-out pairs.
    """

    def __init__(
        self, folder: Path, pairs_per_step: int, profile: Profile, asked: Sequence[Row]
    ) -> None:
        self.path = folder / "events.jsonl"
        self.pairs_per_step = pairs_per_step
        self.profile = profile
        self.asked = asked
        self.first_step = 0.0  # when it began; 0: not yet
        self.earlier = {"seconds": 0.0, "tokens": 0.0}

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start the clock at the first step, with the time that the earlier part of a resumed run
        took.
        """
        if not self.first_step:
            self.first_step = time.monotonic()
            for event in read_events(self.path.parent):
                self.earlier |= {key: event[key] for key in self.earlier if key in event}

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        """Write a training event, or a validation event whose values are named ``validation_*``."""
        logs = dict(logs or {})
        samples = []
        if "eval_loss" in logs and self.asked:
            # Every process answers: with ZeRO stage 3 each holds a part of the weights.
            samples = self._answer(others["model"], others["processing_class"])
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        for key in {"loss", "eval_loss", "chosen_logp", "rejected_logp"} & set(logs):
            if not np.isfinite(logs[key]):
                raise InputError(
                    f"step {state.global_step}: {key} is {logs[key]}: the training has left the "
                    "finite numbers; lower `training.learning_rate`, or set `training.precision` "
                    "to fp32"
                )
        if "tokens" in logs:
            logs["tokens"] += self.earlier["tokens"]
        seconds = self.earlier["seconds"] + time.monotonic() - self.first_step
        step = state.global_step
        event = {
            "step": step,
            "total_steps": state.max_steps,
            "seconds": round(seconds, 2),
            "seconds_left": round(seconds / max(step, 1) * (state.max_steps - step), 1),
            "pairs_per_second": round(step * self.pairs_per_step / max(seconds, 1e-9), 2),
        }
        event |= {
            key.replace("eval_", "validation_"): float(value)
            for key, value in logs.items()
            if not key.endswith(("runtime", "per_second")) and np.isfinite(value)
        }
        if "eval_tokens" in logs:
            event["validation_tokens_per_second"] = round(
                logs["eval_tokens"] / logs["eval_runtime"], 1
            )
        elif "tokens" in logs:
            event["tokens_per_second"] = round(logs["tokens"] / max(seconds, 1e-9), 1)
        if samples:
            event["samples"] = samples
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")

    def _answer(self, model: Any, processor: Any) -> list[dict[str, str]]:
        """The model's greedy answers now, beside the preferred ones."""
        questions = [question_text(row) for row in self.asked]
        images = []
        for row in self.asked:
            path = resolve_image(self.profile.image_root, row["image"])
            images.append(open_image(path).convert("RGB"))
        tokens = profile_decoding(self.profile).report_tokens
        lvlm = MedLVLM(model, processor, model.device)
        answers = generate(lvlm, images, questions, tokens, len(questions))
        return [
            {
                "image": row["image"],
                "question": question,
                "preferred": answer_text(row),
                "answer": answer,
            }
            for row, question, (answer,) in zip(self.asked, questions, answers, strict=True)
        ]


def build_trainer(
    profile: Profile,
    variant: Variant,
    rows: Sequence[dict[str, Any]],
    validation: np.ndarray,
    arguments: DPOConfig,
    callbacks: list[TrainerCallback],
) -> MMedPOTrainer:
    """Model, LoRA and data put together.

    Args:
        rows: the variant's pairs, validation pairs among them. Length: N.
        validation: true where a row is for validation. Shape: [N].
    """
    weights = training_weights(rows, variant, profile)
    values = profile.training
    in_place = profile.lvlm.quantization == "nf4" or (
        values.precision == "bf16" and arguments.world_size == 1
    )
    lvlm = load_profile_lvlm(profile, device=profile.lvlm.device if in_place else "cpu")
    for buffer in lvlm.model.buffers() if is_deepspeed_zero3_enabled() else ():
        # With ZeRO stage 3 DeepSpeed places the parameters alone.
        buffer.data = buffer.data.to(arguments.device)
    lvlm.llava.model.language_model.set_attn_implementation(values.attention)

    def dataset(chosen: np.ndarray) -> Dataset:
        return preference_dataset(
            [row for row, keep in zip(rows, chosen) if keep],
            weights[chosen],
            lvlm.processor,
            profile.image_root,
            profile.output / "pairs" / "noised",
            values.max_length,
        )

    options = {
        "projector_learning_rate": values.projector_learning_rate,
        "reference": values.reference,
        "args": arguments,
        "train_dataset": dataset(~validation),
        "eval_dataset": dataset(validation) if validation.any() else None,
        "processing_class": lvlm.processor,
        "peft_config": adapter_config(
            values.lora_rank, values.lora_alpha, values.lora_dropout, variant.trains
        ),
        "callbacks": callbacks,
    }
    trainer = choose_trainer(profile, lvlm, options)
    if not trainer.is_deepspeed_enabled:
        train_in_32_bits(trainer.model)
    trainer.remove_callback(PrinterCallback)
    return trainer


def choose_trainer(profile: Profile, lvlm: MedLVLM, options: dict[str, Any]) -> MMedPOTrainer:
    """The fast trainer where the profile asks for one of its savings, else the plain one.

    Args:
        options: what both take.
    """
    values = profile.training
    collating = (lvlm.processor.tokenizer.pad_token_id, values.max_length, lvlm.processor)
    if not values.shared_prefix and not values.cache_reference:
        return MMedPOTrainer(lvlm.model, data_collator=PreferenceCollator(*collating), **options)
    reference = profile.output / "reference" / f"{model_digest(lvlm.model)[:16]}.json"
    return FastTrainer(
        lvlm.model,
        data_collator=PackingCollator(*collating, shared_prefix=values.shared_prefix),
        cache_reference=values.cache_reference,
        reference_cache=reference,
        **options,
    )


def save_adapter(trainer: MMedPOTrainer, folder: Path) -> None:
    """Write the adapter (LoRA and projector, safetensors, PEFT's format) to ``folder``, whole or
    not at all.
    """
    if trainer.is_deepspeed_enabled and trainer.accelerator.deepspeed_plugin.zero_stage == 3:
        state = trainer.deepspeed._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=True
        )
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        draft = folder.with_name(".adapter")
        trainer.model.save_pretrained(draft, state_dict=state)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)


def begin(folder: Path, digest: str, arguments: DPOConfig) -> tuple[bool, str | None]:
    """Rank 0 prepares the run folder; all processes learn how the run begins.

    Returns:
        finished: whether the run was finished before, with these inputs.
        checkpoint: the folder that it goes on from, or None for a new run.

    Raises:
        InputError: a process on another node does not see the folder.
    """
    start: list[Any] = [None]
    if arguments.process_index == 0:
        checkpoint = newest_checkpoint(folder, digest, arguments.world_size)
        finished = finished_result(folder, digest)
        if not finished:
            prepare_folder(folder, checkpoint)
            write_json(folder / "versions.json", {**versions(), "platform": platform.platform()})
        start = [(bool(finished), str(checkpoint) if checkpoint else None, holder(folder, "train"))]
    if arguments.world_size > 1:
        broadcast_object_list(start)
    finished, checkpoint, first = start[0]
    deadline = time.monotonic() + SHARED_DISK_SECONDS
    while holder(folder, "train") != first:
        if time.monotonic() > deadline:
            raise InputError(
                f"{platform.node()}: {folder} is not the folder that the first process writes to; "
                "put the profile's `output` on a disk that all nodes share"
            )
        time.sleep(1)
    return finished, checkpoint


def run(profile: Profile, name: str, seed: int, folder: Path) -> None:
    """Train variant ``name`` and fill the run folder; ``result.json`` is written last.

    Raises:
        InputError: the manifest or an image cannot be used, no pair is of the variant's sources, or
            another process trains into the folder.
    """
    began = time.monotonic()
    variant = profile.training.variants[name]
    manifest = manifest_path(profile, name)
    rows = training_rows(profile, name)
    validation = held_out(rows, seed)
    digest = run_digest(profile, name, seed, manifest)
    # Before ZeRO stage 3 is switched on below: it would divide the model that is converted or
    # merged here.
    open_door("Med-LVLM")(profile.lvlm.model, profile.lvlm.vision_tower, profile.lvlm.base_adapter)
    arguments = training_arguments(
        profile, name, seed, folder, int((~validation).sum()), bool(validation.any())
    )
    with run_lock(folder, "train") if arguments.process_index == 0 else nullcontext():
        finished, checkpoint = begin(folder, digest, arguments)
        if finished:
            print(f"{folder} is finished already, with the same inputs.")
            return
        writer = EventWriter(
            folder,
            arguments.train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size,
            profile,
            sampled_questions(
                [row for row, keep in zip(rows, validation, strict=True) if keep],
                profile.training.samples,
            ),
        )
        trainer = build_trainer(
            profile,
            variant,
            rows,
            validation,
            arguments,
            [CheckpointKeeper(folder, digest), writer],
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trained = time.monotonic()
        save_adapter(trainer, folder / "adapter")
        if trainer.is_world_process_zero():
            seconds = {
                "start": writer.first_step - began,
                "steps": trained - writer.first_step,
                "total": time.monotonic() - began,
            }
            write_model_card(folder, profile, name, seed, rows)
            write_result(
                trainer,
                folder,
                {
                    "digest": digest,
                    "files": adapter_sums(folder),
                    "variant": name,
                    "seed": seed,
                    "seconds": seconds,
                    "resumed_from": int(checkpoint.rpartition("-")[2]) if checkpoint else None,
                },
            )


def write_result(trainer: MMedPOTrainer, folder: Path, values: dict[str, Any]) -> None:
    """Write result.json: ``values``, the counts, and the last value of everything that was
    logged.
    """
    weights = trainer.train_dataset["weight"]
    write_json(
        folder / "result.json",
        {
            **values,
            "processes": trainer.args.world_size,
            "pairs": len(weights),
            "validation_pairs": len(trainer.eval_dataset or ()),
            "mean_weight": float(np.mean(weights)),
            "last": last_values(folder),
        },
    )


def settle_environment(processes: int) -> None:
    """Let the profile decide, and not what an earlier job left in the environment.

    accelerate takes its own settings (DeepSpeed, FSDP, precision, device) from variables, before
    those of the trainer. And a process that trains alone would wait for others where a pod has
    WORLD_SIZE and RANK set.

    Args:
        processes: how many were started, over all nodes.
    """
    for name in list(os.environ):
        if name.startswith(DECIDING_PREFIXES) or (processes == 1 and name in OF_SEVERAL):
            del os.environ[name]


def parse_options() -> argparse.Namespace:
    """The options that `launch_command.program_arguments` writes."""
    parser = argparse.ArgumentParser(description="Train one variant of a profile.")
    add_run_arguments(parser)
    parser.add_argument(
        "--run-folder",
        type=Path,
        required=True,
        help="folder that receives events, adapter and result",
    )
    parser.add_argument(
        "--cores",
        type=int,
        default=os.cpu_count(),
        help="processor cores that all processes here share",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="how many a launcher starts, over all nodes; 1: alone, whatever the environment says",
    )
    return parser.parse_args()


def take_place(options: argparse.Namespace) -> None:
    """Give this process its share of the machine: threads, and one GPU where it trains alone."""
    settle_environment(options.processes)
    here = int(os.environ.get("LOCAL_SIZE", 1))
    torch.set_num_threads(max(1, options.cores // here))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        # With more GPUs in sight, the trainer would ask for data parallelism.
        first, _, _ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = first


def join_processes(device: str) -> None:
    """Join the processes of a CPU training; on GPUs the trainer's arguments do."""
    os.environ["DS_ACCELERATOR"] = device
    if device == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import deepspeed

        # gloo does the work. With the list filled, a C++ extension would be built first.
        deepspeed.ops.__compatible_ops__ = {}
        # Now, since stage 3 divides the model while it loads, before the trainer is there.
        deepspeed.init_distributed("gloo")


def load_data_alone() -> None:
    """Let checkpoints be loaded as data: a pickle may hold a program, and DeepSpeed's loader would
    run it.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        # What its checkpoints hold beside tensors and plain values.
        known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        torch.serialization.add_safe_globals(known)


def main() -> None:
    """Parse the command line, share the cores between the processes, train."""
    options = parse_options()
    take_place(options)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(options.run_folder / "tensorboard")
    transformers_logging.disable_progress_bar()
    try:
        profile = load_profile(options.profile)
        join_processes(check_device(profile.lvlm.device))
        load_data_alone()
        run(profile, options.variant, options.seed, options.run_folder)
    except Exception:
        # In one piece, so that two processes do not mix their lines.
        sys.stderr.write(f"{FAILED}\n{traceback.format_exc()}")
        sys.exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
