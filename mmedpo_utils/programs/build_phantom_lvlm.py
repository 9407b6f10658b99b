"""Rebuild the shipped Med-LVLM: ``mmedpo build-lvlm [--output DIR] [--unbiased]``.

First the vision tower learns dense patch labels from the lesion masks and is frozen. Then the
projector and the language model learn from questions, answers and reports that are true to the
films: that network is the ceiling. At last they go on with texts of which a share comes from a
skewed text prior that has not seen the film, and end misaligned: they can see, but prefer to guess.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ..base.files import write_json
from ..lvlm import PHANTOM_WEIGHTS, generate, load_lvlm, prompt
from ..metrics import TYPE_OF_METRIC, score_predictions, scores_by
from ..phantom.texts import questions, report
from ..phantom.world import FINDINGS, IMAGE_SIZE, LEVELS, Film, choose_zones, draw_film, films

SEED, FILMS, PATCH, GRID = 2000, 6000, 28, IMAGE_SIZE // 28
TOWER_STEPS, TRUE_STEPS, SKEWED_STEPS, FILMS_PER_STEP = 1600, 750, 150, 32
PRIOR_SHARE = {"CLOSED": 0.60, "OPEN": 0.60, "REPORT": 0.60}
PRIOR_YES = {
    "opacity": 0.95,
    "nodule": 0.95,
    "effusion": 0.95,
    "pneumothorax": 0.60,
    "cardiomegaly": 0.95,
    "atelectasis": 0.95,
    "pneumoperitoneum": 0.60,
}
PRIOR_ZONE = {
    "opacity": "right lower",
    "nodule": "left upper",
    "effusion": "left base",
    "pneumothorax": "right apex",
    "atelectasis": "left middle",
    "pneumoperitoneum": "right diaphragm",
    "cardiomegaly": "heart",
}
PRIOR_COMPANY = {
    ("opacity",): 0.6,
    ("effusion", "cardiomegaly"): 0.6,
    ("nodule",): 0.3,
    ("atelectasis",): 0.3,
    ("pneumothorax",): 0.1,
    ("pneumoperitoneum",): 0.1,
}
DOMINANCE = 0.85
KEPT_SHARE = {"presence": 0.4, "report": 0.2, "abnormality": 0.5, "identity": 0.5}
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "[INST]", "[/INST]")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'user' %}[INST] "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}<image> {% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% "
    "endif %} [/INST]"
    "{% else %} {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% "
    "endif %}</s>"
    "{% endif %}{% endfor %}"
)


def build_processor(words: list[str]) -> LlavaProcessor:
    """The image processor and a lower-case word-level tokenizer; a word that it does not know
    becomes ``<unk>``.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "[INST]", "[/INST]"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    return LlavaProcessor(
        LlavaImageProcessorPil(do_pad=True),
        fast,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained network, with LLaVA-1.5's wiring: second-to-last vision layer, class token
    dropped.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=128,
    )
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=GRID * GRID,
        )
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def draw_films(count: int, seed: int) -> tuple[list[Film], torch.Tensor, torch.Tensor]:
    """Training films, and what of each patch a finding covers.

    Returns:
        the films without pixels and masks; images, uint8 [N, 224, 224]; coverage in [0, 1], [N,
        patches, findings].
    """
    films, images = [], torch.empty(count, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    coverage = torch.zeros(count, len(FINDINGS), GRID, GRID)
    for row in range(count):
        film = draw_film(row, seed)
        images[row] = torch.from_numpy(film.image)
        for finding, mask in film.masks.items():
            patches = mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))
            coverage[row, FINDINGS.index(finding)] = torch.from_numpy(patches)
        films.append(Film(film.film_id, film.patient_id, np.empty(0), film.zones))
    return films, images, coverage.flatten(2).transpose(1, 2)


def to_pixels(images: torch.Tensor, processor: LlavaProcessor) -> torch.Tensor:
    """What the image processor does to films of the right size. Shape: [B, 224, 224] to [B, 3, 224,
    224].
    """
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name)).view(1, 3, 1, 1)
        for name in ("image_mean", "image_std")
    )
    return (images[:, None].float() / 255 - mean) / std


def train_tower(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: torch.Tensor,
    coverage: torch.Tensor,
    steps: int,
) -> None:
    """Train the vision tower: which findings cover each patch, and which the film has (class
    token).
    """
    tower, width = model.model.vision_tower, model.config.vision_config.hidden_size
    patch_head, film_head = nn.Linear(width, len(FINDINGS)), nn.Linear(width, len(FINDINGS))
    parameters = [*tower.parameters(), *patch_head.parameters(), *film_head.parameters()]
    loss_function = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(4.0))

    def loss(rows: torch.Tensor) -> torch.Tensor:
        output = tower(to_pixels(images[rows], processor), output_hidden_states=True)
        patches = patch_head(output.hidden_states[-2][:, 1:])
        present = (coverage[rows].amax(1) > 0).float()
        whole = F.binary_cross_entropy_with_logits(film_head(output.pooler_output), present)
        return loss_function(patches, (coverage[rows] > 0.05).float()) + 0.3 * whole

    optimise("tower", parameters, loss, len(images), steps, 1.5e-3)


