"""One model over a test split: predictions, and what they depend on.

`predict` writes JSON lines that anyone can read, score or replace; every score comes from such a
file (metrics.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .base.errors import InputError, first_line
from .base.files import read_or_compute, read_text, write_json_lines
from .base.images import open_image, resolve_image, with_images
from .base.rows import ANSWER_TYPES, Row, check_prediction, patient_of, question_text, row_sha
from .base.tensors import model_digest
from .dataset import FilmDataset
from .lvlm import MedLVLM, generate, load_profile_lvlm
from .profiles import Profile

T = TypeVar("T")
ROW_KEYS = ("question_id", "image", "patient_id", "finding", "question_type", "answer_type")


@dataclass(frozen=True)
class Decoding:
    """How questions are answered.

    Attributes:
        template: a name in `chat_templates.TEMPLATES`; None is the profile's own.
        temperature: 0 decodes greedily, above 0 samples (seed 0).
        answer_tokens: the longest closed or open answer.
        report_tokens: the longest report.
    """

    template: str | None
    temperature: float
    answer_tokens: int
    report_tokens: int


# The authors' inference: Vicuna's template on a Mistral model, and sampling, as their scripts set
# it.
RELEASED_DECODING = Decoding("v1", 0.2, 64, 1024)


def greedy_decoding(max_new_tokens: int) -> Decoding:
    """Greedy answers: reports get all of ``max_new_tokens``, other answers a quarter of it (16 at
    least).
    """
    short = min(max_new_tokens, max(16, max_new_tokens // 4))
    return Decoding(None, 0.0, short, max_new_tokens)


def profile_decoding(profile: Profile) -> Decoding:
    """What the profile's ``evaluation.decoding`` says."""
    if profile.evaluation.decoding == "released":
        return RELEASED_DECODING
    return greedy_decoding(profile.lvlm.max_new_tokens)


def shuffled_images(questions: Sequence[Row], seed: int) -> list[str]:
    """For each question the image of another patient; two questions about one image share their new
    image.

    The patients are put in a random circle and each takes the next one's image, so that nobody
    keeps his own.

    Raises:
        InputError: there are fewer than two patients.
    """
    images: dict[str, list[str]] = {}
    for row in questions:
        of_patient = images.setdefault(patient_of(row), [])
        if row["image"] not in of_patient:
            of_patient.append(row["image"])
    if len(images) < 2:
        raise InputError(
            "questions: shuffling the images needs two patients or more; give a split with more "
            "patients"
        )
    circle = np.random.default_rng(seed).permutation(sorted(images)).tolist()
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    shown: dict[tuple[str, str], str] = {}
    for patient, names in images.items():
        others = images[following[patient]]
        for number, name in enumerate(names):
            shown[patient, name] = others[number % len(others)]
    return [shown[patient_of(row), row["image"]] for row in questions]


def _inputs_digest(
    lvlm: MedLVLM,
    questions: Sequence[Row],
    images: Sequence[Path],
    decoding: Decoding,
    batch_size: int,
) -> str:
    """SHA-256 (hexadecimal) of all that predictions depend on."""
    # Sampled answers depend on who shares a batch; greedy ones do not.
    batch = batch_size if decoding.temperature > 0 else None
    ways = (*astuple(decoding), batch)
    digest = hashlib.sha256()
    digest.update(f"{model_digest(lvlm.model)} {ways} {lvlm.processor.chat_template}".encode())
    digest.update(f"{row_sha(questions)} {[path.name for path in images]}".encode())
    for path in sorted(set(images)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def in_parts(items: Sequence[T], batch_size: int) -> list[Sequence[T]]:
    """Sixteen batches at a time: neighbours share an image, which is encoded once, and memory stays
    bounded.
    """
    size = 16 * batch_size
    return [items[start : start + size] for start in range(0, len(items), size)]


def known_keys(row: dict[str, Any]) -> dict[str, Any]:
    """The keys of a question that its predictions keep."""
    return {key: row[key] for key in ROW_KEYS if key in row}


def read_predictions(path: str | Path) -> list[Row]:
    """Rows of a predictions file.

    Raises:
        InputError: the file cannot be read, or a line of it is not a JSON object with the keys of a
            prediction.
    """
    rows = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: not a JSON object ({first_line(error)}); predict again"
            ) from error
        check_prediction(row, f"{path}, line {number}")
        rows.append(row)
    return rows


