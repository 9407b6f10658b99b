"""What is said about a phantom film: closed and open questions and a report, all from the same
facts.

``write_dataset`` writes the three splits to disk in LLaVA-Med's question format, with the facts and
masks beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..base.files import atomic_write, write_json, write_json_lines
from ..base.images import open_image
from ..base.settings import SPLITS
from .world import FINDINGS, LEVELS, SIDES, Film, films

REPORT_PROMPT = "Write the report."
_PRESENCE = ("Is there {a}?", "Does the film show {a}?", "Is {a} present?")
_SIDE = ("Is the {finding} on the {side}?", "Is the {finding} in the {side} side?")
_WHERE = ("Where is the {finding}?", "In which zone is the {finding}?")
_WHICH_SIDE = ("On which side is the {finding}?", "Which side shows the {finding}?")
_WHAT = ("What is seen in the {zone} zone?", "Which finding is in the {zone} zone?")
_ONLY = ("What is the abnormality?", "Which finding does the film show?")


def with_article(finding: str) -> str:
    """The finding as a sentence uses it: "a nodule", "an effusion", but "cardiomegaly" alone."""
    if finding in ("cardiomegaly", "atelectasis", "pneumoperitoneum"):
        return finding
    return f"{'an' if finding[0] in 'aeiou' else 'a'} {finding}"


def report(film: Film, rng: np.random.Generator) -> str:
    """A report of one film: a sentence per finding that is present, one for the heart, one for what
    is absent.
    """
    zones = film.zones
    enlarged = ("The heart is enlarged.", "There is cardiomegaly.")
    normal = ("The heart is normal in size.", "The heart size is normal.")
    sentences = [str(rng.choice(enlarged if "cardiomegaly" in zones else normal))]
    for finding in FINDINGS:
        if finding in zones and finding != "cardiomegaly":
            opening = rng.choice(("There is {}", "The film shows {}")).format(with_article(finding))
            sentences.append(f"{opening} in the {zones[finding]} zone.")
    absent = [f for f in ("effusion", "pneumothorax", "opacity") if f not in zones]
    if absent:
        sentences.append(f"There is no {' or '.join(absent)}.")
    return " ".join(sentences)


def questions(population: list[Film], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Questions about a set of films, with yes and no balanced for each finding and question type.

    Returns:
        one dictionary a question, in LLaVA-Med's format: ``question_id``, ``image``, ``text``,
        ``gpt4_answer``, ``answer_type`` (CLOSED, OPEN or REPORT), and ``patient_id``, ``finding``,
        ``question_type``.
    """
    rows: list[dict[str, Any]] = []

    def ask(
        film: Film, text: str, answer: str, answer_type: str, finding: str, question_type: str
    ) -> None:
        rows.append(
            {
                "question_id": f"{film.film_id}-{question_type}-{finding}",
                "image": f"{film.film_id}.png",
                "text": f"{text}\n<image>",
                "gpt4_answer": answer,
                "answer_type": answer_type,
                "patient_id": film.patient_id,
                "finding": finding,
                "question_type": question_type,
            }
        )

    for finding in FINDINGS:
        ill = [film for film in population if finding in film.zones]
        well = [film for film in population if finding not in film.zones]
        pairs = min(len(ill), len(well))
        for group, answer in ((ill, "yes"), (well, "no")):
            for index in rng.permutation(len(group))[:pairs]:
                text = rng.choice(_PRESENCE).format(a=with_article(finding))
                ask(group[index], text, answer, "CLOSED", finding, "presence")
        if finding == "cardiomegaly":
            continue
        for turn, index in enumerate(rng.permutation(len(ill))):
            film, zone = ill[index], ill[index].zones[finding]
            if zone.split()[1] in LEVELS:
                ask(
                    film,
                    rng.choice(_WHERE).format(finding=finding),
                    zone,
                    "OPEN",
                    finding,
                    "location",
                )
                ask(film, rng.choice(_WHAT).format(zone=zone), finding, "OPEN", finding, "identity")
            else:
                ask(
                    film,
                    rng.choice(_WHICH_SIDE).format(finding=finding),
                    zone.split()[0],
                    "OPEN",
                    finding,
                    "location",
                )
            if turn < len(ill) - len(ill) % 2:
                side = zone.split()[0] if turn % 2 else SIDES[1 - SIDES.index(zone.split()[0])]
                ask(
                    film,
                    rng.choice(_SIDE).format(finding=finding, side=side),
                    "yes" if turn % 2 else "no",
                    "CLOSED",
                    finding,
                    "side",
                )
    for film in population:
        if len(film.zones) == 1:
            ask(film, rng.choice(_ONLY), *film.zones, "OPEN", *film.zones, "abnormality")
        ask(film, REPORT_PROMPT, report(film, rng), "REPORT", "all", "report")
    return rows


def write_dataset(folder: str | Path, sizes: dict[str, int], seed: int) -> dict[str, int]:
    """Draw the phantom data set and write it: films, masks, questions per split, facts.

    Args:
        folder: gets ``images``, ``masks``, ``<split>_questions.jsonl`` and ``facts.json``, which is
            written last.
        sizes: patients per split; no patient is in two splits.

    Returns:
        the number of questions per split.
    """
    folder, start, facts, counts = Path(folder), 0, {}, {}
    for split in SPLITS:
        population = films(sizes[split], seed, start)
        start += sizes[split]
        for film in population:
            _save(folder / "images" / f"{film.film_id}.png", film.image)
            _save(folder / "masks" / f"{film.film_id}.png", pack_masks(film.masks))
            facts[film.film_id] = {
                "patient_id": film.patient_id,
                "split": split,
                "findings": film.zones,
            }
        rows = questions(population, np.random.default_rng([seed, start, 3]))
        write_json_lines(folder / f"{split}_questions.jsonl", rows)
        counts[split] = len(rows)
    write_json(folder / "facts.json", facts)
    return counts


def pack_masks(masks: dict[str, np.ndarray]) -> np.ndarray:
    """Pack one bool mask per finding into the bits of an 8-bit image. Shape: [H, W]."""
    packed = np.zeros((224, 224), np.uint8)
    for finding, mask in masks.items():
        packed |= mask.astype(np.uint8) << FINDINGS.index(finding)
    return packed


def read_masks(path: str | Path) -> dict[str, np.ndarray]:
    """The bool masks of one film, for the findings that have a pixel. Shape: [H, W] each. Raises
    InputError: no image.
    """
    packed = np.asarray(open_image(path))
    masks = {finding: (packed >> bit & 1).astype(bool) for bit, finding in enumerate(FINDINGS)}
    return {finding: mask for finding, mask in masks.items() if mask.any()}


def _save(path: Path, pixels: np.ndarray) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)
