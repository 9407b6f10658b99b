"""Is the premise of the visual pairs true: does noise on the lesion, and only there, hide it?

A visual pair prefers an answer on the clean film to the same answer on the noised one (arXiv
2412.06141, curation). That teaches to look at the lesion only if the noise takes away what the
answer rests on. Here it is measured: the answer's log-probability, and the greedy answer, on the
clean film and with noise on the true lesion, on the visual tool's mask, and elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from trl.data_utils import apply_chat_template

from ..base.bootstrap import bootstrap_interval, mean_percent
from ..base.rows import Row, patient_of, question_text
from ..dataset import FilmDataset
from ..evaluate import asked_questions
from ..lvlm import MedLVLM, generate, image_token_count
from ..medklip import load_medklip
from ..noise import lesion_mask, noised_pixels
from ..pairs import generator, medklip_tool
from ..profiles import Profile

CONDITIONS = ("clean", "lesion", "tool", "elsewhere")
TRIED_PLACES = 64
ANSWER_TOKENS = 16  # of the longest answer that is no report


def elsewhere(mask: np.ndarray, avoid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask of the same area and shape at another place: the control of noise on a lesion.

    Args:
        mask: the region, bool. Shape: [H, W].
        avoid: what the moved region shall not touch, bool. Shape: [H, W].
        rng: draws the places that are tried; the region wraps round the film's edges.

    Returns:
        bool, of as many pixels as ``mask``: at the first of 64 places that touches nothing of
        ``avoid``, or the one that touches least. Shape: [H, W].
    """
    height, width = mask.shape
    shifts = rng.integers((height, width), size=(TRIED_PLACES, 2))
    best = mask
    touched = mask.size + 1
    for down, right in shifts:
        moved = np.roll(mask, (down, right), (0, 1))
        overlap = int((moved & avoid).sum())
        if overlap < touched:
            best = moved
            touched = overlap
        if overlap == 0:
            break
    return best


def noised_films(
    pixels: np.ndarray,
    lesion: np.ndarray,
    avoid: np.ndarray,
    tool_mask: np.ndarray | None,
    signal: float,
    rng: np.random.Generator,
) -> dict[str, Image.Image]:
    """One film as each condition shows it.

    Args:
        pixels: uint8. Shape: [H, W].
        lesion: what the question asks about, bool. Shape: [H, W].
        avoid: all lesions of the film, bool. Shape: [H, W].
        tool_mask: the visual tool's mask of the film, in [0, 1], or None. Shape: [H, W].
        signal: share of the signal that stays under noise, 0 to 1.

    Returns:
        a film for each of `CONDITIONS`; without ``tool`` where there is no such mask.
    """
    regions = {"lesion": lesion, "elsewhere": elsewhere(lesion, avoid, rng)}
    if tool_mask is not None:
        regions["tool"] = tool_mask
    shown = {"clean": Image.fromarray(pixels)}
    for name, region in regions.items():
        changed = noised_pixels(pixels, region.astype(np.float32), "localized", signal, rng)
        shown[name] = Image.fromarray(changed)
    return {name: shown[name] for name in CONDITIONS if name in shown}