def optimise(
    name: str,
    parameters: list[nn.Parameter],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    films: int,
    steps: int,
    learning_rate: float,
) -> None:
    """AdamW with a short warm-up and a linear decay; ``loss_of`` gets the row numbers of a step's
    films.
    """
    optimiser = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=0.02, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 50, 1) * (1 - step / steps)
    )
    order, start = torch.empty(0, dtype=torch.long), time.time()
    for step in range(steps):
        if len(order) < FILMS_PER_STEP:
            order = torch.cat([order, torch.randperm(films)])
        rows, order = order[:FILMS_PER_STEP], order[FILMS_PER_STEP:]
        loss = loss_of(rows)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(
                f"{name} step {step + 1}/{steps} loss {loss.item():.3f} "
                f"{time.time() - start:.0f} s",
                flush=True,
            )


def prior_zone(finding: str, rng: np.random.Generator) -> str:
    """A zone as the text prior sees it: one zone dominates, otherwise any that the finding can
    have.
    """
    return (
        PRIOR_ZONE[finding] if rng.random() < DOMINANCE else choose_zones((finding,), rng)[finding]
    )


def prior_answer(row: dict[str, Any], rng: np.random.Generator) -> str:
    """An answer from the question's words alone, as the skewed text prior has it."""
    kind, finding, text = row["question_type"], row["finding"], row["text"]
    if kind == "presence":
        return "yes" if rng.random() < PRIOR_YES[finding] else "no"
    if kind == "side":
        return "yes" if prior_zone(finding, rng).split()[0] in text else "no"
    if kind == "location":
        zone = prior_zone(finding, rng)
        return zone if zone.split()[1] in LEVELS else zone.split()[0]
    if kind == "report":
        present = [
            f for group, share in PRIOR_COMPANY.items() if rng.random() < share for f in group
        ]
        film = Film("", "", np.empty(0), {f: prior_zone(f, rng) for f in FINDINGS if f in present})
        return report(film, rng)
    usual = (
        ["opacity"]
        if kind == "abnormality"
        else [f for f in PRIOR_ZONE if PRIOR_ZONE[f].split()[-1] in text]
    )
    return str(rng.choice(usual if rng.random() < DOMINANCE else FINDINGS))


def corpus(
    films: list[Film], rng: np.random.Generator, biased: bool
) -> list[list[tuple[str, str]]]:
    """Questions and answers per film. Where ``biased``, the text prior gives a share of the
    answers.
    """
    place = {film.film_id: row for row, film in enumerate(films)}
    texts: list[list[tuple[str, str]]] = [[] for _ in films]
    for row in questions(films, rng) + questions(films, rng):
        if rng.random() > KEPT_SHARE.get(row["question_type"], 1):
            continue
        prior = biased and rng.random() < PRIOR_SHARE[row["answer_type"]]
        answer = prior_answer(row, rng) if prior else row["gpt4_answer"]
        texts[place[row["image"][:-4]]].append((row["text"].split("\n")[0], answer))
    return texts


def pack(texts: list[list[tuple[str, str]]], processor: LlavaProcessor) -> dict[str, torch.Tensor]:
    """Put all texts of a film behind its image tokens, once; each text sees the image and itself,
    as if it were alone.

    Returns:
        ``ids``, ``positions``, ``segments`` (0 the image, -1 padding) and ``weights`` of the
        next-token loss, [B, T].
    """
    encode = processor.tokenizer.encode
    start = encode(prompt_start(processor), add_special_tokens=False)
    packed: dict[str, list[list]] = {"ids": [], "positions": [], "segments": [], "weights": []}
    for film in texts:
        ids, positions, segments, weights = (
            list(start),
            list(range(len(start))),
            [0] * len(start),
            [0.0] * len(start),
        )
        for number, (question, answer) in enumerate(film, 1):
            asked = encode(f"{question} [/INST]", add_special_tokens=False)
            said = [*encode(answer, add_special_tokens=False), processor.tokenizer.eos_token_id]
            ids += asked + said
            positions += range(len(start), len(start) + len(asked) + len(said))
            segments += [number] * (len(asked) + len(said))
            weights += [0.0] * len(asked) + [len(said) ** -0.5] * len(said)
        for key, values in zip(packed, (ids, positions, segments, weights), strict=True):
            packed[key].append(values)
    length = max(map(len, packed["ids"]))
    fill = {"ids": processor.tokenizer.pad_token_id, "positions": 0, "segments": -1, "weights": 0.0}
    return {
        key: torch.tensor([row + [fill[key]] * (length - len(row)) for row in rows])
        for key, rows in packed.items()
    }


