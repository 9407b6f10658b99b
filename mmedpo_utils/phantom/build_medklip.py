"""Rebuild the phantom MedKLIP from reports alone: ``python -m mmedpo_utils.phantom.build_medklip --output DIR``.

Training reads films and report texts. Boxes and masks are read by the evaluation only. The model card tells the recipe.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from ..files import atomic_write, write_json
from ..medklip import MedKLIP, MedKLIPConfig, MedKLIPOutput, load_medklip, score_medklip
from .texts import report
from .world import FINDINGS, ZONES, Film, draw_film, films

TRAINING_SEED, EVALUATION_SEED = 1000, 0
QUERIES = (*FINDINGS, "disease")
DESCRIPTIONS = {
    "opacity": "a hazy white cloud in a lung",
    "nodule": "a small round white spot in a lung",
    "effusion": "white fluid at the base of a lung that hides the angle of the diaphragm",
    "pneumothorax": "black air at the apex of a lung outside a thin white line",
    "cardiomegaly": "a heart that is enlarged",
    "atelectasis": "a thin white band across a lung",
    "pneumoperitoneum": "black air below the diaphragm",
    "disease": "any finding in the lung or the heart or the diaphragm",
}
CONFIG = MedKLIPConfig(QUERIES, ZONES, text_width=64, stem_width=24, stage_widths=(32, 64, 128), stage_depths=(1, 1, 1),
                       block="basic", width=96, feed_forward=256)


@dataclass
class Batch:
    """Films with what their reports say: presence [B, Q] in {0, 1} and zone index [B, Q], -1 where none is named."""

    pixel_values: Tensor
    presence: Tensor
    zones: Tensor


class TextEncoder(nn.Module):
    """A small BERT over the words of the descriptions; its first token's state is the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.texts = [f"{query} {DESCRIPTIONS[query]}".split() for query in QUERIES], [zone.split() for zone in ZONES]
        words = sorted({word for texts in self.texts for text in texts for word in text})
        self.ids = {word: index + 2 for index, word in enumerate(words)}
        self.bert = BertModel(BertConfig(
            vocab_size=len(words) + 2, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=2 * width, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, pad_token_id=0), add_pooling_layer=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Embeddings of all queries [Q, width] and all zones [L, width]."""
        return self._encode(self.texts[0]), self._encode(self.texts[1])

    def _encode(self, texts: list[list[str]]) -> Tensor:
        ids = torch.zeros(len(texts), 1 + max(map(len, texts)), dtype=torch.long, device=self.bert.device)
        ids[:, 0] = 1
        for row, text in enumerate(texts):
            ids[row, 1 : len(text) + 1] = torch.tensor([self.ids[word] for word in text], device=ids.device)
        return self.bert(ids, attention_mask=(ids > 0).long()).last_hidden_state[:, 0]


def read_report(text: str) -> dict[str, str]:
    """Findings that a report affirms, each with the zone it names."""
    found = {finding: zone for finding, zone in
             re.findall(rf"(?:There is|shows) (?:an? )?({'|'.join(FINDINGS)}) in the ({'|'.join(ZONES)}) zone\.", text)}
    if "heart is enlarged" in text or "There is cardiomegaly" in text:
        found["cardiomegaly"] = "heart"
    return found


def training_films(count: int) -> Iterator[Film]:
    """Half the films as the world draws them, a quarter with one finding, a quarter with none."""
    for patient in range(count):
        alone = (FINDINGS[patient // 4 % len(FINDINGS)],)
        yield draw_film(patient, TRAINING_SEED, (None, None, alone, ())[patient % 4])


def training_set(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Grey films [N, 224, 224] uint8 and what their reports say: presence [N, Q], zones [N, Q]."""
    rng, images, presence, zones = np.random.default_rng(TRAINING_SEED), [], [], []
    for film in training_films(count):
        images.append(film.image)
        found = read_report(report(film, rng))
        presence.append([finding in found for finding in FINDINGS] + [bool(found)])
        zones.append([ZONES.index(found[finding]) if finding in found else -1 for finding in FINDINGS] + [-1])
    return torch.from_numpy(np.stack(images)), torch.tensor(presence).float(), torch.tensor(zones)


def batches(data: tuple[Tensor, Tensor, Tensor], steps: int, size: int, rng: torch.Generator) -> Iterator[Batch]:
    """Shuffled batches, each shifted by up to 8 pixels and changed a little in exposure."""
    images, presence, zones = data
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(steps * size // len(images) + 1)])
    for rows in order[: steps * size].split(size):
        shift = torch.randint(-8, 9, (2,), generator=rng).tolist()
        grey = torch.roll(images[rows].float() / 255, shift, (1, 2))
        gain, offset = 0.9 + 0.2 * torch.rand(2, len(rows), 1, 1, generator=rng).to(images.device)
        grey = (grey * gain + 0.5 * (offset - 1)).clamp(0, 1)
        yield Batch((grey[:, None] - mean) / std, presence[rows], zones[rows])


def patch_loss(patch_logits: Tensor, presence: Tensor) -> Tensor:
    """Multiple-instance presence loss: a film shows a finding when its best patches do. patch_logits: [B, 196, F]."""
    best = patch_logits.topk(3, dim=1).values.mean(1)
    return functional.binary_cross_entropy_with_logits(best, presence[:, :-1])


def location_loss(logits: Tensor, zones: Tensor) -> Tensor:
    """Location contrast: each present finding's output against the text embeddings of all zones. logits: [B, Q, L]."""
    return functional.cross_entropy(logits[zones >= 0], zones[zones >= 0])


def consistency_loss(output: MedKLIPOutput, patch_logits: Tensor, presence: Tensor) -> Tensor:
    """KL from the mean attention of each present query to the softmax of the model's own (detached) patch logits."""
    own = patch_logits.detach()
    present = own.masked_fill(presence[:, None, :-1] == 0, -30.0)
    target = torch.cat([own, present.amax(-1, keepdim=True)], -1).transpose(1, 2).log_softmax(-1)
    attention = output.attentions.mean((1, 2)).clamp_min(1e-8).log()
    divergence = (target.exp() * (target - attention)).sum(-1)
    return (divergence * presence).sum() / presence.sum()