def _answers(
    lvlm: MedLVLM,
    questions: Sequence[Row],
    images: Sequence[Path],
    batch_size: int,
    decoding: Decoding,
) -> list[str]:
    """One answer a question. Questions of one type share a batch, because the longest answer sets a
    batch's time.
    """
    answers = [""] * len(questions)
    for kind in ANSWER_TYPES:
        places = [place for place, row in enumerate(questions) if row["answer_type"] == kind]
        tokens = decoding.report_tokens if kind == "REPORT" else decoding.answer_tokens
        for part in in_parts(places, batch_size):
            texts = generate(
                lvlm,
                [open_image(images[place]) for place in part],
                [question_text(questions[place]) for place in part],
                max_new_tokens=tokens,
                batch_size=batch_size,
                temperature=decoding.temperature,
            )
            for place, samples in zip(part, texts, strict=True):
                answers[place] = samples[0]
    return answers


def predict(
    lvlm: MedLVLM,
    questions: Sequence[Row],
    image_root: str | Path,
    path: str | Path,
    batch_size: int,
    decoding: Decoding,
    shuffle_images: int | None = None,
) -> list[Row]:
    """Answer every question and write the predictions, or read them where they were written
    already.

    Args:
        questions: rows of `preference_rows.read_questions`.
        path: the predictions file (JSON lines), see `read_or_compute`.
        decoding: how the answers are written; its template is the one that ``lvlm`` was loaded
            with.
        shuffle_images: None, or the seed by which each question is asked about another patient's
            image (key ``shown_image``). A gain that survives this comes from the text.

    Returns:
        one row per question, in the order of ``questions``.
    """
    shown = [row["image"] for row in questions]
    if shuffle_images is not None:
        shown = shuffled_images(questions, shuffle_images)
    images = [resolve_image(image_root, name) for name in shown]

    def compute() -> None:
        answers = _answers(lvlm, questions, images, batch_size, decoding)
        rows = []
        for question, answer, image in zip(questions, answers, shown, strict=True):
            row = known_keys(question)
            row["question"] = question_text(question)
            row["answer"] = question["gpt4_answer"]
            row["prediction"] = answer
            if shuffle_images is not None:
                row["shown_image"] = image
            rows.append(row)
        write_json_lines(path, rows)

    read_or_compute(path, _inputs_digest(lvlm, questions, images, decoding, batch_size), compute)
    return read_predictions(path)


def asked_questions(profile: Profile, dataset: FilmDataset, split: str = "test") -> list[Row]:
    """A split's questions, ``evaluation.questions`` at most, spread over the whole split.

    A question whose image cannot be opened is left out, with a warning.
    """
    rows = dataset.questions[split]
    if profile.evaluation.questions is not None:
        rows = rows[:: max(1, -(-len(rows) // profile.evaluation.questions))]
    return with_images(rows, dataset.image_root, split, decode=True)


def predict_test_split(
    profile: Profile,
    dataset: FilmDataset,
    label: str,
    adapter: str | Path | None,
    shuffle: bool = False,
) -> list[Row]:
    """One model's predictions on the test split, in ``evaluation/<label>.jsonl`` (see `predict`).

    Args:
        adapter: an adapter, as `adapters.adapter_folder` finds it; None is the base model.
        shuffle: ask each question about another patient's image.
    """
    decoding = profile_decoding(profile)
    lvlm = load_profile_lvlm(profile, adapter, template=decoding.template)
    path = profile.output / "evaluation" / f"{label}.jsonl"
    seed = profile.seed if shuffle else None
    return predict(
        lvlm,
        asked_questions(profile, dataset),
        dataset.image_root,
        path,
        profile.evaluation.batch_size,
        decoding,
        seed,
    )
