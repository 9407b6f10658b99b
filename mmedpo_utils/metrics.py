"""Scores of predictions, as pure functions of tables; every score is in percent.

The paper (arXiv 2412.06141) reports closed accuracy, open recall, BLEU (the mean of BLEU-1..4),
ROUGE-L and METEOR. It names no implementation; its authors released one later. `METHODS` says how
each score is computed here; print it beside the numbers. The names that begin with ``released_``
are the authors' rules (`released.evaluation`), and the others are ours.

A prediction row holds `question_id`, `image`, `answer_type` (CLOSED, OPEN or REPORT), `answer` and
`prediction`, and optionally `patient_id`, `finding` and `question_type`. Without `patient_id` the
image stands for the patient.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from .base.bootstrap import Statistic, mean_percent
from .base.errors import first_line
from .base.rows import Row
from .base.words import IDEOGRAPH, LONGEST_REPORT, AnyScript, opener, words
from .phantom.errors import severity
from .released import evaluation

METHODS = {
    "closed_accuracy": "share of yes/no answers whose first word is the true one (lower case; "
    "punctuation parts words); where the truth is another word or phrase, the prediction has to "
    "begin with it",
    "open_recall": "share of the true answer's words found in the prediction, counted with "
    "multiplicity (lower case; punctuation parts words), mean over questions",
    "bleu": "mean of BLEU-1 to BLEU-4; each is sacrebleu's cumulative corpus BLEU (lower case, "
    "tokenizer 13a, smoothing 'exp'; each ideograph is a word)",
    "rouge_l": "rouge-score's ROUGE-L F1 without stemming, mean over reports; words of any "
    f"script, each ideograph one, the first {LONGEST_REPORT:,} of a text",
    "meteor": "nltk's METEOR with its WordNet word list, mean over reports, the first "
    f"{LONGEST_REPORT:,} words of a text",
    "attention_in_lesion": "share of the image attention that falls inside the lesion mask, "
    "mean over questions",
    "severity": "mean cost of the errors in closed and open answers, 0 to 100, as the phantom "
    "world states it (phantom.errors); the other scores count every error the same",
    **evaluation.METHODS,
}
BLEU_ORDERS = (1, 2, 3, 4)
TYPE_OF_METRIC = {
    "closed_accuracy": "CLOSED",
    "open_recall": "OPEN",
    "released_closed_accuracy": "CLOSED",
    "released_open_recall": "OPEN",
}
SCORES = (
    "closed_accuracy",
    "open_recall",
    "bleu",
    *(f"bleu{n}" for n in BLEU_ORDERS),
    "rouge_l",
    "meteor",
)
RELEASED_SCORES = tuple(evaluation.METHODS)


def closed_correct(answer: str, prediction: str) -> bool:
    """Whether a closed prediction is right, by the rule of `METHODS`: "Yes, there is." says yes,
    "It is" does not.
    """
    truth = [opener(answer)] if opener(answer) else words(answer)
    given = words(prediction)
    return bool(truth) and given[: len(truth)] == truth


def recall(answer: str, prediction: str) -> float:
    """Share (0 to 1) of the words of ``answer`` found in ``prediction``, with multiplicity; NaN
    without a word.
    """
    truth = Counter(words(answer))
    found = (truth & Counter(words(prediction))).total()
    return found / truth.total() if truth else float("nan")


@cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=AnyScript())


def answer_score(row: Row) -> float:
    """Score of one row in [0, 1]: closed right or wrong, open recall, a report's ROUGE-L F1."""
    answer = str(row["answer"])
    prediction = str(row["prediction"])
    if row["answer_type"] == "CLOSED":
        return float(closed_correct(answer, prediction))
    if row["answer_type"] == "OPEN":
        return recall(answer, prediction)
    return _rouge().score(answer, prediction)["rougeL"].fmeasure


@lru_cache(100_000)
def bleu_statistics(answer: str, prediction: str) -> tuple[int, ...]:
    """The ten counts BLEU sums over a corpus: matching and total n-grams for n = 1..4, predicted
    and true length.
    """
    said, truth = (re.sub(f"({IDEOGRAPH})", r" \1 ", text) for text in (prediction, answer))
    counts = BLEU(lowercase=True).corpus_score([said], [[truth]])
    return (*counts.counts, *counts.totals, counts.sys_len, counts.ref_len)


