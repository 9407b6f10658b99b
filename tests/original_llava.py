"""Original-layout LLaVA checkpoints for tests: a tokenizer of bytes, shards with or without an index, a tower beside them."""

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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """<unk> 0, BOS 1, EOS 2, byte b at 3 + b: 259 tokens. A BOS is put first, as LLaMA's tokenizer does."""
    letters = bytes_to_unicode()
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letters[byte]: 3 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   model_max_length=2048)


def write_original(folder: Path, config: dict, state: dict[str, Tensor], shards: int = 1, kind: str = "safetensors",
                   index: bool = True, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a checkpoint: configuration, tokenizer, and its tensors in ``shards`` files of ``kind`` safetensors or bin."""
    folder.mkdir(parents=True)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    names, places = sorted(state), {}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for number in range(shards):
        part = {name: state[name] for name in names[number::shards]}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{kind}" if shards > 1 else f"{stem}.{kind}"
        save_file(part, folder / file, {"format": "pt"}) if kind == "safetensors" else torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    if index and shards > 1:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def write_tower(folder: Path, config: dict, state: dict[str, Tensor], others: Sequence[str] = ()) -> Path:
    """Write the CLIP checkpoint that ``mm_vision_tower`` names; ``others`` are keys of its text side."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tower = {f"vision_model.{name.removeprefix(TOWER)}": value for name, value in state.items() if name.startswith(TOWER)}
    torch.save(tower | {name: torch.zeros(2) for name in others}, folder / "pytorch_model.bin")
    return folder
