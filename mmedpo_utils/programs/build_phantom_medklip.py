"""Rebuild the phantom MedKLIP from reports alone: ``mmedpo build-medklip [--output DIR]``.

Training reads films and report texts. Boxes and masks are read by the evaluation only. The model
card tells the recipe.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from ..base.files import atomic_write, write_json
from ..medklip import (
    CHANNEL_MEAN,
    CHANNEL_STD,
    PHANTOM_CHECKPOINT,
    MedKLIP,
    MedKLIPConfig,
    load_medklip,
)
from ..phantom.texts import report
from ..phantom.world import FINDINGS, ZONES, Film, draw_film, films
from ..show.medklip_scores import read_films, score_maps, score_medklip
from .noise_patches import noise_patches

TRAINING_SEED = 1000
EVALUATION_SEED = 0
PATIENTS = 4000
BEST_PATCHES = 4
ATTENTION_DROPOUT = 0.5
KEPT_PATCHES = 0.2  # share of the patches that the decoder sees in a training step
PATCH_STEPS = 350
JOINT_STEPS = 1000
FINAL_STEPS = 800
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
CONFIG = MedKLIPConfig(
    QUERIES,
    ZONES,
    text_width=64,
    stem_width=24,
    stage_widths=(64, 128, 256),
    stage_depths=(1, 1, 2),
    width=96,
    feed_forward=256,
)


@dataclass
class Batch:
    """Films with what their reports say: presence [B, Q] in {0, 1} and zone index [B, Q], -1 where
    none is named.
    """

    pixel_values: Tensor
    presence: Tensor
    zones: Tensor


class TextEncoder(nn.Module):
    """A small BERT over the words of the descriptions; its first token's state is the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = [f"{query} {DESCRIPTIONS[query]}".split() for query in QUERIES]
        self.zones = [zone.split() for zone in ZONES]
        words: set[str] = set()
        for text in [*self.queries, *self.zones]:
            words.update(text)
        # 0 is padding, 1 the first token, whose state is the embedding.
        self.ids = {word: index + 2 for index, word in enumerate(sorted(words))}
        self.bert = BertModel(
            BertConfig(
                vocab_size=len(words) + 2,
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=2 * width,
                max_position_embeddings=32,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=0,
            ),
            add_pooling_layer=False,
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """Embeddings of all queries [Q, width] and all zones [L, width]."""
        return self._encode(self.queries), self._encode(self.zones)

    def _encode(self, texts: list[list[str]]) -> Tensor:
        ids = torch.zeros(len(texts), 1 + max(map(len, texts)), dtype=torch.long)
        ids[:, 0] = 1
        for row, text in enumerate(texts):
            ids[row, 1 : len(text) + 1] = torch.tensor([self.ids[word] for word in text])
        return self.bert(ids, attention_mask=(ids > 0).long()).last_hidden_state[:, 0]


def read_report(text: str) -> dict[str, str]:
    """Findings that a report affirms, each with the zone it names."""
    findings = "|".join(FINDINGS)
    zones = "|".join(ZONES)
    sentence = rf"(?:There is|shows) (?:an? )?({findings}) in the ({zones}) zone\."
    found = dict(re.findall(sentence, text))
    if "heart is enlarged" in text or "There is cardiomegaly" in text:
        found["cardiomegaly"] = "heart"
    return found


def training_films(count: int) -> Iterator[Film]:
    """Half the films as the world draws them, a quarter with one finding, a quarter with none."""
    for patient in range(count):
        alone = (FINDINGS[patient // 4 % len(FINDINGS)],)
        by_turns = (None, None, alone, ())
        yield draw_film(patient, TRAINING_SEED, by_turns[patient % 4])


def training_set(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Grey films [N, 224, 224] uint8 and what their reports say: presence [N, Q], zones [N, Q]."""
    rng = np.random.default_rng(TRAINING_SEED)
    images = []
    presence = []
    zones = []
    for film in training_films(count):
        images.append(film.image)
        found = read_report(report(film, rng))
        # The last query is "disease": there with any finding, and in no zone.
        presence.append([finding in found for finding in FINDINGS] + [bool(found)])
        zones.append([_zone_index(found.get(finding)) for finding in FINDINGS] + [-1])
    return torch.from_numpy(np.stack(images)), torch.tensor(presence).float(), torch.tensor(zones)


def _zone_index(zone: str | None) -> int:
    return -1 if zone is None else ZONES.index(zone)


def batches(
    data: tuple[Tensor, Tensor, Tensor], steps: int, size: int, rng: torch.Generator
) -> Iterator[Batch]:
    """Shuffled batches, each shifted by up to 8 pixels, changed a little in exposure, and noised in
    patches.
    """
    images, presence, zones = data
    mean = torch.tensor(CHANNEL_MEAN).view(3, 1, 1)
    std = torch.tensor(CHANNEL_STD).view(3, 1, 1)
    passes = steps * size // len(images) + 1
    order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(passes)])
    for rows in order[: steps * size].split(size):
        shift = torch.randint(-8, 9, (2,), generator=rng).tolist()
        grey = torch.roll(images[rows].float() / 255, shift, (1, 2))
        gain, offset = 0.9 + 0.2 * torch.rand(2, len(rows), 1, 1, generator=rng)
        grey = (grey * gain + 0.5 * (offset - 1)).clamp(0, 1)
        grey, _ = noise_patches(grey, rng)
        yield Batch((grey[:, None] - mean) / std, presence[rows], zones[rows])


def patch_loss(patch_logits: Tensor, presence: Tensor) -> Tensor:
    """Multiple-instance presence loss: a film shows a finding when its best patches do.
    patch_logits: [B, 196, F].
    """
    best = patch_logits.topk(BEST_PATCHES, dim=1).values.mean(1)
    return functional.binary_cross_entropy_with_logits(best, presence[:, :-1])


def location_loss(logits: Tensor, zones: Tensor) -> Tensor:
    """Location contrast: each present finding's output against the text embeddings of all zones.
    logits: [B, Q, L].
    """
    return functional.cross_entropy(logits[zones >= 0], zones[zones >= 0])


class Learner(nn.Module):
    """The model with what only training needs: the text encoder and the patch head."""

    def __init__(self) -> None:
        super().__init__()
        model: Any = MedKLIP(CONFIG)  # `to` is not typed for a memory format alone
        self.model: MedKLIP = model.to(memory_format=torch.channels_last)
        self.text = TextEncoder(CONFIG.text_width)
        self.patch_head = nn.Linear(CONFIG.width, len(FINDINGS))
        for layer in self.model.decoder.layers:
            layer.multihead_attn.dropout = ATTENTION_DROPOUT

    def forward(self, batch: Batch, decode: bool) -> Tensor:
        """The loss of a batch: presence from the best patches, then presence and place from the
        decoder too.

        Patch logits are the mean over a film and its copy turned by 180 degrees, so that the
        patches are centred. The decoder sees a share of the patches only, others at each step, and
        drops attention at random, so that it learns to look at all of a lesion.
        """
        films = batch.pixel_values
        both = torch.cat([films, films.flip(2, 3)]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            patches = self.model.encode(both)
        patches = patches.float()
        upright, turned = self.patch_head(patches).chunk(2)
        loss = patch_loss((upright + turned.flip(1)) / 2, batch.presence)
        if not decode:
            return loss
        patches = patches[: len(films)]
        self.model.disease_book, self.model.location_book = self.text()
        kept = torch.randperm(patches.shape[1])[: int(KEPT_PATCHES * patches.shape[1])]
        output = self.model.decode(patches[:, kept])
        answers = output.logits.flatten(0, 1)
        presence = functional.cross_entropy(answers, batch.presence.long().flatten())
        place = location_loss(self.model.location_logits(output), batch.zones)
        return loss + presence + 0.5 * place


def optimise(
    learner: Learner,
    stream: Iterator[Batch],
    steps: int,
    learning_rate: float,
    patch_steps: int = 0,
) -> None:
    """AdamW with a warm-up: ``patch_steps`` on the patches alone at a constant rate, the rest on
    all terms on a cosine.
    """
    optimizer = torch.optim.AdamW(learner.parameters(), learning_rate, weight_decay=1e-2)

    def rate(step: int) -> float:
        if step < patch_steps:
            return min(1.0, (step + 1) / 50)
        step = step - patch_steps
        return min(1.0, (step + 1) / 50) * (1 + np.cos(np.pi * step / (steps - patch_steps))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step, batch in enumerate(stream):
        loss = learner(batch, decode=step >= patch_steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def train(patients: int, batch_size: int = 16) -> MedKLIP:
    """Train from scratch: the patches alone, all terms, and all terms again at half of the rate."""
    torch.manual_seed(0)
    learner = Learner().train()
    data = training_set(patients)
    rng = torch.Generator().manual_seed(0)
    steps = PATCH_STEPS + JOINT_STEPS
    optimise(learner, batches(data, steps, batch_size, rng), steps, 2e-3, PATCH_STEPS)
    # A decoder that has found the lesions gains from a second, quieter round; at the higher rate
    # it does not, however long it lasts.
    optimise(learner, batches(data, FINAL_STEPS, batch_size, rng), FINAL_STEPS, 1e-3)
    with torch.no_grad():
        learner.model.disease_book, learner.model.location_book = learner.text()
    return learner.model.eval()


def measure(model: MedKLIP, count: int = 400, alone: int = 50) -> dict[str, Any]:
    """Scores on unseen patients: films as the world draws them, and films with one finding each."""
    population = films(count, EVALUATION_SEED, 7000)
    single = []
    for finding in FINDINGS:
        single += [draw_film(9000 + i, EVALUATION_SEED, (finding,)) for i in range(alone)]
    masks = [film.masks for film in population]
    output = read_films(model, _images(population))
    scores = score_medklip(output, masks)
    of_single = score_medklip(read_films(model, _images(single)), [film.masks for film in single])
    scores["pointing_game_alone"] = of_single["pointing_game_alone"]
    measured = {
        "films": count,
        "films_alone": alone,
        "pointing_game_nodule": scores["pointing_game_alone"]["nodule"],
        "chance": _pointing_chance(population),
        "location_accuracy": _location_accuracy(model, population),
    }
    return measured | scores | score_maps(model, output, _images(population), masks)


def _images(films: list[Film]) -> list[Image.Image]:
    return [Image.fromarray(film.image) for film in films]


def _pointing_chance(population: list[Film]) -> float:
    """The pointing game's score of a patch that is drawn at random, on films with a finding."""
    rows, columns = np.mgrid[8:224:16, 8:224:16].reshape(2, -1)  # the centres of the patches
    lesions = [film.lesion_mask for film in population if film.zones]
    return float(np.mean([_reach(mask)[rows, columns].mean() for mask in lesions]))


@torch.inference_mode()
def _location_accuracy(model: MedKLIP, population: list[Film]) -> float:
    """Share of present findings whose zone has the largest location logit."""
    hits = []
    for film in population:
        output = model(model.preprocess([Image.fromarray(film.image)]))
        said = model.location_logits(output)[0].argmax(-1)  # [Q]
        for finding, zone in film.zones.items():
            hits.append(ZONES[said[FINDINGS.index(finding)]] == zone)
    return float(np.mean(hits))


def _reach(mask: np.ndarray) -> np.ndarray:
    """The pixels that count as a hit of the pointing game: within 8 pixels of the mask. Shape:
    [224, 224].
    """
    disk = torch.from_numpy(np.hypot(*np.mgrid[-8:9, -8:9]) <= 8).float()
    lesion = torch.from_numpy(mask).float()
    grown = functional.conv2d(lesion[None, None], disk[None, None], padding=8)
    return grown[0, 0].numpy() > 0.5


def save(model: MedKLIP, folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.json``."""
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    write_json(folder / "config.json", asdict(model.config))


def main() -> None:
    """Train, save and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=PHANTOM_CHECKPOINT,
        help="gets weights, configuration and scores",
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    model = train(PATIENTS)
    minutes = (time.perf_counter() - started) / 60
    save(model, arguments.output)
    scores = {"minutes": round(minutes, 1)} | measure(load_medklip(arguments.output))
    write_json(arguments.output / "scores.json", scores)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
