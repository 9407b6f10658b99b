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
    images = sorted({row["image"] for row in text})
    if len(images) < 2:
        raise ValueError(f"text pairs of {len(images)} image(s); a leak needs two images or more")
    order = np.random.default_rng(seed).permutation(images)
    learnt = set(order[: len(order) // 2])
    kept = [answer_text(row) for row in text]
    rejected = [answer_text(row, rejected=True) for row in text]
    bags = CountVectorizer(tokenizer=words, lowercase=False, token_pattern=None)
    bags.fit(kept + rejected)
    sides = [_features(bags, kept), _features(bags, rejected)]
    known = np.array([row["image"] in learnt for row in text])
    features = vstack([side[known] for side in sides])
    labels = np.repeat([0, 1], known.sum())
    model = LogisticRegression(max_iter=1000).fit(features, labels)
    scores = [model.decision_function(side[~known]) for side in sides]
    won = (scores[1] > scores[0]) + 0.5 * (scores[1] == scores[0])
    longer = [len(words(no)) > len(words(yes)) for yes, no in zip(kept, rejected, strict=True)]
    return {
        "ranked_right": 100 * float(np.mean(won)),
        "rejected_longer": 100 * float(np.mean(longer)),
        "pairs": int((~known).sum()),
    }


def _features(bags: CountVectorizer, texts: Sequence[str]) -> csr_matrix:
    """Counts of words, and how many there are on a logarithmic scale. Shape: [N, words + 1]."""
    lengths = [[np.log1p(len(words(text)))] for text in texts]
    return hstack([bags.transform(texts), csr_matrix(lengths)]).tocsr()
