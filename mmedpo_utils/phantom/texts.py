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
from .world import FINDINGS, IMAGE_SIZE, LEVELS, SIDES, Film, films

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
    article = "an" if finding[0] in "aeiou" else "a"
    return f"{article} {finding}"


def report(film: Film, rng: np.random.Generator) -> str:
    """A report of one film: a sentence per finding that is present, one for the heart, one for what
    is absent.
    """
    zones = film.zones
    if "cardiomegaly" in zones:
        heart = ("The heart is enlarged.", "There is cardiomegaly.")
    else:
        heart = ("The heart is normal in size.", "The heart size is normal.")
    sentences = [str(rng.choice(heart))]
    for finding in FINDINGS:
        if finding in zones and finding != "cardiomegaly":
            opening = rng.choice(("There is {}", "The film shows {}"))
            sentences.append(
                f"{opening.format(with_article(finding))} in the {zones[finding]} zone."
            )
    mentioned = ("effusion", "pneumothorax", "opacity")
    absent = [finding for finding in mentioned if finding not in zones]
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
    for finding in FINDINGS:
        rows += _presence_questions(population, finding, rng)
        # The heart has one place, so that nothing is to be asked about it.
        if finding != "cardiomegaly":
            rows += _place_questions(population, finding, rng)
    for film in population:
        if len(film.zones) == 1:
            (finding,) = film.zones
            text = rng.choice(_ONLY)
            rows.append(_row(film, text, finding, "OPEN", finding, "abnormality"))
        rows.append(_row(film, REPORT_PROMPT, report(film, rng), "REPORT", "all", "report"))
    return rows


def _row(
    film: Film, text: str, answer: str, answer_type: str, finding: str, question_type: str
) -> dict[str, Any]:
    """One question about a film in LLaVA-Med's format."""
    return {
        "question_id": f"{film.film_id}-{question_type}-{finding}",
        "image": f"{film.film_id}.png",
        "text": f"{text}\n<image>",
        "gpt4_answer": answer,
        "answer_type": answer_type,
        "patient_id": film.patient_id,
        "finding": finding,
        "question_type": question_type,
    }


def _presence_questions(
    population: list[Film], finding: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Whether a finding is there: asked about as many films with it as without."""
    ill = [film for film in population if finding in film.zones]
    well = [film for film in population if finding not in film.zones]
    each = min(len(ill), len(well))
    rows = []
    for group, answer in ((ill, "yes"), (well, "no")):
        for index in rng.permutation(len(group))[:each]:
            text = rng.choice(_PRESENCE).format(a=with_article(finding))
            rows.append(_row(group[index], text, answer, "CLOSED", finding, "presence"))
    return rows


def _place_questions(
    population: list[Film], finding: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Where a finding is, what is seen there, and, yes and no by turns, whether it is on a side."""
    ill = [film for film in population if finding in film.zones]
    even = len(ill) - len(ill) % 2  # an odd film is asked about no side: yes and no stay balanced
    rows = []
    for turn, index in enumerate(rng.permutation(len(ill))):
        film = ill[index]
        zone = film.zones[finding]
        side, place = zone.split()
        if place in LEVELS:
            text = rng.choice(_WHERE).format(finding=finding)
            rows.append(_row(film, text, zone, "OPEN", finding, "location"))
            text = rng.choice(_WHAT).format(zone=zone)
            rows.append(_row(film, text, finding, "OPEN", finding, "identity"))
        else:
            # Base, apex and diaphragm follow from the finding: only the side is a question.
            text = rng.choice(_WHICH_SIDE).format(finding=finding)
            rows.append(_row(film, text, side, "OPEN", finding, "location"))
        if turn < even:
            is_true = turn % 2 == 1
            asked = side if is_true else SIDES[1 - SIDES.index(side)]
            text = rng.choice(_SIDE).format(finding=finding, side=asked)
            answer = "yes" if is_true else "no"
            rows.append(_row(film, text, answer, "CLOSED", finding, "side"))
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
    folder = Path(folder)
    start = 0
    facts: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
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
                "conspicuity": {name: round(plain, 3) for name, plain in film.conspicuity.items()},
            }
        rows = questions(population, np.random.default_rng([seed, start, 3]))
        write_json_lines(folder / f"{split}_questions.jsonl", rows)
        counts[split] = len(rows)
    write_json(folder / "facts.json", facts)
    return counts


def pack_masks(masks: dict[str, np.ndarray]) -> np.ndarray:
    """Pack one bool mask per finding into the bits of an 8-bit image. Shape: [H, W]."""
    packed = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
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