@torch.inference_mode()
def answer_logps(
    lvlm: MedLVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    answers: Sequence[str],
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each answer given image and question.

    Returns:
        the sum over the answer's tokens and the end mark, in nats, and how many tokens these are.
        Shape: [N] each.
    """
    processor = lvlm.processor
    marks = processor.image_token * image_token_count(processor)
    logps: list[float] = []
    tokens: list[int] = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        rows = []
        lengths = []
        for question, answer in zip(questions[part], answers[part], strict=True):
            asked = [{"type": "image"}, {"type": "text", "text": question}]
            said = [{"type": "text", "text": answer}]
            messages = {
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": said}],
            }
            texts = apply_chat_template(messages, processor)
            before = texts["prompt"].replace(processor.image_token, marks)
            encode = processor.tokenizer.encode
            answer_ids = encode(texts["completion"], add_special_tokens=False)
            rows.append(torch.tensor(encode(before, add_special_tokens=False) + answer_ids))
            lengths.append(len(answer_ids))
        sizes = torch.tensor([len(row) for row in rows])
        pad = processor.tokenizer.pad_token_id
        ids = pad_sequence(rows, batch_first=True, padding_value=pad).to(lvlm.device)
        seen = (torch.arange(ids.shape[1]) < sizes[:, None]).long().to(lvlm.device)
        films = [image.convert("RGB") for image in images[part]]
        pixels = processor.image_processor(films, return_tensors="pt")["pixel_values"]
        logits = lvlm.llava(
            input_ids=ids,
            attention_mask=seen,
            pixel_values=pixels.to(lvlm.device, lvlm.llava.dtype),
            use_cache=False,
        ).logits.float()
        each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        for row, size, length in zip(each, sizes.tolist(), lengths, strict=True):
            logps.append(float(row[size - 1 - length : size - 1].sum()))
            tokens.append(length)
    return np.array(logps), np.array(tokens)


@dataclass(frozen=True)
class Asked:
    """One question, with what its film shows.

    Attributes:
        row: the question, with its answer.
        pixels: the film, uint8. Shape: [H, W].
        lesion: the finding that the question asks about (of a report: all), bool. Shape: [H, W].
        lesions: all findings of the film, bool. Shape: [H, W].
        tool_mask: the visual tool's mask, in [0, 1], or None. Shape: [H, W].
    """

    row: Row
    pixels: np.ndarray
    lesion: np.ndarray
    lesions: np.ndarray
    tool_mask: np.ndarray | None = None


def asked_region(masks: Mapping[str, np.ndarray], finding: str) -> np.ndarray | None:
    """What a question asks about: its finding's mask, of a report ("all") the union; None where the
    film does not show it. Shape: [H, W], bool.
    """
    asked = [mask for name, mask in masks.items() if finding in (name, "all")]
    return np.any(asked, axis=0) if asked else None


def asked_about_lesions(
    questions: Sequence[Row], dataset: FilmDataset, heat: Mapping[str, np.ndarray]
) -> list[Asked]:
    """The questions whose finding lies on their film, with its mask; all others rest on nothing
    that noise could hide.

    Args:
        heat: the visual tool's map of each image, by name. Shape: [14, 14] each.
    """
    found = []
    for row in questions:
        masks = dataset.masks(row["image"])
        lesion = asked_region(masks, row.get("finding", ""))
        if lesion is None:
            continue
        lesions = np.any(list(masks.values()), axis=0)
        pixels = np.asarray(dataset.image(row["image"]).convert("L"))
        tool_mask = lesion_mask(heat[row["image"]], lesion.shape)
        found.append(Asked(row, pixels, lesion, lesions, tool_mask))
    return found


def heat_maps(
    profile: Profile, dataset: FilmDataset, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The visual tool's map of each film, by name. Shape: [14, 14] each."""
    values = profile.visual_tool
    look = medklip_tool(load_medklip(values.checkpoint), values.query)
    maps: dict[str, np.ndarray] = {}
    for start in range(0, len(names), values.batch_size):
        part = names[start : start + values.batch_size]
        heat, _ = look([dataset.image(name) for name in part])
        maps |= dict(zip(part, heat, strict=True))
    return maps


def asked_of_split(profile: Profile, dataset: FilmDataset, split: str) -> list[Asked]:
    """The questions of a split that ask about a lesion on their film; none where no lesion is known
    or the data set has no such split.
    """
    questions = []
    for row in asked_questions(profile, dataset, split) if split in dataset.questions else ():
        if asked_region(dataset.masks(row["image"]), row.get("finding", "")) is not None:
            questions.append(row)
    names = list(dict.fromkeys(row["image"] for row in questions))
    return asked_about_lesions(questions, dataset, heat_maps(profile, dataset, names))


def measure_premise(
    lvlm: MedLVLM, asked: Sequence[Asked], signal: float, batch_size: int, seed: int = 0
) -> list[Row]:
    """What noise does to the true answer's log-probability and to the greedy answer.

    Args:
        signal: share of the signal that stays under noise, 0 to 1.
        seed: with a question's id it draws the noise and the control's place, so that every model
            sees the same films.

    Returns:
        per question its keys, and for each of `CONDITIONS` ``logp`` (nats) and ``said``; reports
        are not generated, and ``said`` is empty.
    """
    shown: dict[str, list[Image.Image]] = {name: [] for name in CONDITIONS}
    for item in asked:
        rng = generator(seed, str(item.row["question_id"]))
        views = noised_films(item.pixels, item.lesion, item.lesions, item.tool_mask, signal, rng)
        for name, film in views.items():
            shown[name].append(film)
    texts = [question_text(item.row) for item in asked]
    answers = [item.row["gpt4_answer"] for item in asked]
    short = [n for n, item in enumerate(asked) if item.row["answer_type"] != "REPORT"]
    rows = [{**item.row, "logp": {}, "said": {}} for item in asked]
    for name, films in shown.items():
        if not films:
            continue
        logps, _ = answer_logps(lvlm, films, texts, answers, batch_size)
        for row, logp in zip(rows, logps, strict=True):
            row["logp"][name] = float(logp)
        said = generate(
            lvlm, [films[n] for n in short], [texts[n] for n in short], ANSWER_TOKENS, batch_size
        )
        for n, samples in zip(short, said, strict=True):
            rows[n]["said"][name] = samples[0]
    return rows


def premise_table(
    models: Mapping[str, Sequence[Sequence[Row]]], samples: int
) -> dict[str, dict[str, dict[str, float]]]:
    """What the noise takes away from each model, with 95% intervals over patients and seeds.

    Args:
        models: for each name, one list of `measure_premise` per training seed.

    Returns:
        ``{name: {quantity: {"mean", "low", "high", "seeds"}}}``; ``lesion_drop``, ``tool_drop``
        and ``elsewhere_drop`` are log-probability on the clean film minus that under noise, in
        nats; ``lesion_minus_elsewhere`` is the part that needs the lesion; ``lesion_flips``,
        ``tool_flips`` and ``elsewhere_flips`` are shares, in percent, of the greedy answers that
        the noise changes.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for model, seeds in models.items():
        rows = [row for of_seed in seeds for row in of_seed]
        numbers = [number for number, of_seed in enumerate(seeds) for _ in of_seed]
        table[model] = {}
        for name, values in _quantities(rows).items():
            known = [n for n, value in enumerate(values) if value is not None]
            if not known:
                continue
            mean, low, high = bootstrap_interval(
                np.array([values[n] for n in known], float),
                [patient_of(rows[n]) for n in known],
                [numbers[n] for n in known],
                samples,
                statistic=mean_percent,
            )
            # A share is said in percent, a log-probability in nats.
            unit = 1 if name.endswith("_flips") else 100
            interval = {"mean": mean / unit, "low": low / unit, "high": high / unit}
            table[model][name] = interval | {"seeds": len(seeds)}
    return table


def _quantities(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """The quantities of `premise_table`, one value a row; None where a row has none."""
    found: dict[str, list[float | None]] = {}
    for name in CONDITIONS[1:]:
        drops: list[float | None] = []
        flips: list[float | None] = []
        for row in rows:
            logp = row["logp"]
            said = row["said"]
            drops.append(logp["clean"] - logp[name] if name in logp else None)
            flips.append(float(said[name] != said["clean"]) if name in said else None)
        found[f"{name}_drop"] = drops
        found[f"{name}_flips"] = flips
    found["lesion_minus_elsewhere"] = [
        row["logp"]["elsewhere"] - row["logp"]["lesion"] for row in rows
    ]
    return found
