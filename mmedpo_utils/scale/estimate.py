"""What a training takes, estimated before it starts: parameters, steps, memory of each GPU.

It needs neither GPU nor weights. Parameters are counted on a model that has shapes and no values;
memory is a table of bytes per parameter and a closed form of the activations.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)

from ..base.errors import InputError, first_line
from ..base.rows import patient_of, question_text
from ..base.sections import Training
from ..lvlm import PHANTOM_WEIGHTS
from ..preference_rows import answer_text
from ..profiles import Profile

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2}
# NF4: 4 bits, an 8-bit scale per 64 weights, a 32-bit one per 256 scales.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# CUDA's context or, on a CPU, the libraries; their workspaces, fragments.
WORKING_SPACE = 2 * GIB

# Bytes of each trained parameter, by precision and how it is kept. With ZeRO: as DeepSpeed's own
# estimators (`estimate_zero2_model_states_mem_needs` and its sister for stage 3) count 16 bits,
# 2 for the weights, 2 + 4 for gradients in 16 and 32 bits, 4 for a 32-bit copy and 8 for AdamW's
# two moments. In 32 bits gradients are not copied; the weights are, once ZeRO divides them. One
# process trains in 32 bits whatever the precision (`trainer.train_in_32_bits`), and bitsandbytes'
# paged AdamW keeps each moment in 8 bits.
BYTES_PER_TRAINED_PARAMETER = {
    ("fp32", "one process"): {"weights": 4, "gradients": 4, "optimiser": 8},
    ("bf16", "one process"): {"weights": 4, "gradients": 4, "optimiser": 8},
    ("fp32", "one process, 8-bit moments"): {"weights": 4, "gradients": 4, "optimiser": 2},
    ("bf16", "one process, 8-bit moments"): {"weights": 4, "gradients": 4, "optimiser": 2},
    ("fp32", "replicated"): {"weights": 4, "gradients": 4, "optimiser": 8},
    ("bf16", "replicated"): {"weights": 2, "gradients": 6, "optimiser": 12},
    ("fp32", "sharded"): {"weights": 4, "gradients": 4, "optimiser": 12},
    ("bf16", "sharded"): {"weights": 2, "gradients": 6, "optimiser": 12},
}
# The first ZeRO stage that divides a part among the processes (arXiv 1910.02054, Figure 1), and the
# first at which `training.offload` moves it to the CPU's memory.
SHARDED_FROM_STAGE = {"optimiser": 1, "gradients": 2, "weights": 3}
OFFLOADED_FROM_STAGE = {"optimiser": 1, "gradients": 1, "weights": 3}

VALIDATION_SHARE = 0.1
VALIDATION_PAIRS = 64
WORD_TOKENS = 1.4  # tokens per word of English
TEMPLATE_TOKENS = 20  # of a chat template
UNKNOWN_WORDS = {"prompt": 15, "answer": 40}  # words where there is no manifest yet


def model_config(model: str) -> tuple[LlavaConfig, bool]:
    """The configuration of ``lvlm.model`` and whether it was read; else it is that of LLaVA-Med
    1.5, from what is published.
    """
    try:
        config = AutoConfig.from_pretrained(
            PHANTOM_WEIGHTS if model == "phantom" else model,
            local_files_only=True,
            trust_remote_code=False,
        )
        if isinstance(config, LlavaConfig):
            return config, True
    except (OSError, ValueError, KeyError, StrictDataclassError):
        pass
    text = MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return LlavaConfig(
        text_config=text, vision_config=tower, image_seq_length=576, tie_word_embeddings=False
    ), False


def meta_model(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """The model of a configuration on the meta device: modules and shapes, and no values.

    Raises:
        InputError: the configuration is of no model that can be built.
    """
    try:
        return _meta_model(config.to_json_string())
    except Exception as error:  # a value that no layer accepts ends in whatever that layer raises
        raise InputError(
            "lvlm.model: its configuration is of no model that can be built "
            f"({first_line(error)}); correct its config.json"
        ) from error


# A configuration cannot be a key of the cache, its JSON can. A model of 7 billion parameters takes
# a fifth of a second, and a check asks for it once per variant.
@functools.lru_cache(maxsize=4)
def _meta_model(config: str) -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig.from_dict(json.loads(config)))


def language_matrices(model: LlavaForConditionalGeneration) -> list[torch.nn.Linear]:
    """The linear layers of the language model; LoRA is put on each (`trainer.adapter_config`)."""
    modules = model.model.language_model.modules()
    return [module for module in modules if isinstance(module, torch.nn.Linear)]


def count_parameters(module: torch.nn.Module) -> int:
    """How many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_counts(config: LlavaConfig, lora_rank: int) -> dict[str, int]:
    """How many parameters each part has, counted on the meta device.

    Returns:
        ``matrices`` and ``norms`` of the language layers, ``embeddings``, ``head`` (0 where it is
        the embeddings' own), ``tower``, ``projector``, ``lora``.
    """
    model = meta_model(config)
    matrices = 0
    lora = 0
    for layer in language_matrices(model):
        matrices += layer.weight.numel()
        lora += lora_rank * (layer.in_features + layer.out_features)
    embeddings = count_parameters(model.get_input_embeddings())
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    return {
        "matrices": matrices,
        "norms": count_parameters(model.model.language_model) - matrices - embeddings,
        "embeddings": embeddings,
        "head": 0 if tied else count_parameters(model.lm_head),
        "tower": count_parameters(model.model.vision_tower),
        "projector": count_parameters(model.model.multi_modal_projector),
        "lora": lora,
    }


