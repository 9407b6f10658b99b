"""Floating-point operations that preference training needs at least.

torch counts them, on the meta device: shapes without values. A multiplication and an addition count
as two. What could be left out is not counted: padding, a second pass over an image or a prompt that
two answers share, attention to what the mask hides, logits but those of answer tokens, the tower's
last layer, which nothing reads, and the recomputation of activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from common import Shape, lvlm_config
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from mmedpo_utils.trainer import adapter_config


@functools.cache
def meta_llava(shape: Shape, rank: int | None) -> LlavaForConditionalGeneration:
    """A LLaVA without values, with one language layer: they are all alike, and the tower without
    its last one.

    Args:
        rank: of the adapters beside which the projector is trained; None: no adapters.
    """
    # Eager attention is two matrix products, which are counted apart as `bmm`.
    counted = replace(shape, layers=1, tower_layers=shape.tower_layers - 1)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(
            lvlm_config(counted), attn_implementation="eager"
        )
        if rank is not None:
            get_peft_model(model, adapter_config(rank, 2 * rank, dropout=0.0))
    return model


def count(
    forward: Callable[[torch.Tensor], torch.Tensor],
    size: tuple[int, ...],
    backward: bool = False,
    needs_gradient: bool = False,
) -> dict[str, int]:
    """Operations of a function of one tensor.

    Args:
        size: of its input.
        backward: the backward pass counts as well.
        needs_gradient: the backward pass goes on to the input.

    Returns:
        ``attention`` (products of batches of matrices) and ``matrices`` (all others).
    """
    inputs = torch.zeros(size, device="meta", requires_grad=backward and needs_gradient)
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        output = forward(inputs)
        if backward:
            output.sum().backward()
    attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return {"matrices": counter.get_total_flops() - attention, "attention": attention}


def seen_tokens(prompt: int, answers: Sequence[int]) -> int:
    """How many tokens all tokens of a row see together: the prompt, and each answer the prompt and
    itself, nothing later.
    """
    seen = prompt * (prompt + 1) // 2
    for answer in answers:
        seen += prompt * answer + answer * (answer + 1) // 2
    return seen


def layers_flops(
    shape: Shape, prompt: int, answers: Sequence[int], rank: int | None
) -> dict[str, int]:
    """The language model's layers on a prompt and the answers that share it.

    Args:
        prompt: tokens of the prompt, image tokens included.
        answers: tokens of each answer.
        rank: of the adapters, for a forward and a backward pass; None: a forward pass without them.

    Returns:
        ``matrices`` and ``attention``.
    """
    model = meta_llava(shape, rank).model.language_model
    tokens = prompt + sum(answers)
    layer = count(
        lambda inputs: model(inputs_embeds=inputs).last_hidden_state,
        (1, tokens, shape.hidden_size),
        backward=rank is not None,
        needs_gradient=True,
    )
    # Each token is counted with every other; the kernels leave out what the mask hides.
    attention = layer["attention"] * seen_tokens(prompt, answers) // tokens**2
    return {"matrices": shape.layers * layer["matrices"], "attention": shape.layers * attention}


def head_flops(shape: Shape, tokens: int, rank: int | None) -> int:
    """Logits of so many tokens; ``rank`` as in `layers_flops`."""
    size = (1, tokens, shape.hidden_size)
    head = meta_llava(shape, rank).lm_head
    return count(head, size, backward=rank is not None, needs_gradient=True)["matrices"]


def tower_flops(shape: Shape) -> int:
    """One image through the vision tower, up to the layer whose features are used: the last but
    one.
    """
    tower = meta_llava(shape, None).model.vision_tower
    size = (1, 3, shape.image_size, shape.image_size)
    return sum(count(lambda images: tower(images).last_hidden_state, size).values())


def projector_flops(shape: Shape, rank: int | None) -> int:
    """One image's features through the projector; ``rank`` as in `layers_flops`."""
    projector = meta_llava(shape, rank).model.multi_modal_projector
    size = (1, shape.image_tokens, shape.tower_hidden_size)
    return count(projector, size, backward=rank is not None)["matrices"]


def pair_flops(
    shape: Shape, prompt: int, answers: tuple[int, int], visual: bool, rank: int, references: float
) -> float:
    """One preference pair: tower, projector and language model forward, their backward pass, and
    the reference.

    Args:
        prompt: tokens of the prompt, image tokens included.
        answers: tokens of chosen and rejected answer.
        visual: the two answers have images of their own; else they share image and prompt.
        rank: of the adapters.
        references: reference passes per pair and epoch: 1 where it is recomputed, 1 / epochs where
            it is kept.
    """
    rows = [answers[:1], answers[1:]] if visual else [answers]
    total = len(rows) * tower_flops(shape)  # frozen: the reference sees the same features
    for passes, adapters in ((1, rank), (references, None)):
        for row in rows:
            total += passes * projector_flops(shape, adapters)
            total += passes * sum(layers_flops(shape, prompt, row, adapters).values())
            total += passes * head_flops(shape, sum(row), adapters)
    return total
