"""Original-layout LLaVA checkpoints for tests: a tokenizer of bytes, shards with or without an
index, a tower beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

TOWER = "model.vision_tower.vision_tower.vision_model."
CONFIG = {
    "model_type": "llava_mistral",
    "architectures": ["LlavaMistralForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "mm_vision_tower": "clip",
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}


def random_state(config: dict, clip: dict) -> dict[str, torch.Tensor]:
    """Random tensors under the original layout's names, shapes from the two configurations."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    vision, mlp = clip["hidden_size"], clip["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "lm_head.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        "model.mm_projector.0.weight": (width, vision),
        "model.mm_projector.0.bias": (width,),
        "model.mm_projector.2.weight": (width, width),
        "model.mm_projector.2.bias": (width,),
    }
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    patches = (clip["image_size"] // clip["patch_size"]) ** 2
    tower = {
        "embeddings.class_embedding": (vision,),
        "embeddings.position_embedding.weight": (patches + 1, vision),
        "embeddings.patch_embedding.weight": (vision, 3, clip["patch_size"], clip["patch_size"]),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(clip["num_hidden_layers"]):
        start = f"encoder.layers.{layer}."
        norms += [f"{start}layer_norm1", f"{start}layer_norm2"]
        linear = {
            f"self_attn.{name}": (vision, vision)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        }
        for name, shape in (linear | {"mlp.fc1": (mlp, vision), "mlp.fc2": (vision, mlp)}).items():
            tower |= {f"{start}{name}.weight": shape, f"{start}{name}.bias": shape[:1]}
    tower |= {f"{norm}.{part}": (vision,) for norm in norms for part in ("weight", "bias")}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.2
        for name, shape in (shapes | {TOWER + name: shape for name, shape in tower.items()}).items()
    }


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """<unk> 0, BOS 1, EOS 2, byte b at 3 + b: 259 tokens. A BOS is put first, as LLaMA's tokenizer
    does.
    """
    letters = bytes_to_unicode()
    vocabulary = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{letters[byte]: 3 + byte for byte in range(256)},
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=2048,
    )


def write_original(
    folder: Path,
    config: dict,
    state: dict[str, Tensor],
    shards: int = 1,
    kind: str = "safetensors",
    index: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a checkpoint: configuration, tokenizer, and its tensors in ``shards`` files of ``kind``
    safetensors or bin.
    """
    folder.mkdir(parents=True)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2})
    )
    names, places = sorted(state), {}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for number in range(shards):
        part = {name: state[name] for name in names[number::shards]}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{kind}" if shards > 1 else f"{stem}.{kind}"
        save_file(part, folder / file, {"format": "pt"}) if kind == "safetensors" else torch.save(
            part, folder / file
        )
        places |= dict.fromkeys(part, file)
    if index and shards > 1:
        (folder / f"{stem}.{kind}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )
    return folder


def write_tower(
    folder: Path, config: dict, state: dict[str, Tensor], others: Sequence[str] = ()
) -> Path:
    """Write the CLIP checkpoint that ``mm_vision_tower`` names; ``others`` are keys of its text
    side.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tower = {
        f"vision_model.{name.removeprefix(TOWER)}": value
        for name, value in state.items()
        if name.startswith(TOWER)
    }
    torch.save(tower | {name: torch.zeros(2) for name in others}, folder / "pytorch_model.bin")
    return folder
