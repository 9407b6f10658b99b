"""What a training takes, reckoned before it starts: parameters, memory per GPU, floating-point
operations, hours.

It needs neither GPU nor weights. Everything here is a closed form of the model's configuration and
the profile; the hours rest on
stated guesses: how much of its peak a GPU reaches, and how fast weights travel between GPUs and
between nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, MistralConfig

from ..base.rows import question_text
from ..lvlm import PHANTOM_WEIGHTS
from ..preference_rows import answer_text
from ..profiles import Profile, Training

GIB = 2**30
NF4_BYTES = (
    4 + 8 / 64 + 32 / (64 * 256)
) / 8  # 4 bits, an 8-bit scale per 64 weights, a 32-bit one per 256 scales
WORKING_SPACE = 2 * GIB  # CUDA's context or, on a CPU, the libraries; their workspaces, fragments
UTILISATION = 0.4  # share of the peak that matrix products of this size reach
LINK = 16e9  # bytes per second between two GPUs, or GPU and CPU, over PCIe 4.0
NETWORK = 12.5e9  # bytes per second between two nodes, shared by a node's GPUs: 100 Gbit/s
WORD_TOKENS, TEMPLATE_TOKENS = 1.4, 20  # tokens per word of English; of a chat template
UNKNOWN_WORDS = {"prompt": 15, "answer": 40}  # words where there is no manifest yet
CORE = 110e9  # peak of one CPU core in 32 bits, from the phantom run
GPUS = {
    "RTX A6000": (154.8e12, 48),
    "A100": (312e12, 80),
    "H100": (989e12, 80),
}  # peak (bf16, dense), GiB


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
    except (OSError, ValueError, KeyError):
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


def linear_shapes(config: LlavaConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the seven matrices of one language layer; LoRA sits on each."""
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    return [
        (width, queries),
        (width, keys),
        (width, keys),
        (queries, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]


def parameter_counts(config: LlavaConfig, lora_rank: int) -> dict[str, int]:
    """How many parameters each part has.

    Returns:
        ``matrices`` and ``norms`` of the language layers, ``embeddings``, ``head`` (0 where it is
        the embeddings' own), ``tower``, ``projector``, ``lora``.
    """
    text, vision, shapes = config.text_config, config.vision_config, linear_shapes(config)
    layers, width, deep = text.num_hidden_layers, text.hidden_size, vision.hidden_size
    patches, tied = (vision.image_size // vision.patch_size) ** 2, config.tie_word_embeddings
    block = (
        4 * (deep * deep + deep)
        + 2 * deep * vision.intermediate_size
        + vision.intermediate_size
        + deep
        + 4 * deep
    )
    bias = 2 * width if config.multimodal_projector_bias else 0
    return {
        "matrices": layers * sum(inputs * outputs for inputs, outputs in shapes),
        "norms": (2 * layers + 1) * width,
        "embeddings": text.vocab_size * width,
        "head": 0 if tied else text.vocab_size * width,
        "tower": vision.num_hidden_layers * block
        + 3 * vision.patch_size**2 * deep
        + (patches + 2) * deep
        + 4 * deep,
        "projector": deep * width + width * width + bias,
        "lora": layers * lora_rank * sum(inputs + outputs for inputs, outputs in shapes),
    }


@dataclass(frozen=True)
class PairSize:
    """Tokens of a mean pair: its prompt, image included, and one of its answers."""

    prompt: float
    answer: float

    def tokens(self, shared: bool) -> float:
        """Tokens that the model reads of one pair: two rows, or the prompt once."""
        return (1 if shared else 2) * self.prompt + 2 * self.answer


def total_steps(training: Training, pairs: int, processes: int) -> int:
    """Optimiser steps of a run on ``pairs`` training pairs."""
    if training.max_steps is not None:
        return training.max_steps
    batches = math.ceil(math.ceil(pairs / training.per_device_batch_size) / processes)
    return math.ceil(training.epochs * math.ceil(batches / accumulation(training, processes)))


def accumulation(training: Training, processes: int) -> int:
    """Forward passes per step that keep the global batch the profile's, however many processes
    really run.
    """
    return max(1, training.gradient_accumulation_steps * training.processes // processes)


def pair_size(config: LlavaConfig, rows: Sequence[dict[str, Any]], max_length: int) -> PairSize:
    """Tokens of a mean pair of a manifest, or of a usual one where there are no rows."""
    prompt, answer = UNKNOWN_WORDS["prompt"], UNKNOWN_WORDS["answer"]
    if rows:
        prompt = sum(len(question_text(row).split()) for row in rows) / len(rows)
        answer = (
            sum(
                len(answer_text(row, rejected).split())
                for row in rows
                for rejected in (False, True)
            )
            / len(rows)
            / 2
        )
    image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    size = image + TEMPLATE_TOKENS + WORD_TOKENS * prompt
    return PairSize(size, min(WORD_TOKENS * answer + 1, max(1, max_length - size)))


def memory_per_gpu(
    config: LlavaConfig,
    training: Training,
    quantization: str,
    trains: tuple[str, ...],
    size: PairSize,
    processes: int,
) -> dict[str, float]:
    """Bytes on each GPU while it trains, by part, and ``cpu``: bytes that all processes together
    keep in the CPU's memory.

    As DeepSpeed's own estimators reckon: 16-bit weights and gradients, gradients also in 32 bits, a
    32-bit copy of what is trained, and two 32-bit moments. Only what is trained has gradients and
    moments.
    """
    counts = parameter_counts(config, training.lora_rank)
    trained = sum(counts[part] for part in ("lora", "projector") if part in trains)
    wide = 2 if training.precision == "bf16" else 4
    frozen = sum(counts.values()) - counts["lora"] - counts["matrices"]
    base = frozen * wide + counts["matrices"] * (NF4_BYTES if quantization == "nf4" else wide)
    stage = training.zero_stage if processes > 1 else None
    if stage is None:
        parts = {
            "weights": base + 4 * trained,
            "gradients": 4 * trained,
            "optimiser": (2 if training.optimizer == "paged_adamw_8bit" else 8) * trained,
        }
    else:
        parts = {
            "weights": base + wide * trained,
            "gradients": (6 if wide == 2 else 4) * trained,
            "optimiser": (8 if wide == 4 and stage == 0 else 12) * trained,
        }
    for part, first in (("weights", 3), ("gradients", 2), ("optimiser", 1)):
        parts[part] /= processes if stage is not None and stage >= first else 1
    cpu = 0.0
    for part in (
        ("optimiser", "gradients", "weights") if training.offload == "cpu" and stage else ()
    ):
        if part != "weights" or stage == 3:
            cpu, parts[part] = cpu + processes * parts[part], 0.0
    if stage == 3:  # the layer at work and the next one, whole
        parts["weights"] += (
            2
            * wide
            * max(counts["matrices"] / config.text_config.num_hidden_layers, counts["embeddings"])
        )
    parts["activations"] = activation_bytes(config, training, size)
    return {**parts, "working space": float(WORKING_SPACE), "cpu": cpu}


def activation_bytes(config: LlavaConfig, training: Training, size: PairSize) -> float:
    """Bytes that one forward pass keeps for the backward pass, in two rows per pair.

    Of each layer: both norms (input and 32-bit copy), queries, keys, values, attention's output,
    four tensors of the inner width, and where LoRA drops out, a copy and a mask of each matrix's
    input. With checkpointing: each layer's input, and one layer whole. Of the answers: two 32-bit
    tensors over the vocabulary.
    """
    text, shapes = config.text_config, linear_shapes(config)
    wide = 2 if training.precision == "bf16" else 4
    tokens = training.per_device_batch_size * size.tokens(shared=False)
    kept = 2 * text.hidden_size * (wide + 4) + wide * (
        shapes[0][1] + 2 * shapes[1][1] + shapes[3][0] + 4 * shapes[4][1]
    )
    kept += (wide + 1) * sum(inputs for inputs, _ in shapes) if training.lora_dropout else 0
    whole, inputs = tokens * kept, tokens * text.hidden_size * wide
    layers = text.num_hidden_layers
    logits = 2 * training.per_device_batch_size * size.answer * text.vocab_size * 8
    return (layers * inputs + whole if training.gradient_checkpointing else layers * whole) + logits


def flops_per_pair(
    config: LlavaConfig, training: Training, size: PairSize, visual: bool, epochs: float
) -> float:
    """Floating-point operations of one pair in one epoch, its share of the reference included.

    A pass costs 2 per weight and token. The backward pass goes through the frozen weights once,
    through LoRA's twice; checkpointing repeats the forward pass. The reference is one more forward
    pass: per step, or per run where it is cached.

    Args:
        visual: the pair has two images, so that nothing is shared.
    """
    counts, text, vision = (
        parameter_counts(config, training.lora_rank),
        config.text_config,
        config.vision_config,
    )
    shared = training.shared_prefix and not visual
    tokens = size.tokens(shared)
    attention = (
        2 * text.num_hidden_layers * linear_shapes(config)[0][1] * tokens**2 / (1 if shared else 2)
    )
    forward = 2 * (counts["matrices"] + counts["lora"]) * tokens + attention
    forward += 2 * text.vocab_size * text.hidden_size * 2 * size.answer
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    image = (
        2 * counts["tower"] * patches
        + 4 * vision.num_hidden_layers * vision.hidden_size * patches**2
    )
    image += 2 * counts["projector"] * patches
    once = 1 / epochs if training.cache_reference else 1.0
    images = (2 if visual else 1) * image
    passes = (3 if training.gradient_checkpointing else 2) + once
    return passes * forward + 2 * counts["lora"] * tokens + (1 + once) * images


def seconds_per_step(
    config: LlavaConfig,
    training: Training,
    flops: float,
    processes: int,
    peak: float,
    epochs: float,
) -> float:
    """Seconds of one optimiser step of the global batch.

    Args:
        flops: of one pair.
        peak: floating-point operations per second that one GPU is sold with.
    """
    pairs = (
        training.per_device_batch_size
        * training.gradient_accumulation_steps
        * training.processes
        / processes
    )
    work = pairs * flops / (peak * UTILISATION)
    if training.zero_stage < 3 or processes == 1:
        return work
    counts = parameter_counts(config, training.lora_rank)
    weights = (2 if training.precision == "bf16" else 4) * sum(counts.values())
    passes = (3 if training.gradient_checkpointing else 2) + (
        1 / epochs if training.cache_reference else 1
    )
    share = 1.0 if training.offload == "cpu" else (processes - 1) / processes
    link = min(LINK, NETWORK * training.nodes / processes) if training.nodes > 1 else LINK
    return work + pairs / training.per_device_batch_size * passes * weights * share / link


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
    training, (config, _) = profile.training, model_config(profile.lvlm.model)
    parts = memory_per_gpu(
        config,
        training,
        profile.lvlm.quantization,
        training.variants[variant].trains,
        pair_size(config, rows, training.max_length),
        processes or training.processes,
    )
    return {part: value / GIB for part, value in parts.items() if part != "cpu"}, parts["cpu"] / GIB


def describe(
    profile: Profile,
    variant: str,
    rows: Sequence[dict[str, Any]],
    counts: dict[str, int],
    processes: int,
    cores: int | None = None,
) -> str:
    """The estimate as text: parameters, memory of each process, time on three GPUs or on this CPU.

    Args:
        rows: the variant's pairs; none where they are not made yet.
        counts: pairs per source.
        processes: over all nodes.
        cores: of the CPU that trains; None where GPUs do.
    """
    training, trains = profile.training, profile.training.variants[variant].trains
    config, read = model_config(profile.lvlm.model)
    parts = parameter_counts(config, training.lora_rank)
    trained, base = (
        sum(parts[part] for part in ("lora", "projector") if part in trains),
        sum(parts.values()) - parts["lora"],
    )
    size = pair_size(config, rows, training.max_length)
    memory, cpu = profile_memory(profile, variant, rows, processes)
    lines = [
        f"Model: {profile.lvlm.model}, {base / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M "
        "trained"
    ]
    if not read:
        lines.append(
            "  its configuration is not here: reckoned with LLaVA-Med 1.5's shape (Mistral-7B, "
            "CLIP ViT-L/14-336)"
        )
    lines.append(
        f"Memory of each process ({processes} in all), estimated: {sum(memory.values()):.1f} GiB"
    )
    lines += [f"  {part:<14}{value:8.2f} GiB" for part, value in memory.items()]
    lines += [f"  and {cpu:.1f} GiB of the CPU's memory for all processes together"] if cpu else []
    return "\n".join(
        [
            *lines,
            *_describe_time(profile, config, size, counts, processes, sum(memory.values()), cores),
        ]
    )


def summary(profile: Profile, variant: str, gpu: str = "RTX A6000") -> dict[str, Any]:
    """The estimate of a variant as numbers, for as many pairs as curation aims at.

    Returns:
        ``gib``: of each process; ``parts``: the same by part; ``hours``: on GPUs of the kind
        ``gpu`` (a key of `GPUS`), None where the profile trains on the CPU.
    """
    training, config = profile.training, model_config(profile.lvlm.model)[0]
    parts, _ = profile_memory(profile, variant)
    counts = dict.fromkeys(training.variants[variant].sources, profile.curation.text_pairs)
    seconds = run_seconds(
        config,
        training,
        pair_size(config, [], training.max_length),
        counts,
        training.processes,
        GPUS[gpu][0],
    )
    return {
        "gib": sum(parts.values()),
        "parts": parts,
        "hours": seconds / 3600 if profile.lvlm.device == "cuda" else None,
    }


def run_seconds(
    config: LlavaConfig,
    training: Training,
    size: PairSize,
    counts: dict[str, int],
    processes: int,
    peak: float,
) -> float:
    """Seconds of a whole run on ``counts`` pairs per source; ``peak`` is that of one GPU or
    process.
    """
    steps, epochs, flops = _amount(config, training, size, counts, processes)
    return steps * seconds_per_step(config, training, flops, processes, peak, epochs)


def _amount(
    config: LlavaConfig, training: Training, size: PairSize, counts: dict[str, int], processes: int
) -> tuple[int, float, float]:
    """Steps, epochs, and floating-point operations of a mean pair."""
    pairs = max(1, sum(counts.values()))
    steps = total_steps(training, pairs, processes)
    per_step = (
        training.per_device_batch_size * training.gradient_accumulation_steps * training.processes
    )
    epochs = max(1.0, steps * per_step / pairs)
    flops = sum(
        count * flops_per_pair(config, training, size, source == "visual", epochs)
        for source, count in counts.items()
    )
    return steps, epochs, flops / pairs


def _describe_time(
    profile: Profile,
    config: LlavaConfig,
    size: PairSize,
    counts: dict[str, int],
    processes: int,
    memory: float,
    cores: int | None,
) -> list[str]:
    training = profile.training
    steps, epochs, flops = _amount(config, training, size, counts, processes)
    per_step = (
        training.per_device_batch_size * training.gradient_accumulation_steps * training.processes
    )
    lines = [
        f"Time, estimated: {steps} steps of {per_step} pairs, {epochs:.1f} epochs; a pair of "
        f"{size.prompt:.0f} + {size.answer:.0f} tokens takes {flops / 1e9:,.1f} GFLOP"
    ]
    machines = (
        {f"CPU, {cores} of its cores": (CORE * cores / processes, math.inf)} if cores else GPUS
    )
    for name, (peak, room) in machines.items():
        seconds = run_seconds(config, training, size, counts, processes, peak)
        fits = (
            f" ({room} GiB{'' if memory < room else '; does not fit'})" if room < math.inf else ""
        )
        spent = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"
        lines.append(
            f"  {spent} on {'a' if cores else processes} {name}{fits}, at {UTILISATION:.0%} of "
            f"{peak / 1e12:.3g} TFLOP/s each"
        )
    if training.zero_stage == 3 and processes > 1:
        nodes = f", {NETWORK / 1e9:.3g} GB/s between nodes" if training.nodes > 1 else ""
        lines.append(f"  with weights moving between them at {LINK / 1e9:.0f} GB/s{nodes}")
    return lines
