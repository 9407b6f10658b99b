"""Numbers of few bits: 4-bit loading, and what has to stay in 32 bits."""

from __future__ import annotations

import logging
from typing import Any

import torch


def nf4_config(precision: torch.dtype = torch.bfloat16) -> Any:
    """The `BitsAndBytesConfig` of 4-bit loading: NF4, double quantisation, computing in
    ``precision``.
    """
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional CPU kernel
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )


def keep_packing(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU at the first look in eval mode.

    Where the CPU computes in bfloat16, it would round the scales in place, and from then on no
    gradient passes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def train_in_32_bits(model: torch.nn.Module) -> None:
    """Keep the trained parameters in 32 bits: in bfloat16 a step of 1e-7 rounds to nothing.

    Not for DeepSpeed, which keeps a 32-bit copy itself.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
