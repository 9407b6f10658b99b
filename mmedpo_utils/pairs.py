"""Preference pairs: text pairs D_t, visual pairs D_v, and both in one manifest D_o (arXiv
2412.06141, curation).
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .base.rows import Row, question_text
from .base.words import opener
from .medklip import MedKLIP, confidence, heat_map
from .preference_rows import answer_text, pair_row, row_source
from .relevance import Judge, Member, choose_rejected, debate

SMALLEST_BATCH = 8
Wording = Callable[[str, str, str], str]
HeatMapTool = Callable[[Sequence[Image.Image]], tuple[np.ndarray, np.ndarray]]


def medklip_tool(model: MedKLIP, query: str = "disease") -> HeatMapTool:
    """Bind the visual tool: images to heat maps [B, 14, 14] and confidences [B] in [0, 1] for
    ``query``.
    """

    @torch.inference_mode()
    def look(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        # The kernels for few images round differently, and an image shall read the same in every
        # batch: a small one is filled up with copies of its last image.
        filled = list(images)
        while len(filled) < SMALLEST_BATCH:
            filled.append(images[-1])
        output = model(model.preprocess(filled))
        heat = heat_map(output, query)[: len(images)]
        scores = confidence(output, query)[: len(images)]
        return heat.cpu().numpy(), scores.cpu().numpy()

    return look


def pick_questions(questions: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most ``count`` of the questions, drawn without replacement, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(questions))[:count]
    return [questions[index] for index in sorted(chosen)]


def text_pairs(
    questions: Sequence[Row],
    candidates: Sequence[Sequence[str]],
    judge: Judge,
    members: Sequence[Member],
    threshold: float,
    rounds: int,
    seed: int,
    wording: Wording | None = None,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """D_t: same image; preferred is the reference answer, rejected a hallucinated response scored
    by the panel.

    Args:
        questions: rows of ``read_questions``.
        candidates: sampled responses, one sequence per question.
        threshold: conflict from which a sampled response is taken.
        seed: with the question's id it decides what the judge writes, whatever the order of the
            questions.
        wording: called with a question's id, its text and the rejected answer; what it returns is
            judged and kept. None leaves the answer as it is.

    Returns:
        preference rows (``origin``: sampled or written), and per row the debate with its history.
    """
    rows = []
    debates = []
    for question, responses in zip(questions, candidates, strict=True):
        text = question_text(question)
        answer = question["gpt4_answer"]
        rng = generator(seed, str(question["question_id"]))
        rejected = choose_rejected(text, answer, responses, judge, threshold, rng)
        said = rejected.text
        if wording is not None:
            said = wording(str(question["question_id"]), text, said)
        result = debate(text, answer, said, members, rounds)
        row = pair_row(question, said, result.score, source="text", origin=rejected.origin)
        rows.append(row)
        debates.append(
            {
                "id": question["question_id"],
                "question": text,
                "answer": answer,
                "rejected": said,
                "claim": rejected.text,  # before it was worded
                "origin": rejected.origin,
                "conflict": rejected.conflict,
                **result.as_dict(),
            }
        )
    return rows, debates


def visual_pairs(questions: Sequence[Row], records: Sequence[Row]) -> list[Row]:
    """D_v: same answer; preferred with the image, rejected with its noised copy.

    Args:
        questions: rows of ``read_questions``.
        records: per image its noised copy, ``image``, ``rejected_image``, ``confidence`` (the
            visual tool's, the raw relevance) and ``changed``; or ``skipped`` where it has none.

    Returns:
        preference rows of the questions whose image has a noised copy. Warns where the noise left
        an image as it is.
    """
    made = {record["image"]: record for record in records if "skipped" not in record}
    unchanged = [name for name, record in made.items() if not record["changed"]]
    if unchanged:
        warnings.warn(
            f"{len(unchanged)} of {len(made)} images are left unchanged by the noise and teach "
            f"nothing ({', '.join(unchanged[:5])}); check the profile's noise section",
            stacklevel=3,
        )
    rows = []
    for question in questions:
        record = made.get(question["image"])
        if record is not None:
            row = pair_row(
                question,
                question["gpt4_answer"],
                record["confidence"],
                source="visual",
                rejected_image=record["rejected_image"],
            )
            rows.append(row)
    return rows


def stays_true(row: Row) -> bool:
    """Whether noise cannot make a visual pair's answer untrue: it says "no", and noise adds nothing
    that could be seen.
    """
    return row_source(row) == "visual" and opener(answer_text(row)) == "no"


def merge_pairs(text_rows: Sequence[Row], visual_rows: Sequence[Row]) -> list[Row]:
    """D_o: text rows, then visual rows, each with its ``source``; text rows without an ``origin``
    are released ones.
    """
    rows = [{"origin": "released", **row, "source": row_source(row)} for row in text_rows]
    return rows + [row | {"source": row_source(row)} for row in visual_rows]


def generator(seed: int, name: str) -> np.random.Generator:
    """Random draws that ``seed`` and ``name`` decide, whatever the order of the names."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
