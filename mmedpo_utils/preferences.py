"""Preference pairs as the trainer takes them: tokenised rows of a data set, and their batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import apply_chat_template

from . import prefix
from .errors import InputError
from .manifests import answer_text, open_image, question_text, resolve_image, row_source

CACHED_IMAGES = 2048


def image_token_count(processor: ProcessorMixin) -> int:
    """How many image tokens one ``<image>`` mark becomes."""
    batch = processor(images=Image.new("RGB", (64, 64)), text=processor.image_token, return_tensors="pt")
    return int((batch["input_ids"] == processor.image_token_id).sum())


def preference_dataset(rows: Sequence[dict[str, Any]], weights: Sequence[float], processor: ProcessorMixin,
                       image_root: Path, rejected_root: Path, max_length: int) -> Dataset:
    """Tokenised preference pairs; images stay on disk, as paths.

    Args:
        rows: manifest rows. Length: N.
        weights: normalised relevance s' of each row. Length: N.
        processor: the LLaVA processor; its chat template writes prompt and answer.
        image_root: folder of ``image``.
        rejected_root: folder of ``rejected_image``; a row without one is rejected on its own ``image``.
        max_length: tokens of prompt (image tokens included) and one answer that the model is given at most.

    Raises:
        InputError: an image is missing, or of an answer nothing is left within ``max_length``.
    """
    patches, pairs = processor.image_token * image_token_count(processor), []
    for row, weight in zip(rows, weights, strict=True):
        turn = [{"type": "image"}, {"type": "text", "text": question_text(row)}]
        answers = {key: [{"role": "assistant", "content": [{"type": "text", "text": answer_text(row, key == "rejected")}]}]
                   for key in ("chosen", "rejected")}
        texts = apply_chat_template({"prompt": [{"role": "user", "content": turn}], **answers}, processor)
        texts["prompt"] = texts["prompt"].replace(processor.image_token, patches)
        pair: dict[str, Any] = {f"{key}_ids": processor.tokenizer(texts[key], add_special_tokens=False)["input_ids"]
                                for key in ("prompt", "chosen", "rejected")}
        if len(pair["prompt_ids"]) >= max_length:
            raise InputError(f"pair {row['id']}: its prompt has {len(pair['prompt_ids'])} tokens, image included, and leaves no "
                             f"room for an answer; raise the profile's `training.max_length` ({max_length})")
        image, rejected = resolve_image(image_root, row["image"]), row.get("rejected_image")
        pairs.append({**pair, "image": str(image), "weight": float(weight), "visual": row_source(row) == "visual",
                      "rejected_image": str(resolve_image(rejected_root, rejected) if rejected else image)})
    return Dataset.from_list(pairs)


def pair_keys(pairs: Dataset, max_length: int) -> list[str]:
    """What decides the reference log-probabilities of each pair besides the model: tokens and images, as SHA-256."""
    digest = lru_cache(maxsize=None)(lambda path: hashlib.sha256(Path(path).read_bytes()).hexdigest())
    return [hashlib.sha256(json.dumps([max_length, *(pair[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")),
                                       digest(pair["image"]), digest(pair["rejected_image"])]).encode()).hexdigest()
            for pair in pairs]


@dataclass
class PreferenceCollator:
    """Batches of pairs, from rows of `preference_dataset`.

    A pair whose two images are the same is one row of a shared prompt where ``shared_prefix`` is on, otherwise every pair is
    two rows. Each answer is cut where prompt and answer reach ``max_length``, in both layouts. An image comes once
    per batch. With dropout the two layouts draw different masks: two answers of one row share those of their prompt.
    """

    pad_token_id: int
    max_length: int
    processor: ProcessorMixin
    shared_prefix: bool = True

    def __post_init__(self) -> None:
        self.pixels = lru_cache(maxsize=CACHED_IMAGES)(self.read_pixels)

    def read_pixels(self, path: str) -> torch.Tensor:
        """The image at ``path`` as the vision tower takes it. Shape: [3, H, W]."""
        image = open_image(path).convert("RGB")
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def rows(self, pair: dict[str, Any], chosen: int = 0, rejected: int = 1) -> list[tuple[prefix.Row, str]]:
        """The rows of a pair, each with its image's path; ``chosen`` and ``rejected`` name the answers' owners."""
        prompt = pair["prompt_ids"]
        room = self.max_length - len(prompt)
        answers = [(chosen, pair["chosen_ids"][:room]), (rejected, pair["rejected_ids"][:room])]
        if self.shared_prefix and pair["image"] == pair["rejected_image"]:
            return [(prefix.Row(prompt, answers), pair["image"])]
        return [(prefix.Row(prompt, answers[:1]), pair["image"]), (prefix.Row(prompt, answers[1:]), pair["rejected_image"])]

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate B pairs.

        Returns:
            ``weights``, ``visual`` (1 for a visual pair) and ``tokens`` (read by the model, without padding). Shape: [B].
            What `prefix.pack` gives of the R rows; the answers' owners are 0..B-1 (chosen) and B..2B-1 (rejected).
            ``pixel_values`` of the different images, ``image_rows``: each row's image. Shape: [I, 3, H, W] and [R].
            ``pair_keys``: the pairs' keys, where they have one.
        """
        rows = [self.rows(pair, place, len(pairs) + place) for place, pair in enumerate(pairs)]
        images: dict[str, int] = {}
        places = [images.setdefault(path, len(images)) for pair in rows for _, path in pair]
        batch = {"weights": torch.tensor([pair["weight"] for pair in pairs]),
                 "visual": torch.tensor([float(pair["visual"]) for pair in pairs]),
                 "tokens": torch.tensor([sum(len(row) for row, _ in pair) for pair in rows]),
                 **prefix.pack([row for pair in rows for row, _ in pair], self.pad_token_id),
                 "pixel_values": torch.stack([self.pixels(path) for path in images]), "image_rows": torch.tensor(places)}
        return batch | ({"pair_keys": [pair["key"] for pair in pairs]} if "key" in pairs[0] else {})
