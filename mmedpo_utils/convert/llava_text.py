"""The text side of an original LLaVA checkpoint: its chat templates, and its tokenizer with an
image token added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from ..base.errors import InputError, first_line

IMAGE_TOKEN = "<image>"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def image_tokenizer(source: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer with `IMAGE_TOKEN`, and without a BOS of its own: the chat
    template writes that.

    Args:
        source: folder with tokenizer.json, or tokenizer.model and tokenizer_config.json.
        vocabulary: rows of the embedding.

    The image token takes an id that no text produces, so that the network stays as it is: a spare
    row of the embedding, or a reserved token, or the unknown token of a tokenizer that falls back
    to bytes. Text after a special token begins with a blank piece, as in the original code, which
    tokenises each stretch of text between images by itself.

    Raises:
        InputError: unreadable, or no id is free.
    """
    try:
        # The original configuration is of no type known here.
        found = AutoTokenizer.from_pretrained(source, config=LlamaConfig(), trust_remote_code=False)
        content = json.loads(found.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"{source}: its tokenizer cannot be read ({first_line(error)}); expected "
            "tokenizer.json, or tokenizer.model with tokenizer_config.json"
        ) from error
    if (content["pre_tokenizer"] or {}).get("prepend_scheme") == "first":
        content["pre_tokenizer"]["prepend_scheme"] = "always"
    content["post_processor"] = None
    roles = {role: getattr(found, role) for role in ROLES}
    if IMAGE_TOKEN not in found.get_vocab() and len(found) >= vocabulary:
        # No row of the embedding is spare: the image takes the place of another token.
        spare = _unused_token(content, found.unk_token)
        if spare is not None:
            _rename_token(content, spare, IMAGE_TOKEN)
            roles = {role: token for role, token in roles.items() if token != spare}
    backend = Tokenizer.from_str(json.dumps(content))
    backend.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    image_id = backend.token_to_id(IMAGE_TOKEN)
    if image_id is None or image_id >= vocabulary:
        raise InputError(
            f"{source}: no id is free for {IMAGE_TOKEN}: the tokenizer has {len(found)} tokens, "
            f"none of them reserved or unused, and config.json's `vocab_size` is {vocabulary}; "
            "expected a larger vocabulary"
        )
    roles["pad_token"] = roles.get("pad_token") or roles.get("unk_token") or roles["eos_token"]
    named = {role: token for role, token in roles.items() if token}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=found.model_max_length,
        clean_up_tokenization_spaces=False,
        **named,
    )


def _unused_token(content: dict[str, Any], unknown: str | None) -> str | None:
    """A special token that no text produces, in a tokenizer's JSON; None where each may be used."""
    for token in content["added_tokens"]:
        if "reserved" in token["content"]:
            return token["content"]
    # What is not in the vocabulary becomes bytes: the unknown token is never used.
    if content["model"].get("byte_fallback") and unknown:
        return unknown
    return None


def _rename_token(content: dict[str, Any], old: str, new: str) -> None:
    """Rename a special token in a tokenizer's JSON; its id stays."""
    for token in content["added_tokens"]:
        if token["content"] == old:
            token["content"] = new
    vocabulary = content["model"]["vocab"]
    if old in vocabulary:
        vocabulary[new] = vocabulary.pop(old)
    if content["model"].get("unk_token") == old:
        content["model"]["unk_token"] = None
