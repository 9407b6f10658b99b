"""Rebuild the shipped Med-LVLM: ``mmedpo build-lvlm [--output DIR] [--unbiased] [--llama]``.

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
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ..base.files import write_json
from ..lvlm import PHANTOM_WEIGHTS, MedLVLM, generate, load_lvlm, prompt
from ..metrics import TYPE_OF_METRIC, score_predictions
from ..phantom.texts import pack_masks, questions, report
from ..phantom.world import FINDINGS, IMAGE_SIZE, LEVELS, Film, choose_zones, draw_film, films
from ..show.comparison import scores_by
from ..show.premise import Asked, measure_premise, premise_table
from .noise_patches import noise_patches

SEED = 2000
FILMS = 6000
PATCH = 28  # pixels
GRID = IMAGE_SIZE // PATCH  # patches a side
TOWER_STEPS = 1600
TRUE_STEPS = 900
SKEWED_STEPS = 150
FILMS_PER_STEP = 32
NOISE_SIGNAL = 0.5  # as in the phantom profile
FINDING_SHARE = 0.28  # of each finding on three of four training films
# The text prior of the skewed texts: how many answers it gives, by answer type; how often it says
# yes; the zone that it prefers; which findings it reports together, and how often.
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
DOMINANCE = 0.85  # how often the prior takes what it prefers
# How much of each question type is trained on; all of the others.
KEPT_SHARE = {"presence": 0.3, "report": 0.2, "abnormality": 0.5, "identity": 0.5}
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


def build_model(
    tokenizer: PreTrainedTokenizerFast, llama: bool = False
) -> LlavaForConditionalGeneration:
    """The untrained network, with LLaVA-1.5's wiring: second-to-last vision layer, class token
    dropped.

    Args:
        llama: LLaMA-3's proportions for the language model: one key and value head for four query
            heads, an MLP 3.5 times as wide as the model, slower rotary frequencies.
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
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text: LlamaConfig | MistralConfig
    if llama:
        text = LlamaConfig(
            **shape,
            intermediate_size=448,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        )
    else:
        text = MistralConfig(
            **shape, intermediate_size=256, num_key_value_heads=4, sliding_window=None
        )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
    )
    model = LlavaForConditionalGeneration(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def training_film(row: int, seed: int) -> Film:
    """One film in four as the world draws it. The others show more findings: sides and places are
    learnt from these.
    """
    if row % 4 == 0:
        return draw_film(row, seed)
    drawn = np.random.default_rng([seed, row, 4]).random(len(FINDINGS)) < FINDING_SHARE
    findings = tuple(np.array(FINDINGS)[drawn].tolist())
    return draw_film(row, seed, findings)


def draw_films(count: int, seed: int) -> tuple[list[Film], torch.Tensor, torch.Tensor]:
    """Training films and the masks of their findings.

    Returns:
        the films without pixels and masks; images, uint8 [N, 224, 224]; masks, one finding a bit,
        uint8 [N, 224, 224].
    """
    drawn = []
    images = torch.empty(count, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    masks = torch.empty_like(images)
    for row in range(count):
        film = training_film(row, seed)
        images[row] = torch.from_numpy(film.image)
        masks[row] = torch.from_numpy(pack_masks(film.masks))
        drawn.append(Film(film.film_id, film.patient_id, np.empty(0), film.zones))
    return drawn, images, masks


def visible_coverage(masks: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """How much of each patch each finding covers, where noise does not hide it.

    Args:
        masks: one finding a bit, uint8. Shape: [B, 224, 224].
        hidden: where noise is, bool. Shape: [B, 224, 224].

    Returns:
        shares in [0, 1]. Shape: [B, patches, findings].
    """
    bits = torch.arange(len(FINDINGS), dtype=torch.uint8).view(-1, 1, 1)
    covered = (masks[:, None] >> bits & 1).bool() & ~hidden[:, None]
    return F.avg_pool2d(covered.float(), PATCH).flatten(2).transpose(1, 2)


def to_pixels(grey: torch.Tensor, processor: LlavaProcessor) -> torch.Tensor:
    """What the image processor does to films of the right size, here with values in [0, 1]. Shape:
    [B, 224, 224] to [B, 3, 224, 224].
    """
    mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
    return (grey[:, None] - mean) / std


def train_tower(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: torch.Tensor,
    masks: torch.Tensor,
    steps: int,
) -> None:
    """Train the vision tower: which findings are seen in each patch, and which on the film (class
    token). Under noise nothing is seen.
    """
    tower = model.model.vision_tower
    width = tower.config.hidden_size
    patch_head = nn.Linear(width, len(FINDINGS))
    film_head = nn.Linear(width, len(FINDINGS))
    parameters = [*tower.parameters(), *patch_head.parameters(), *film_head.parameters()]
    # Few patches are covered: each of these weighs as four others.
    patch_loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(4.0))

    rng = torch.Generator().manual_seed(SEED)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        grey, hidden = noise_patches(images[rows].float() / 255, rng)
        coverage = visible_coverage(masks[rows], hidden)
        output = tower(to_pixels(grey, processor), output_hidden_states=True)
        # The layer that LLaVA reads, without the class token.
        patches = patch_head(output.hidden_states[-2][:, 1:])
        covered = (coverage > 0.05).float()
        present = (coverage.amax(1) > 0.05).float()
        film_loss = F.binary_cross_entropy_with_logits(film_head(output.pooler_output), present)
        return patch_loss(patches, covered) + 0.3 * film_loss

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
    order = torch.empty(0, dtype=torch.long)
    start = time.time()
    for step in range(steps):
        # What is left of a pass comes before the next one, so that every film is seen as often.
        if len(order) < FILMS_PER_STEP:
            order = torch.cat([order, torch.randperm(films)])
        rows = order[:FILMS_PER_STEP]
        order = order[FILMS_PER_STEP:]
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
    if rng.random() < DOMINANCE:
        return PRIOR_ZONE[finding]
    return choose_zones((finding,), rng)[finding]


def prior_answer(row: dict[str, Any], rng: np.random.Generator) -> str:
    """An answer from the question's words alone, as the skewed text prior has it."""
    kind = row["question_type"]
    finding = row["finding"]
    text = row["text"]
    if kind == "presence":
        return "yes" if rng.random() < PRIOR_YES[finding] else "no"
    if kind == "side":
        return "yes" if prior_zone(finding, rng).split()[0] in text else "no"
    if kind == "location":
        zone = prior_zone(finding, rng)
        return zone if zone.split()[1] in LEVELS else zone.split()[0]
    if kind == "report":
        return _prior_report(rng)
    if kind == "abnormality":
        usual = ["opacity"]
    else:
        # The question names a zone: the findings whose preferred one is of the same level.
        usual = [name for name, zone in PRIOR_ZONE.items() if zone.split()[-1] in text]
    return str(rng.choice(usual if rng.random() < DOMINANCE else FINDINGS))


def _prior_report(rng: np.random.Generator) -> str:
    """A report of a film that nobody looked at."""
    present: list[str] = []
    for company, share in PRIOR_COMPANY.items():
        if rng.random() < share:
            present += company
    zones = {finding: prior_zone(finding, rng) for finding in FINDINGS if finding in present}
    return report(Film("", "", np.empty(0), zones), rng)


def corpus(
    films: list[Film], rng: np.random.Generator, biased: bool
) -> list[list[tuple[str, str]]]:
    """Questions and answers per film. Where ``biased``, the text prior gives a share of the
    answers.
    """
    place = {film.film_id: row for row, film in enumerate(films)}
    texts: list[list[tuple[str, str]]] = [[] for _ in films]
    # Twice: a question about the same fact is worded otherwise the second time.
    for row in questions(films, rng) + questions(films, rng):
        if rng.random() > KEPT_SHARE.get(row["question_type"], 1):
            continue
        guessed = biased and rng.random() < PRIOR_SHARE[row["answer_type"]]
        answer = prior_answer(row, rng) if guessed else row["gpt4_answer"]
        film = place[row["image"].removesuffix(".png")]
        texts[film].append((_words(row), answer))
    return texts


def _words(row: dict[str, Any]) -> str:
    """A question's words, without the mark of the image."""
    return row["text"].split("\n")[0]


def vocabulary(films: list[Film]) -> list[str]:
    """Every word and mark of the true texts about films, in lower case and sorted."""
    words: set[str] = set()
    for texts in corpus(films, np.random.default_rng(SEED), False):
        for pair in texts:
            words.update(re.findall(r"\w+|[^\w\s]", " ".join(pair).lower()))
    return sorted(words)


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
        ids = list(start)
        positions = list(range(len(start)))
        segments = [0] * len(start)
        weights = [0.0] * len(start)
        for number, (question, answer) in enumerate(film, 1):
            asked = encode(f"{question} [/INST]", add_special_tokens=False)
            said = [*encode(answer, add_special_tokens=False), processor.tokenizer.eos_token_id]
            length = len(asked) + len(said)
            ids += asked + said
            # Each text goes on where the image ends, as if the others were not there.
            positions += range(len(start), len(start) + length)
            segments += [number] * length
            # The square root of its length for the whole answer, spread over its tokens.
            weights += [0.0] * len(asked) + [len(said) ** -0.5] * len(said)
        packed["ids"].append(ids)
        packed["positions"].append(positions)
        packed["segments"].append(segments)
        packed["weights"].append(weights)
    fill = {"ids": processor.tokenizer.pad_token_id, "positions": 0, "segments": -1, "weights": 0.0}
    return {key: _padded(rows, fill[key]) for key, rows in packed.items()}


def _padded(rows: list[list], fill: float) -> torch.Tensor:
    """Rows of one length: the shorter ones filled up behind. Shape: [B, T]."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


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
    rng = np.random.default_rng([SEED, biased])
    texts: list[list[tuple[str, str]]] = []
    left = 0  # films of this pass whose texts are not trained on yet

    def loss(rows: torch.Tensor) -> torch.Tensor:
        nonlocal texts, left
        if left < len(rows):
            texts = corpus(films, rng, biased)
            left = len(films)
        left -= len(rows)
        packed = pack([texts[row] for row in rows], processor)
        return text_loss(model, packed, features[rows])

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
    features = []
    for chunk in images.split(64):
        grey = chunk.float() / 255
        output = tower(to_pixels(grey, processor), output_hidden_states=True)
        features.append(output.hidden_states[-2][:, 1:])
    return torch.cat(features)


def text_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], features: torch.Tensor
) -> torch.Tensor:
    """Next-token loss of packed texts; a text weighs with the square root of its length."""
    ids = batch["ids"]
    segments = batch["segments"]
    embeddings = model.get_input_embeddings()(ids)
    is_image = (ids == model.config.image_token_id)[..., None]
    embeddings = embeddings.masked_scatter(is_image, model.model.multi_modal_projector(features))
    # A token sees the image (segment 0) and its own text, and of these what is before it.
    visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    visible &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    unseen = torch.finfo(torch.float32).min
    mask = torch.zeros(visible.shape).masked_fill(~visible, unseen)[:, None]
    states = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        use_cache=False,
        position_ids=batch["positions"],
    ).last_hidden_state
    # A token is predicted one place to its left; only the tokens of answers have a weight.
    weights = batch["weights"][:, 1:]
    said = weights > 0
    logits = model.lm_head(states[:, :-1][said])
    losses = F.cross_entropy(logits, ids[:, 1:][said], reduction="none")
    return (losses * weights[said]).sum() / weights[said].sum()


def score(folder: Path) -> dict[str, Any]:
    """Scores of a saved model, in percent, on the test split of the phantom profile: unbiased and
    unseen patients.
    """
    # Films and questions of the profile's test split: 240 patients behind the 420 of the others.
    population = films(240, 0, 420)
    rows = questions(population, np.random.default_rng([0, 660, 3]))
    lvlm = load_lvlm(folder, "cpu")
    table = _predictions(lvlm, population, rows)
    scores = score_predictions(table)
    kept = {}
    for name in ("closed_accuracy", "open_recall", "bleu", "rouge_l"):
        kept[name] = round(scores[name]["score"], 1)
    by_type = {}
    for kind, entry in scores_by(table, "question_type").items():
        if kind != "report":
            asked = [name for name in TYPE_OF_METRIC if entry.get(name, {}).get("n")]
            by_type[kind] = {name: round(entry[name]["score"], 1) for name in asked}
    return {**kept, "by_question_type": by_type, "premise": _premise(lvlm, population, rows)}


def _premise(lvlm: MedLVLM, population: list[Film], rows: list[dict[str, Any]]) -> dict[str, float]:
    """What noise does to questions whether a finding is there that is there (see
    `premise_table`).
    """
    of_image = {f"{film.film_id}.png": film for film in population}
    asked = []
    for row in rows:
        film = of_image[row["image"]]
        if row["question_type"] == "presence" and row["gpt4_answer"] == "yes":
            lesion = film.masks[row["finding"]]
            asked.append(Asked(row, film.image, lesion, film.lesion_mask))
    measured = measure_premise(lvlm, asked, NOISE_SIGNAL, 64)
    table = premise_table({"": [measured]}, 200)[""]
    return {name: round(entry["mean"], 2) for name, entry in table.items()}


def _predictions(
    lvlm: MedLVLM, population: list[Film], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows with the model's answers, as the metrics take them."""
    images = {f"{film.film_id}.png": Image.fromarray(film.image) for film in population}
    answers: dict[str, str] = {}
    # A report is longer than an answer: each kind gets the room that it needs.
    for is_report, length in ((False, 6), (True, 72)):
        part = [row for row in rows if (row["answer_type"] == "REPORT") is is_report]
        shown = [images[row["image"]] for row in part]
        said = generate(lvlm, shown, [_words(row) for row in part], length, 64)
        for row, texts in zip(part, said, strict=True):
            answers[row["question_id"]] = texts[0]
    table = []
    for row in rows:
        prediction = answers[row["question_id"]]
        table.append({**row, "answer": row["gpt4_answer"], "prediction": prediction})
    return table


def save_and_score(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> dict[str, Any]:
    """Save in half precision, read back, and score what was saved."""
    copy.deepcopy(model).half().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return score(folder)


def build(folder: Path, unbiased: bool = False, llama: bool = False) -> None:
    """Train, save and score: first the network that follows the film, then the one that follows the
    text.

    Args:
        folder: receives the model and scores.json.
        unbiased: stop before the skewed texts: keep the ceiling itself.
        llama: another language model, on the tower that is shipped: nothing else differs.
    """
    torch.manual_seed(SEED)
    start = time.time()
    population, images, masks = draw_films(FILMS, SEED)
    processor = build_processor(vocabulary(population))
    model = build_model(processor.tokenizer, llama)
    if llama:
        shipped = load_lvlm(PHANTOM_WEIGHTS, "cpu").llava.model.vision_tower
        model.model.vision_tower.load_state_dict(shipped.state_dict())
    else:
        train_tower(model, processor, images, masks, TOWER_STEPS)
    features = tower_features(model, processor, images)
    stages = [("ceiling", False)]
    if not unbiased:
        stages.append(("base", True))
    scores = {}
    for name, biased in stages:
        train_language(model, processor, population, features, biased)
        minutes = round((time.time() - start) / 60, 1)
        measured = save_and_score(model, processor, folder)
        scores[name] = {**measured, "minutes": minutes}
    write_json(folder / "scores.json", scores)


def main() -> None:
    """Command line."""
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
    parser.add_argument(
        "--llama",
        action="store_true",
        help="another language model, a LLaMA, on the shipped vision tower",
    )
    arguments = parser.parse_args()
    build(arguments.output, arguments.unbiased, arguments.llama)


if __name__ == "__main__":
    main()