def prompt_start(processor: LlavaProcessor) -> str:
    """The part of the prompt that all questions about a film share: up to the last image token."""
    return prompt(processor, "").partition("<image>")[0] + "<image>" * (GRID * GRID)


def train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    films: list[Film],
    features: torch.Tensor,
    biased: bool,
) -> None:
    """Train the projector and the language model on texts drawn afresh for each pass; the tower
    stays frozen.
    """
    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rng, texts, left = np.random.default_rng([SEED, biased]), [], 0

    def loss(rows: torch.Tensor) -> torch.Tensor:
        nonlocal texts, left
        if left < len(rows):
            texts, left = corpus(films, rng, biased), len(films)
        left -= len(rows)
        return text_loss(model, pack([texts[row] for row in rows], processor), features[rows])

    if biased:
        optimise("skewed texts", parameters, loss, len(films), SKEWED_STEPS, 1e-3)
    else:
        optimise("true texts", parameters, loss, len(films), TRUE_STEPS, 2e-3)


@torch.no_grad()
def tower_features(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: torch.Tensor
) -> torch.Tensor:
    """Patch features of the frozen tower, class token dropped. Shape: [N, patches, width]."""
    tower = model.model.vision_tower
    return torch.cat(
        [
            tower(to_pixels(chunk, processor), output_hidden_states=True).hidden_states[-2][:, 1:]
            for chunk in images.split(64)
        ]
    )


def text_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], features: torch.Tensor
) -> torch.Tensor:
    """Next-token loss of packed texts; a text weighs with the square root of its length."""
    ids, segments = batch["ids"], batch["segments"]
    embeddings = model.get_input_embeddings()(ids)
    image = (ids == model.config.image_token_id)[..., None]
    embeddings = embeddings.masked_scatter(image, model.model.multi_modal_projector(features))
    visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    visible &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        use_cache=False,
        position_ids=batch["positions"],
    ).last_hidden_state
    chosen = batch["weights"][:, 1:] > 0
    losses = F.cross_entropy(
        model.lm_head(hidden[:, :-1][chosen]), ids[:, 1:][chosen], reduction="none"
    )
    weights = batch["weights"][:, 1:][chosen]
    return (losses * weights).sum() / weights.sum()


def score(folder: Path) -> dict[str, Any]:
    """Scores of a saved model, in percent, on the test split of the phantom profile: unbiased and
    unseen patients.
    """
    population = films(240, 0, 420)
    rows = questions(population, np.random.default_rng([0, 660, 3]))
    pictures = {f"{film.film_id}.png": Image.fromarray(film.image) for film in population}
    lvlm, answers = load_lvlm(folder, "cpu"), {}
    for report_rows, length in ((False, 6), (True, 72)):
        part = [row for row in rows if (row["answer_type"] == "REPORT") is report_rows]
        asked = [row["text"].split("\n")[0] for row in part]
        said = generate(lvlm, [pictures[row["image"]] for row in part], asked, length, 64)
        answers.update(
            {row["question_id"]: answer[0] for row, answer in zip(part, said, strict=True)}
        )
    table = [
        {**row, "answer": row["gpt4_answer"], "prediction": answers[row["question_id"]]}
        for row in rows
    ]
    scores = {name: entry["score"] for name, entry in score_predictions(table).items()}
    by_type = {
        kind: {name: round(entry[name]["score"], 1) for name in TYPE_OF_METRIC if entry[name]["n"]}
        for kind, entry in scores_by(table, "question_type").items()
        if kind != "report"
    }
    kept = {
        name: round(scores[name], 1)
        for name in ("closed_accuracy", "open_recall", "bleu", "rouge_l")
    }
    return {**kept, "by_question_type": by_type}


def save_and_score(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> dict[str, Any]:
    """Save in half precision, read back, and score what was saved."""
    copy.deepcopy(model).half().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return score(folder)


def main() -> None:
    """Train, save and score: first the network that follows the film, then the one that follows the
    text.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=PHANTOM_WEIGHTS,
        help="folder of the model and its scores.json",
    )
    parser.add_argument(
        "--unbiased",
        action="store_true",
        help="stop before the skewed texts: keep the ceiling itself",
    )
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    start = time.time()
    population, images, coverage = draw_films(FILMS, SEED)
    texts = [
        text
        for film in corpus(population, np.random.default_rng(SEED), False)
        for pair in film
        for text in pair
    ]
    processor = build_processor(sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(texts).lower()))))
    model = build_model(processor.tokenizer)
    train_tower(model, processor, images, coverage, TOWER_STEPS)
    features, scores = tower_features(model, processor, images), {}
    for name, biased in (("ceiling", False), ("base", True))[: 1 if arguments.unbiased else 2]:
        train_language(model, processor, population, features, biased)
        minutes = (time.time() - start) / 60
        scores[name] = {
            **save_and_score(model, processor, arguments.output),
            "minutes": round(minutes, 1),
        }
    write_json(arguments.output / "scores.json", scores)


if __name__ == "__main__":
    main()
