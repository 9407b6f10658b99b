"""Floating-point operations that preference training needs at least, in closed form: pure functions
of shapes and lengths.

A multiplication and an addition count as two. Nothing is counted twice that could be computed once:
no padding, no second pass over an image or a prompt that two answers share, no logits but those of
answer tokens, no recomputation of activations.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import PATCH, Shape


def layer_weights(shape: Shape) -> int:
    """Weights of one language-model layer's matrices."""
    narrow = shape.hidden_size // shape.heads * shape.key_value_heads
    return (
        2 * shape.hidden_size * (shape.hidden_size + narrow)
        + 3 * shape.hidden_size * shape.intermediate_size
    )


def lora_weights(shape: Shape, rank: int) -> int:
    """Weights of the adapters of one layer: q, o, k, v and the three matrices of the feed-forward
    part.
    """
    narrow, wide = shape.hidden_size // shape.heads * shape.key_value_heads, shape.intermediate_size
    return rank * (
        2 * 2 * shape.hidden_size
        + 2 * (shape.hidden_size + narrow)
        + 3 * (shape.hidden_size + wide)
    )


def row_flops(shape: Shape, prompt: int, answers: Sequence[int], rank: int) -> dict[str, int]:
    """One forward pass of the language model over a prompt and the answers that share it.

    Args:
        prompt: tokens of the prompt, image tokens included.
        answers: tokens of each answer.
        rank: of the adapters; 0 without.

    Returns:
        ``linear`` (the frozen matrices), ``lora``, ``attention`` (each token to those it sees),
        ``head`` (logits of answers).
    """
    tokens = prompt + sum(answers)
    seen = prompt * (prompt + 1) // 2 + sum(
        prompt * answer + answer * (answer + 1) // 2 for answer in answers
    )
    return {
        "linear": 2 * tokens * shape.layers * layer_weights(shape),
        "lora": 2 * tokens * shape.layers * lora_weights(shape, rank),
        "attention": 4 * seen * shape.layers * shape.hidden_size,
        "head": 2 * sum(answers) * shape.hidden_size * shape.vocabulary,
    }


def tower_flops(shape: Shape) -> int:
    """One image through the vision tower, up to the layer whose features are used: the last but
    one.
    """
    width, tokens, layers = shape.tower_hidden_size, shape.image_tokens + 1, shape.tower_layers - 1
    matrices = 4 * width**2 + 2 * width * shape.tower_intermediate_size
    return 2 * shape.image_tokens * width * 3 * PATCH**2 + layers * (
        2 * tokens * matrices + 4 * tokens**2 * width
    )


def pair_flops(
    shape: Shape, prompt: int, answers: tuple[int, int], visual: bool, rank: int, references: float
) -> float:
    """One preference pair: tower, projector and language model forward, their backward pass, and
    the reference.

    Frozen matrices pass gradients on (as much as forward); adapters and projector also collect
    their own.

    Args:
        prompt: tokens of the prompt, image tokens included.
        answers: tokens of chosen and rejected answer.
        visual: the two answers have images of their own; else they share image and prompt.
        rank: of the adapters.
        references: reference passes per pair and epoch: 1 where it is recomputed, 1 / epochs where
            it is kept.
    """
    rows = [answers[:1], answers[1:]] if visual else [answers]
    first, second = (
        2 * shape.image_tokens * width * shape.hidden_size
        for width in (shape.tower_hidden_size, shape.hidden_size)
    )
    projector = (1 + references) * (first + second) + first + 2 * second
    total = len(rows) * (tower_flops(shape) + projector)
    for row in rows:
        parts = row_flops(shape, prompt, row, rank)
        total += (
            (2 + references) * (parts["linear"] + parts["head"])
            + 3 * parts["lora"]
            + (3 + references) * parts["attention"]
        )
    return total
