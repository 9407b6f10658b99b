"""Rejected responses of text pairs (arXiv 2412.06141, stage 1): sampled and judged, or written by
the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import InputError
from .manifests import IMAGE_MARK, open_image, question_text, resolve_image
from .metrics import words

CHUNK = 64


class Judge(Protocol):
    """What compares a response with the reference answer: a language model, or rules that know the
    facts.
    """

    def conflict(self, question: str, answer: str, response: str) -> float:
        """How strongly ``response`` contradicts ``answer``, from 0 (agrees) to 1."""

    def write(self, question: str, answer: str, rng: np.random.Generator) -> str:
        """A hallucinated response: a wrong finding, place or diagnosis, made from ``answer``."""


@dataclass(frozen=True)
class Rejected:
    """A rejected response, where it comes from (``sampled`` or ``written``), and its conflict in
    [0, 1].
    """

    text: str
    origin: str
    conflict: float


def sample_candidates(
    generate: Callable[..., list[list[str]]],
    questions: Sequence[dict[str, Any]],
    image_root: str | Path,
    candidates: int,
    temperature: float,
    seed: int = 0,
) -> list[list[str]]:
    """Sample several responses per question from the target model.

    Args:
        generate: called as ``generate(images, texts, samples=, temperature=, seed=)`` for up to 64
            questions at a time; returns one list of responses per question (``lvlm.generate`` with
            the model bound).
        questions: rows of ``read_questions``.

    Returns:
        ``candidates`` responses per question, in order.
    """
    responses: list[list[str]] = []
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        images = [open_image(resolve_image(image_root, question["image"])) for question in chunk]
        texts = [question_text(question) for question in chunk]
        responses += generate(
            images, texts, samples=candidates, temperature=temperature, seed=seed + start
        )
    return responses


def choose_rejected(
    question: str,
    answer: str,
    candidates: Sequence[str],
    judge: Judge,
    threshold: float,
    rng: np.random.Generator,
) -> Rejected:
    """The candidate with the strongest conflict, or a written hallucination where none reaches
    ``threshold``.

    Raises:
        InputError: the judge's conflict lies outside [0, 1], or it writes the reference answer
            itself.
    """

    def graded(text: str, origin: str) -> Rejected:
        text = text.replace(
            IMAGE_MARK, " "
        ).strip()  # a model may write the mark, and no answer may hold it
        conflict = judge.conflict(question, answer, text)
        if not 0 <= conflict <= 1:
            raise InputError(
                f"judge: gave the conflict {conflict!r} for {text!r:.80}; expected a value from 0 "
                "to 1"
            )
        return Rejected(text, origin, conflict)

    best = max(
        (graded(text, "sampled") for text in candidates),
        key=lambda item: item.conflict,
        default=None,
    )
    if best is not None and best.text and best.conflict >= threshold:
        return best
    written = graded(judge.write(question, answer, rng), "written")
    if not written.text or words(written.text) == words(answer):
        raise InputError(
            f"judge: wrote {written.text!r} for the question {question!r:.80}, which rejects "
            "nothing"
        )
    return written
