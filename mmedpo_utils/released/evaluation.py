"""The scores of the authors' released evaluation, beside which the kit's own stand in `metrics`.

The paper names no implementation. The authors added one to their repository on 2025-06-05; these
functions give what it gives, for one answer and one prediction at a time. Where its way of counting
surprises, the docstring says so. Its report script ends with an error on a prediction of which
normalisation leaves nothing; here that prediction scores 0. It pairs answers and predictions by
their position in two files; here both are in one row, so that none can slip.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.meteor_score import single_meteor_score
from rouge import Rouge

from ..base.words import LONGEST_REPORT

TABLES = json.loads(Path(__file__).with_name("normalisation.json").read_text("utf-8"))
DIGIT_COMMA = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
# The script passes re.UNICODE, 32, where a count belongs: only so many full stops go.
FULL_STOPS_TAKEN = 32
ORDERS = (1, 2, 3, 4)
_BLEU_N = (
    "nltk's sentence BLEU on {n}-grams alone, smoothing method 7, mean over reports; an exact copy "
    "scores above 100, and one right word is enough for a third of it"
)
METHODS = {
    "released_closed_accuracy": (
        "share of closed questions whose normalised true answer is a substring of the normalised "
        'prediction ("no" is found in "abnormal")'
    ),
    "released_open_recall": (
        "per question tp / (tp + fn), where tp counts the words of the prediction that the truth "
        "has too, as often as the prediction says them; mean over questions"
    ),
    "released_bleu": "mean of released_bleu_1 to released_bleu_4, as in the paper's Table 1",
    **{f"released_bleu_{n}": _BLEU_N.format(n=n) for n in ORDERS},
    "released_rouge_l": (
        f"package rouge, ROUGE-L F, mean over reports, the first {LONGEST_REPORT:,} words of a text"
    ),
    "released_meteor": (
        "nltk's METEOR on white-space tokens of the normalised texts, mean over reports, the first "
        f"{LONGEST_REPORT:,} words of a text"
    ),
}


@lru_cache(100_000)
def normalised_text(text: str) -> str:
    """A text as the released scores see it.

    Lower case; marks go, or become a blank where the text has the mark only inside words; full
    stops go unless a digit follows; number words become digits, articles go, contractions get their
    apostrophe.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    kept = text
    for mark in TABLES["punctuation"]:
        # One such place, or one comma between digits, decides for the whole text.
        beside_blank = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_blank or DIGIT_COMMA.search(text) else " ")
    kept = FULL_STOP.sub("", kept, count=FULL_STOPS_TAKEN)
    words = []
    for word in kept.lower().split():
        word = TABLES["number_words"].get(word, word)
        if word not in TABLES["articles"]:
            words.append(TABLES["contractions"].get(word, word))
    return " ".join(words)


def closed_correct(answer: str, prediction: str) -> bool:
    """Whether the normalised answer is a substring of the normalised prediction."""
    return normalised_text(answer) in normalised_text(prediction)


def word_overlap(answer: str, prediction: str) -> dict[str, float]:
    """Exact match, precision, recall and F1 over the words of both, each from 0.

    A word that the prediction repeats counts as often as it is repeated, so that repeating a right
    word raises the recall. ``exact_match`` is no equality: it is the number of different true words
    that the prediction has, by the number of words that it says.
    """
    truth = Counter(normalised_text(answer).split())
    said = Counter(normalised_text(prediction).split())
    common = truth.keys() & said.keys()
    if not common:
        return {"exact_match": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    hits = sum(said[word] for word in common)
    missed = sum(count for word, count in truth.items() if word not in common)
    precision = hits / said.total()
    recall = hits / (hits + missed)
    return {
        "exact_match": len(common) / said.total(),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
    }


def bleu(answer: str, prediction: str, weights: tuple[float, ...]) -> float:
    """nltk's sentence BLEU with smoothing method 7, on normalised words; an exact copy passes 1.

    Args:
        weights: of the 1-grams, 2-grams and so on: (0, 1, 0, 0) is the released BLEU-2, four
            quarters the script's own summary.
    """
    truth = normalised_text(answer).split()
    said = normalised_text(prediction).split()
    if not truth or not said:
        return 0.0
    smoothing = SmoothingFunction().method7
    return float(sentence_bleu([truth], said, weights, smoothing_function=smoothing))


def bleu_n(answer: str, prediction: str, order: int) -> float:
    """The released BLEU-``order``: not cumulative."""
    weights = tuple(float(number == order) for number in ORDERS)
    return bleu(answer, prediction, weights)


def rouge_l(answer: str, prediction: str) -> float:
    """ROUGE-L F of the package ``rouge`` on the normalised texts, 0 to 1."""
    truth = _first_words(answer)
    said = _first_words(prediction)
    # The package refuses a text of which nothing is left between its full stops.
    if not truth.strip(". ") or not said.strip(". "):
        return 0.0
    return _rouge().get_scores(said, truth)[0]["rouge-l"]["f"]


def _first_words(text: str) -> str:
    """A normalised text; of a longer one than `LONGEST_REPORT`, its beginning."""
    text = normalised_text(text)
    listed = text.split()
    return text if len(listed) <= LONGEST_REPORT else " ".join(listed[:LONGEST_REPORT])


@cache
def _rouge() -> Rouge:
    return Rouge(metrics=["rouge-l"])


def meteor(answer: str, prediction: str, wordnet: Any) -> float:
    """nltk's METEOR on white-space tokens of the normalised texts, 0 to 1; ``wordnet``: a corpus
    reader.
    """
    truth = _first_words(answer).split()
    said = _first_words(prediction).split()
    if not truth or not said:
        return 0.0
    return float(single_meteor_score(truth, said, wordnet=wordnet))


def answer_score(answer: str, prediction: str, metric: str) -> float:
    """The score of one row by a name of `METHODS`; METEOR needs a word list and is not among them.

    Returns:
        0 to 1; BLEU up to 4/3.
    """
    if metric == "released_closed_accuracy":
        return float(closed_correct(answer, prediction))
    if metric == "released_open_recall":
        return word_overlap(answer, prediction)["recall"]
    if metric == "released_rouge_l":
        return rouge_l(answer, prediction)
    if metric == "released_bleu":
        return sum(bleu_n(answer, prediction, order) for order in ORDERS) / len(ORDERS)
    return bleu_n(answer, prediction, int(metric.removeprefix("released_bleu_")))
