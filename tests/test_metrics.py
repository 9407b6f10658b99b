"""Scores against closed forms and against the libraries themselves."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from mmedpo_utils import metrics
from mmedpo_utils.base import bootstrap
from mmedpo_utils.base import words as words_of
from mmedpo_utils.base.rows import patient_of
from mmedpo_utils.show import comparison

REPORTS = [
    (
        "The heart is normal in size. There is a nodule in the left upper zone.",
        "The heart is normal in size. There is an effusion in the left base zone.",
    ),
    ("There is cardiomegaly. There is no effusion.", "the heart is enlarged."),
    ("The film shows an opacity.", "The film shows an opacity."),
]


def row(kind, answer, prediction, **more):
    return {
        "question_id": 0,
        "image": "a.png",
        "answer_type": kind,
        "answer": answer,
        "prediction": prediction,
        **more,
    }


def report_rows():
    return [row("REPORT", *pair) for pair in REPORTS]


@pytest.mark.parametrize(
    "answer, prediction, right",
    [
        ("yes", "Yes.", True),
        ("Yes", "yes, there is a nodule", True),
        ("no", "Yes", False),
        ("No", "", False),
        ("no", "There is no nodule", False),
        ("no", "nodule", False),
        ("yes", "yesterday", False),
        ("right side", "Right side of the chest", True),
        ("right side", "right", False),
        ("?", "", False),
    ],
)
def test_closed_rule(answer, prediction, right):
    assert metrics.closed_correct(answer, prediction) is right


def test_recall_counts_words_with_multiplicity():
    assert metrics.recall("left left base", "the left base") == pytest.approx(2 / 3)
    assert metrics.recall("X-ray, chest", "CHEST xray!") == 1
    assert np.isnan(metrics.recall("...", "something"))
    assert words_of.words("Air, under\tthe R. dome") == ["air", "under", "the", "r", "dome"]


def test_punctuation_parts_words():
    """Whatever the mark between two words is: with a blank beside it and without, the words are the
    same.
    """
    for mark in (
        ",",
        ".",
        ";",
        "/",
        "-",
        "\u2013",
        "\u2014",
        "\u3002",
        "\uff0c",
        "(",
        "\u201c",
        "\u2026",
        "_",
        "|",
    ):
        assert (
            words_of.words(f"Small{mark}Bowel")
            == words_of.words(f"small {mark} bowel")
            == ["small", "bowel"]
        ), mark
        assert (
            words_of.opener(f"Yes{mark}there is one") == "yes"
            and words_of.opener(f"\u201cNo{mark}clear") == "no"
        ), mark
    assert words_of.words("3.5 cm, 1,200 ml, T1-weighted, don\u2019t") == [
        "3.5",
        "cm",
        "1200",
        "ml",
        "t1",
        "weighted",
        "dont",
    ]
    assert (
        words_of.opener("Normal")
        == words_of.opener("Nothing")
        == words_of.opener("...")
        == words_of.opener("")
        == ""
    )
    assert (
        words_of.is_yes_no("YES!")
        and not words_of.is_yes_no("No acute disease.")
        and not words_of.is_yes_no("?")
    )


@pytest.mark.parametrize(
    "text",
    [
        "\u53cc\u80ba\u6e05\u6670\uff0c\u672a\u89c1\u7ed3\u8282\u3002",
        "\u041b\u0435\u0433\u043a\u0438\u0435 \u0447\u0438\u0441\u0442\u044b\u0435 \u0438 "
        "\u043d\u0435\u0442 \u0443\u0437\u043b\u0430",
        "\u80ba\u306f\u304d\u308c\u3044\u3067\u3059",
        "Lungen sind frei, kein Erguss",
    ],
)
def test_reports_in_any_script(text):
    """A copy scores 100 by ROUGE-L and BLEU and 1 by recall; half of it about half."""
    copy, half = row("REPORT", text, text), row("REPORT", text, text[: len(text) // 2])
    assert metrics.score([copy], "rouge_l") == pytest.approx(100) and metrics.score(
        [copy], "bleu"
    ) == pytest.approx(100)
    assert metrics.recall(text, text) == 1
    assert 20 < metrics.score([half], "rouge_l") < 90
    assert metrics.score([row("REPORT", text, "Other words")], "rouge_l") == 0


def test_who_the_patient_is():
    """A row that names no patient counts by its image, however it fails to name one; 0 is a
    name.
    """
    named = [
        patient_of({"image": "a.png", **row})
        for row in (
            {},
            {"patient_id": None},
            {"patient_id": " "},
            {"patient_id": 0},
            {"patient_id": "p"},
        )
    ]
    assert named == ["a.png", "a.png", "a.png", "0", "p"]


def test_accuracy_and_recall_are_means_over_their_own_rows():
    rows = [
        row("CLOSED", "yes", "yes"),
        row("CLOSED", "no", "yes"),
        row("OPEN", "left base", "left apex"),
        row("OPEN", "left", "left"),
    ]
    assert metrics.score(rows, "closed_accuracy") == 50
    assert metrics.score(rows, "open_recall") == 75
    assert metrics.score(rows, "rouge_l") is None and metrics.score(rows, "bleu") is None
    assert metrics.score([row("OPEN", "...", "x")], "open_recall") is None


def test_bleu_equals_sacrebleu_on_the_corpus():
    answers, predictions = (list(side) for side in zip(*REPORTS))
    own = [metrics.score(report_rows(), f"bleu{n}") for n in metrics.BLEU_ORDERS]
    library = [
        BLEU(lowercase=True, max_ngram_order=n).corpus_score(predictions, [answers]).score
        for n in (1, 2, 3, 4)
    ]
    assert own == pytest.approx(library)
    assert metrics.score(report_rows(), "bleu") == pytest.approx(np.mean(library))
    assert metrics.score([row("REPORT", "a b c d e", "a b c d e")], "bleu") == pytest.approx(100)


def test_rouge_equals_the_library():
    scorer = RougeScorer(["rougeL"])
    expected = 100 * np.mean([scorer.score(a, p)["rougeL"].fmeasure for a, p in REPORTS])
    assert metrics.score(report_rows(), "rouge_l") == pytest.approx(expected)


def test_meteor_is_the_library_or_says_why_not():
    value, reason = metrics.meteor(report_rows())
    assert (value is None) == bool(reason)
    if value is not None:
        assert 0 < value < 100
    assert metrics.meteor([row("CLOSED", "yes", "yes")]) == (None, "no reports")


def test_score_predictions_names_every_metric_and_its_rows():
    rows = [*report_rows(), row("CLOSED", "yes", "yes"), row("OPEN", "left", "right")]
    table = metrics.score_predictions(rows)
    assert tuple(table) == metrics.SCORES
    assert table["closed_accuracy"] == {"score": 100, "n": 1} and table["open_recall"] == {
        "score": 0,
        "n": 1,
    }
    assert table["bleu"]["score"] == pytest.approx(
        np.mean([table[f"bleu{n}"]["score"] for n in (1, 2, 3, 4)])
    )
    assert table["rouge_l"]["n"] == table["meteor"]["n"] == 3
    assert set(metrics.METHODS) >= {"closed_accuracy", "open_recall", "bleu", "rouge_l", "meteor"}


def test_scores_by_finding():
    rows = [
        row("CLOSED", "yes", "yes", finding="nodule"),
        row("CLOSED", "no", "yes", finding="effusion"),
        row("CLOSED", "no", "no"),
    ]
    by_finding = comparison.scores_by(rows, "finding")
    assert list(by_finding) == ["(none)", "effusion", "nodule"]
    assert [scores["closed_accuracy"]["score"] for scores in by_finding.values()] == [100, 0, 100]


def test_bootstrap_matches_the_normal_interval_of_independent_patients():
    scores = np.random.default_rng(1).random(2000) < 0.6
    mean, low, high = bootstrap.bootstrap_interval(scores, np.arange(2000), samples=2000)
    half = 196 * np.sqrt(scores.mean() * (1 - scores.mean()) / 2000)
    assert mean == pytest.approx(100 * scores.mean())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.08)


def test_bootstrap_draws_patients_and_seeds_not_rows():
    patient_score = np.random.default_rng(2).random(50)
    rows = np.repeat(patient_score, 40)
    patients = np.repeat(np.arange(50), 40)
    clustered = bootstrap.bootstrap_interval(rows, patients)
    once = bootstrap.bootstrap_interval(patient_score, np.arange(50))
    assert clustered == pytest.approx(once)
    seeds = np.tile([0, 1], 1000)
    mean, low, high = bootstrap.bootstrap_interval(seeds.astype(float), patients, seeds)
    assert (mean, low, high) == pytest.approx((50, 0, 100))


def test_interval_is_repeatable_fast_and_covers_bleu():
    rows = [row("REPORT", *REPORTS[n % 3], patient_id=f"p{n}") for n in range(60)]
    statistics, statistic, used = metrics.row_statistics(rows, "bleu")
    patients = [patient_of(r) for r in used]
    first = bootstrap.bootstrap_interval(statistics, patients, statistic=statistic)
    assert first == bootstrap.bootstrap_interval(statistics, patients, statistic=statistic)
    assert first[1] < first[0] < first[2] and first[0] == pytest.approx(metrics.score(rows, "bleu"))
    start = time.perf_counter()
    bootstrap.bootstrap_interval(np.zeros(2000), np.arange(2000) % 300, np.arange(2000) % 3)
    assert time.perf_counter() - start < 2


def test_paired_difference_uses_the_same_draws():
    rng = np.random.default_rng(3)
    base = (rng.random(400) < 0.5).astype(float)
    patients = np.arange(400) // 4
    assert bootstrap.paired_difference(base, base, patients) == (0, 0, 0)
    shifted = bootstrap.paired_difference(base * 0.5 + 0.5, base * 0.5, patients)
    assert shifted == pytest.approx((50, 50, 50))


def test_patient_falls_back_to_the_image():
    assert patient_of({"image": "x.jpg"}) == "x.jpg"
    assert patient_of({"image": "x.jpg", "patient_id": "p1"}) == "p1"


def test_released_questions_score_their_own_answers_fully(shared):
    import json

    lines = (shared / "data/released/vqa-rad_test_questions.jsonl").read_text().splitlines()
    rows = [
        row(q["answer_type"], q["gpt4_answer"], q["gpt4_answer"]) for q in map(json.loads, lines)
    ]
    assert Counter(r["answer_type"] for r in rows) == {"CLOSED": 272, "OPEN": 179}
    assert metrics.score(rows, "closed_accuracy") == 100 and metrics.score(
        rows, "open_recall"
    ) == pytest.approx(100)


@pytest.mark.parametrize("fault", ["torn zip", "empty folder", "a file missing", "half a file"])
def test_a_word_list_that_arrived_in_part_leaves_the_other_scores(fault, tmp_path, monkeypatch):
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    corpora = tmp_path / "corpora"
    corpora.mkdir()
    if fault == "torn zip":
        (corpora / "wordnet.zip").write_bytes(b"PK\x03\x04" + bytes(2000))
    else:
        (corpora / "wordnet").mkdir()
    if fault in ("a file missing", "half a file"):
        for name in WordNetCorpusReader._FILES[: -2 if fault == "a file missing" else None]:
            (corpora / "wordnet" / name).write_text(
                "00\tadj.all\t3\n" if name == "lexnames" else "half a line"
            )
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    fresh = LazyCorpusLoader("wordnet", WordNetCorpusReader, None)
    monkeypatch.setattr("nltk.corpus.wordnet", fresh)
    rows = [row("REPORT", "clear lungs", "clear lungs")]
    for released in (False, True):
        value, reason = metrics.meteor(rows, released)
        assert value is None and "WordNet" in reason and "\n" not in reason
    table = metrics.score_predictions(rows)
    assert (
        table["rouge_l"]["score"] == 100
        and table["meteor"]["score"] is None
        and table["meteor"]["reason"]
    )