def bleu_from_statistics(sums: np.ndarray, orders: Sequence[int] = BLEU_ORDERS) -> np.ndarray:
    """Mean over ``orders`` of cumulative corpus BLEU, in percent, from summed counts. Shape: [...,
    10] to [...].
    """
    means = []
    for row in np.rint(sums).astype(int).reshape(-1, 10).tolist():
        matching = row[:4]
        total = row[4:8]
        said_length, true_length = row[8:]
        scores = []
        for n in orders:
            bleu = BLEU.compute_bleu(
                matching[:n],
                total[:n],
                said_length,
                true_length,
                smooth_method="exp",
                max_ngram_order=n,
            )
            scores.append(bleu.score)
        means.append(np.mean(scores))
    return np.array(means).reshape(sums.shape[:-1])


def row_statistics(rows: Iterable[Row], metric: str) -> tuple[np.ndarray, Statistic, list[Row]]:
    """What a bootstrap resamples: per-row statistics, the function from their sums to percent, and
    the rows used.

    ``metric`` is one of `METHODS` or `bleu1` to `bleu4`; `attention_in_lesion` wants rows with a
    ``share``. METEOR of either rule is not among them (`meteor`). The statistics have shape [N, 2]
    (score and one) or, for BLEU, [N, 10] (`bleu_statistics`).
    """
    if metric == "attention_in_lesion":
        used = list(rows)
        scores = np.array([row["share"] for row in used], float)
    elif metric == "severity":
        used = [row for row in rows if row["answer_type"] != "REPORT"]
        said = [(row["question"], str(row["answer"]), str(row["prediction"])) for row in used]
        scores = np.array([severity(*texts) for texts in said])
    else:
        used = [row for row in rows if row["answer_type"] == TYPE_OF_METRIC.get(metric, "REPORT")]
        if metric.startswith("bleu"):
            orders = [int(metric[4:])] if metric[4:] else BLEU_ORDERS
            counts = [bleu_statistics(str(row["answer"]), str(row["prediction"])) for row in used]
            return (
                np.array(counts, float).reshape(-1, 10),
                lambda sums: bleu_from_statistics(sums, orders),
                used,
            )
        if metric in RELEASED_SCORES:
            texts = [(str(row["answer"]), str(row["prediction"])) for row in used]
            scores = np.array([evaluation.answer_score(*pair, metric) for pair in texts])
        else:
            scores = np.array([answer_score(row) for row in used])
    known = np.isfinite(scores)
    return np.stack([np.where(known, scores, 0), known], axis=1), mean_percent, used


def score(rows: Iterable[Row], metric: str) -> float | None:
    """One metric of `row_statistics` over the rows it applies to, in percent; None where there is
    none.
    """
    statistics, statistic, used = row_statistics(rows, metric)
    value = float(statistic(statistics.sum(axis=0))) if used else None
    return value if value is None or np.isfinite(value) else None


def meteor(rows: Iterable[Row], released: bool = False) -> tuple[float | None, str]:
    """Mean METEOR over the REPORT rows, in percent, and the reason where it is None: no reports, or
    no WordNet.

    Args:
        released: on the tokens of the authors' released evaluation instead of ours.
    """
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    reports = [row for row in rows if row["answer_type"] == "REPORT"]
    if not reports:
        return None, "no reports"
    scores = []
    try:
        wordnet.ensure_loaded()
        for row in reports:
            if released:
                scores.append(evaluation.meteor(row["answer"], row["prediction"], wordnet))
            else:
                texts = [words(row[key])[:LONGEST_REPORT] for key in ("answer", "prediction")]
                scores.append(single_meteor_score(*texts))
    except LookupError:
        return (
            None,
            "nltk's WordNet word list is absent; `python -m nltk.downloader wordnet` fetches it",
        )
    except Exception as error:
        # A word list that arrived in part fails in as many ways as it has files.
        return None, (
            f"nltk's WordNet word list cannot be read ({first_line(error)}); `python -m "
            "nltk.downloader --force wordnet` fetches it again"
        )
    return float(100 * np.mean(scores)), ""


def score_predictions(rows: Sequence[Row], names: Sequence[str] = SCORES) -> dict[str, Row]:
    """Scores of one prediction table.

    Args:
        names: `SCORES`, or `RELEASED_SCORES` for the authors' rules.

    Returns:
        ``{metric: {"score": percent or None, "n": rows it is over}}``. METEOR also holds a
        ``reason`` where its score is None.
    """
    count = Counter(row["answer_type"] for row in rows)
    table: dict[str, Row] = {}
    for name in names:
        table[name] = {"score": None, "n": count[TYPE_OF_METRIC.get(name, "REPORT")]}
        if name.endswith("meteor"):
            table[name]["score"], reason = meteor(rows, released=name in RELEASED_SCORES)
            table[name] |= {"reason": reason} if reason else {}
        else:
            table[name]["score"] = score(rows, name)
    return table
