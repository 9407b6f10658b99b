"""Can a preference pair be won without image and question, by the words of its answers alone?

Where it can, DPO may learn the form of a rejected answer and nothing else (arXiv 2412.06141 trains
on such pairs: in the released VQA-RAD file 94% of the rejected answers are the longer ones). A
visual pair has the same words on both sides and cannot be won so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from ..base.rows import Row
from ..base.words import words
from ..preference_rows import answer_text, row_source


def leak(rows: Sequence[Row], seed: int = 0) -> dict[str, float]:
    """How well words and length alone tell which answer of a text pair is the rejected one.

    A logistic regression over bags of words and the number of words learns from the pairs of half
    of the images and is asked about the pairs of the other half; it sees no image and no question.

    Args:
        rows: preference rows; visual pairs are left out.
        seed: draws the half of the images.

    Returns:
        ``ranked_right``: share of the other half's pairs, in percent, in which the rejected answer
        gets the higher score; a tie counts one half. ``rejected_longer``: share of all pairs whose
        rejected answer has more words, in percent. ``pairs``: how many were asked about.

    Raises:
        ValueError: fewer than two images have text pairs.
    """
    text = [row for row in rows if row_source(row) == "text"]
    kept, rejected = _answers(text)
    learnt = _half(text, seed)
    margins = _margins(kept, rejected, learnt)[~learnt]
    longer = [len(words(no)) > len(words(yes)) for yes, no in zip(kept, rejected, strict=True)]
    return {
        "ranked_right": 100 * float(np.mean((1 + np.sign(margins)) / 2)),
        "rejected_longer": 100 * float(np.mean(longer)),
        "pairs": int((~learnt).sum()),
    }


def told_apart(rows: Sequence[Row], seed: int = 0) -> list[float | None]:
    """How sure words and length alone are of each text pair's rejected answer.

    As `leak`, twice: each half of the images is asked by what has learnt from the other.

    Returns:
        for each row the probability (0 to 1) that is given to the right order; None for visual
        pairs, and for all where fewer than two images have text pairs.
    """
    found: list[float | None] = [None] * len(rows)
    places = [number for number, row in enumerate(rows) if row_source(row) == "text"]
    text = [rows[number] for number in places]
    if len({row["image"] for row in text}) < 2:
        return found
    kept, rejected = _answers(text)
    half = _half(text, seed)
    margins = np.where(half, _margins(kept, rejected, ~half), _margins(kept, rejected, half))
    for number, margin in zip(places, margins, strict=True):
        found[number] = float(1 / (1 + np.exp(-margin)))
    return found


def _answers(text: Sequence[Row]) -> tuple[list[str], list[str]]:
    kept = [answer_text(row) for row in text]
    return kept, [answer_text(row, rejected=True) for row in text]


def _half(text: Sequence[Row], seed: int) -> np.ndarray:
    """Which pairs are about the half of the images that is drawn: bool. Shape: [N]."""
    images = sorted({row["image"] for row in text})
    if len(images) < 2:
        raise ValueError(f"text pairs of {len(images)} image(s); a leak needs two images or more")
    order = np.random.default_rng(seed).permutation(images)
    drawn = set(order[: len(order) // 2])
    return np.array([row["image"] in drawn for row in text])


def _margins(kept: Sequence[str], rejected: Sequence[str], learnt: np.ndarray) -> np.ndarray:
    """By how much the rejected answer looks more like one, in logits, to a classifier that learns
    from the pairs ``learnt``. Shape: [N].
    """
    bags = CountVectorizer(tokenizer=words, lowercase=False, token_pattern=None)
    bags.fit([*kept, *rejected])
    sides = [_features(bags, kept), _features(bags, rejected)]
    features = vstack([side[learnt] for side in sides])
    labels = np.repeat([0, 1], learnt.sum())
    model = LogisticRegression(max_iter=1000).fit(features, labels)
    return model.decision_function(sides[1]) - model.decision_function(sides[0])


def _features(bags: CountVectorizer, texts: Sequence[str]) -> csr_matrix:
    """Counts of words, and how many there are on a logarithmic scale. Shape: [N, words + 1]."""
    lengths = [[np.log1p(len(words(text)))] for text in texts]
    return hstack([bags.transform(texts), csr_matrix(lengths)]).tocsr()