def trained_parameters(counts: dict[str, int], trains: Sequence[str]) -> int:
    """How many of the counted parameters are trained, where ``trains`` names the parts."""
    return sum(counts[part] for part in ("lora", "projector") if part in trains)


@dataclass(frozen=True)
class PairSize:
    """Tokens of a mean pair: its prompt, image included, and one of its answers."""

    prompt: float
    answer: float


def accumulation(training: Training, processes: int) -> int:
    """Forward passes per step that keep the global batch the profile's, however many processes
    really run.
    """
    return max(1, training.gradient_accumulation_steps * training.processes // processes)


def global_batch(training: Training) -> int:
    """Pairs of one optimiser step, over all processes."""
    per_process = training.per_device_batch_size * training.gradient_accumulation_steps
    return per_process * training.processes


def total_steps(training: Training, pairs: int, processes: int) -> int:
    """Optimiser steps of a run on ``pairs`` training pairs."""
    if training.max_steps is not None:
        return training.max_steps
    if training.epochs is None:
        raise ValueError("a profile has either training.max_steps or training.epochs")
    batches = math.ceil(math.ceil(pairs / training.per_device_batch_size) / processes)
    return math.ceil(training.epochs * math.ceil(batches / accumulation(training, processes)))


def held_out(rows: Sequence[dict[str, Any]], seed: int) -> np.ndarray:
    """Choose validation pairs: about a tenth of the patients (of the images, where patients are not
    named), 64 pairs at most.

    No patient is on both sides. With fewer than ten patients nothing is held out.

    Returns:
        True where a row is for validation. Shape: [N].
    """
    patients = np.array([patient_of(row) for row in rows])
    names = np.unique(patients)
    share = min(VALIDATION_SHARE, VALIDATION_PAIRS / len(rows))
    return np.isin(
        patients, np.random.default_rng(seed).permutation(names)[: int(share * len(names))]
    )


def pair_size(config: LlavaConfig, rows: Sequence[dict[str, Any]], max_length: int) -> PairSize:
    """Tokens of a mean pair of a manifest, or of a usual one where there are no rows."""
    prompt_words = float(UNKNOWN_WORDS["prompt"])
    answer_words = float(UNKNOWN_WORDS["answer"])
    if rows:
        questions = 0
        answers = 0
        for row in rows:
            questions += len(question_text(row).split())
            answers += len(answer_text(row).split()) + len(answer_text(row, True).split())
        prompt_words = questions / len(rows)
        answer_words = answers / (2 * len(rows))
    image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    prompt = image + TEMPLATE_TOKENS + WORD_TOKENS * prompt_words
    # An answer ends with a token of its own, and is cut where a row has no room left.
    answer = min(WORD_TOKENS * answer_words + 1, max(1, max_length - prompt))
    return PairSize(prompt, answer)


def how_it_is_kept(training: Training, processes: int) -> str:
    """The key of `BYTES_PER_TRAINED_PARAMETER` beside the precision."""
    if processes > 1:
        return "sharded" if training.zero_stage else "replicated"
    if training.optimizer == "paged_adamw_8bit":
        return "one process, 8-bit moments"
    return "one process"


def shard(parts: dict[str, float], stage: int, processes: int) -> dict[str, float]:
    """Bytes of each part on one of ``processes``, where ZeRO ``stage`` divides them."""
    shares = dict(parts)
    for part, first in SHARDED_FROM_STAGE.items():
        if stage >= first:
            shares[part] /= processes
    return shares


def move_to_cpu(parts: dict[str, float], stage: int) -> tuple[dict[str, float], float]:
    """Bytes of each part that stay on a GPU when ZeRO ``stage`` offloads, and those that go."""
    kept = dict(parts)
    moved = 0.0
    for part, first in OFFLOADED_FROM_STAGE.items():
        if stage >= first:
            moved += kept[part]
            kept[part] = 0.0
    return kept, moved


def memory_per_gpu(
    config: LlavaConfig,
    training: Training,
    quantization: str,
    trains: tuple[str, ...],
    size: PairSize,
    processes: int,
) -> dict[str, float]:
    """Bytes on each GPU while it trains.

    Only what is trained has gradients and moments. The frozen model lies beside it whole; the
    projector as it was is part of that.

    Args:
        quantization: none | nf4, of the language model's matrices.
        trains: ``lora``, ``projector`` or both.
        size: tokens of a mean pair.
        processes: over all nodes; one per GPU.

    Returns:
        ``weights``, ``gradients``, ``optimiser``, ``activations``, ``working space``, and ``cpu``:
        bytes that all processes together keep in the CPU's memory.
    """
    counts = parameter_counts(config, training.lora_rank)
    width = BYTES[training.precision]
    matrix_width = NF4_BYTES if quantization == "nf4" else width
    others = sum(counts.values()) - counts["lora"] - counts["matrices"]

    each = BYTES_PER_TRAINED_PARAMETER[training.precision, how_it_is_kept(training, processes)]
    trained = trained_parameters(counts, trains)
    parts = {part: float(bytes_each * trained) for part, bytes_each in each.items()}
    parts["weights"] += others * width + counts["matrices"] * matrix_width

    stage = training.zero_stage if processes > 1 else 0
    parts = shard(parts, stage, processes)
    moved = 0.0
    if training.offload == "cpu":
        parts, moved = move_to_cpu(parts, stage)
    if stage == 3:
        # The layer at work and the next one are gathered whole.
        layer = counts["matrices"] / config.text_config.num_hidden_layers
        parts["weights"] += 2 * width * max(layer, counts["embeddings"])
    parts["activations"] = activation_bytes(config, training, size)
    parts["working space"] = float(WORKING_SPACE)
    parts["cpu"] = processes * moved
    return parts


def activation_bytes(config: LlavaConfig, training: Training, size: PairSize) -> float:
    """Bytes that one forward pass keeps for the backward pass, in two rows per pair.

    With checkpointing: each layer's input, and one layer whole. Of the answers: two 32-bit tensors
    over the vocabulary.
    """
    text = config.text_config
    width = BYTES[training.precision]
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries = text.num_attention_heads * head_size
    keys = text.num_key_value_heads * head_size

    # What one layer keeps of one token.
    kept = 2 * text.hidden_size * (width + 4)  # both norms: the input and its 32-bit copy
    kept += width * (2 * queries + 2 * keys)  # queries, attention's output; keys, values
    kept += width * 4 * text.intermediate_size  # gate, its activation, up, their product
    if training.lora_dropout:
        # A copy and a mask of each matrix's input.
        inputs = sum(layer.in_features for layer in language_matrices(meta_model(config)))
        kept += (width + 1) * inputs / text.num_hidden_layers

    tokens = training.per_device_batch_size * 2 * (size.prompt + size.answer)
    layers = text.num_hidden_layers
    logits = 2 * training.per_device_batch_size * size.answer * text.vocab_size * 8
    if training.gradient_checkpointing:
        return tokens * (layers * text.hidden_size * width + kept) + logits
    return tokens * layers * kept + logits


def profile_memory(
    profile: Profile,
    variant: str,
    rows: Sequence[dict[str, Any]] = (),
    processes: int | None = None,
) -> tuple[dict[str, float], float]:
    """GiB of a profile's training: by part on each GPU, as `plots.memory_bars` draws them, and in
    the CPU's memory in all.

    Args:
        rows: the variant's pairs, for the length of a mean one.
        processes: None: as many as the profile says.
    """
    training = profile.training
    config, _ = model_config(profile.lvlm.model)
    parts = memory_per_gpu(
        config,
        training,
        profile.lvlm.quantization,
        training.variants[variant].trains,
        pair_size(config, rows, training.max_length),
        processes or training.processes,
    )
    cpu = parts.pop("cpu")
    return {part: value / GIB for part, value in parts.items()}, cpu / GIB


def describe(
    profile: Profile, variant: str, rows: Sequence[dict[str, Any]], pairs: int, processes: int
) -> str:
    """The estimate as text: parameters, memory of each process, steps.

    Args:
        rows: the variant's pairs; none where they are not made yet.
        pairs: how many are trained on, or will be.
        processes: over all nodes.
    """
    training = profile.training
    config, read = model_config(profile.lvlm.model)
    counts = parameter_counts(config, training.lora_rank)
    base = sum(counts.values()) - counts["lora"]
    trained = trained_parameters(counts, training.variants[variant].trains)
    lines = [
        f"Model: {profile.lvlm.model}, {base / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M "
        "trained"
    ]
    if not read:
        lines.append(
            "  its configuration is not here: estimated with LLaVA-Med 1.5's shape (Mistral-7B, "
            "CLIP ViT-L/14-336)"
        )
    memory, cpu = profile_memory(profile, variant, rows, processes)
    total = sum(memory.values())
    lines.append(f"Memory of each process ({processes} in all), estimated: {total:.1f} GiB")
    lines += [f"  {part:<14}{value:8.2f} GiB" for part, value in memory.items()]
    if cpu:
        lines.append(f"  and {cpu:.1f} GiB of the CPU's memory for all processes together")

    size = pair_size(config, rows, training.max_length)
    steps = total_steps(training, pairs, processes)
    batch = global_batch(training)
    epochs = steps * batch / max(1, pairs)
    lines.append(
        f"Length: {steps} steps of {batch} pairs, {epochs:.1f} epochs of {pairs} pairs; a pair has "
        f"about {size.prompt:.0f} tokens of image and question, and {size.answer:.0f} of each "
        "answer"
    )
    return "\n".join(lines)
