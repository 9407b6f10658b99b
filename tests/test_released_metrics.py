"""The authors' released scores: equal to what their code gave, item by item; and what one may not
expect of them.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from mmedpo_utils import metrics
from mmedpo_utils.base.bootstrap import bootstrap_interval
from mmedpo_utils.released import evaluation
from mmedpo_utils.released.evaluation import bleu, bleu_n, normalised_text, word_overlap
from mmedpo_utils.show import comparison

DEBIAN_WORDNET = Path("/usr/share/wordnet")
LEXICOGRAPHERS = """
    adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute
    noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group
    noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession
    noun.process noun.quantity noun.relation noun.shape noun.state noun.substance noun.time
    verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption
    verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession
    verb.social verb.stative verb.weather adj.ppl
""".split()


@pytest.fixture(scope="module")
def golden(shared) -> Path:
    return shared / "golden" / "eval"


def items(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8"))["items"]


def row(item: dict, kind: str) -> dict:
    return {
        "question_id": item["question_id"],
        "image": "a.png",
        "answer_type": kind,
        "answer": item["answer"],
        "prediction": item["prediction"],
    }


def test_normalisation(golden):
    for case in json.loads((golden / "normalise_cases.json").read_text(encoding="utf-8")):
        assert normalised_text(case["text"]) == case["normalised"], case["text"]
    assert (
        json.loads((golden / "normalisation.json").read_text()).items() <= evaluation.TABLES.items()
    )


def test_every_question(golden):
    found = items(golden / "vqa.json")
    assert len(found) == 451
    for item in found:
        answer, prediction = item["answer"], item["prediction"]
        assert normalised_text(answer) == item["normalised_answer"]
        assert normalised_text(prediction) == item["normalised_prediction"]
        if item["answer_type"] == "CLOSED":
            assert evaluation.closed_correct(answer, prediction) == bool(item["closed"])
        else:
            for key, value in word_overlap(answer, prediction).items():
                assert value == pytest.approx(item[key], abs=1e-9), (item["question_id"], key)
    totals = json.loads((golden / "vqa.json").read_text())["totals"]
    table = metrics.score_predictions(
        [row(item, item["answer_type"]) for item in found], metrics.RELEASED_SCORES
    )
    assert table["released_closed_accuracy"]["score"] == pytest.approx(
        totals["yes_no_accuracy"], abs=1e-9
    )
    assert table["released_open_recall"]["score"] == pytest.approx(totals["recall"], abs=1e-9)


def test_every_report(golden):
    found = items(golden / "report.json")
    totals = json.loads((golden / "report.json").read_text())["totals"]
    assert len(found) == 120
    for item in found:
        pair = item["answer"], item["prediction"]
        overlap = word_overlap(*pair)
        given = {
            "exact_match_score": overlap["exact_match"],
            "f1_score": overlap["f1"],
            "precision": overlap["precision"],
            "recall": overlap["recall"],
            "bleu_score": bleu(*pair, (0.25, 0.25, 0.25, 0.25)),
            "rouge_l": evaluation.rouge_l(*pair),
        }
        given |= {f"bleu_score_{n}": bleu_n(*pair, n) for n in (1, 2, 3, 4)}
        for key, value in given.items():
            assert value == pytest.approx(item[key], abs=1e-9), (item["question_id"], key)
    table = metrics.score_predictions(
        [row(item, "REPORT") for item in found], metrics.RELEASED_SCORES
    )
    for n in (1, 2, 3, 4):
        assert table[f"released_bleu_{n}"]["score"] == pytest.approx(
            totals[f"bleu_score_{n}"], abs=1e-9
        )
    mean = np.mean([totals[f"bleu_score_{n}"] for n in (1, 2, 3, 4)])
    assert table["released_bleu"]["score"] == pytest.approx(mean, abs=1e-9)
    assert table["released_rouge_l"]["score"] == pytest.approx(totals["rouge_l"], abs=1e-9)


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """WordNet 3.0 as Debian ships it, with the list of lexicographers' names that nltk's reader
    wants.
    """
    if not (DEBIAN_WORDNET / "data.noun").is_file():
        pytest.skip(f"no WordNet 3.0 in {DEBIAN_WORDNET}: Debian's package wordnet-base has it")
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class WithoutSenseKeys(WordNetCorpusReader):
        """The mapping between versions needs sense keys, which the package lacks; METEOR does not
        need it.
        """

        def map_wn(self, *_):
            return None

    folder = tmp_path_factory.mktemp("wordnet")
    for file in DEBIAN_WORDNET.glob("*.*"):
        shutil.copy(file, folder)
    kinds = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    lines = [
        f"{number:02d}\t{name}\t{kinds[name.partition('.')[0]]}"
        for number, name in enumerate(LEXICOGRAPHERS)
    ]
    (folder / "lexnames").write_text("\n".join(lines) + "\n")
    nltk.data.path.append(str(folder))  # nltk reads nowhere else
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of languages other than English
        yield WithoutSenseKeys(str(folder), None)
    nltk.data.path.remove(str(folder))


def test_meteor_of_every_report(golden, wordnet):
    found = items(golden / "report.json")
    for item in found:
        value = evaluation.meteor(item["answer"], item["prediction"], wordnet)
        assert value == pytest.approx(item["meteor"], abs=1e-6), item["question_id"]


def test_what_one_may_not_expect():
    assert evaluation.closed_correct("no", "The film is abnormal.")
    assert not metrics.closed_correct("no", "The film is abnormal.")
    assert word_overlap("left lung", "left left left")["recall"] == pytest.approx(3 / 4)
    assert metrics.recall("left lung", "left left left") == pytest.approx(1 / 2)
    report = "The heart is normal in size and the lungs are clear today."
    copies = [bleu_n(report, report, n) for n in (1, 2, 3, 4)]
    assert copies == pytest.approx([4 / 3, 10 / 9, 28 / 27, 82 / 81])
    one_of_26 = "heart " + " ".join(f"x{n}" for n in range(25))
    hardly = [100 * bleu_n(report + " " + "longer " * 15, one_of_26, n) for n in (1, 2, 3, 4)]
    assert hardly == pytest.approx([36.3, 12.8, 4.6, 1.7], abs=0.1)
    assert bleu_n(report, "nothing matches", 1) == 0
    assert [
        bleu_n(report, "...", 1),
        evaluation.rouge_l(report, "..."),
        word_overlap("", report)["f1"],
    ] == [0, 0, 0]


def test_the_two_rules_side_by_side():
    texts = [
        ("CLOSED", "no", "abnormal"),
        ("OPEN", "left", "left"),
        ("REPORT", "clear lungs today", "clear lungs today"),
    ]
    rows = [
        {"question_id": n, "image": "a", "answer_type": kind, "answer": answer, "prediction": said}
        for n, (kind, answer, said) in enumerate(texts)
    ]
    table = {line["score"]: line for line in comparison.both_rules({"base": rows})}
    assert (table["closed accuracy"]["our rule"], table["closed accuracy"]["released rule"]) == (
        0,
        100,
    )
    assert (table["open recall"]["our rule"], table["open recall"]["released rule"]) == (100, 100)
    assert (
        table["rouge l"]["our rule"]
        == pytest.approx(table["rouge l"]["released rule"])
        == pytest.approx(100)
    )
    assert table["bleu"]["released rule"] > table["bleu"]["our rule"]
    only_closed = comparison.both_rules({"base": rows[:1]})
    assert [line["score"] for line in only_closed] == ["closed accuracy"]


def test_a_released_score_has_an_interval_too():
    rows = [
        {
            "question_id": n,
            "image": f"{n}.png",
            "answer_type": "REPORT",
            "answer": "clear lungs and heart",
            "prediction": "clear lungs" if n % 2 else "large effusion left",
        }
        for n in range(40)
    ]
    statistics, statistic, used = metrics.row_statistics(rows, "released_bleu_1")
    mean, low, high = bootstrap_interval(
        statistics, [row["image"] for row in used], statistic=statistic
    )
    scores = [100 * bleu_n(row["answer"], row["prediction"], 1) for row in rows]
    assert mean == pytest.approx(np.mean(scores)) and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(scores) / 40**0.5, rel=0.15)
