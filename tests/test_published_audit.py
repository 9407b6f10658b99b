"""The audit of the published numbers: every line follows from the printed tables, and its rules are
BLEU's own.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import numpy as np
import pytest

from mmedpo_utils.base.cards import card_folder
from mmedpo_utils.released import evaluation, published_audit
from mmedpo_utils.released.published_audit import (
    FLOOR,
    ORDERS,
    Line,
    audit,
    read_tables,
    remainders,
    undone_bleu,
)


@pytest.fixture(scope="module")
def tables() -> dict:
    return read_tables()


@pytest.fixture(scope="module")
def lines(tables) -> list[Line]:
    return audit(tables)


def test_every_line_of_the_file_follows_from_the_published_tables(lines):
    stored = json.loads((card_folder() / "published_audit.json").read_text(encoding="utf-8"))
    assert stored["lines"] == [asdict(line) for line in lines]


def reports(seed: int, count: int = 40) -> list[tuple[str, str]]:
    """Pairs of random texts over few words, from nothing in common to copies."""
    rng = np.random.default_rng(seed)
    words = np.array([f"w{number}" for number in range(12)])
    pairs = []
    for number in range(count):
        truth = rng.choice(words, rng.integers(8, 30))
        said = np.where(rng.random(len(truth)) < (1.0, 0.6, 0.3, 0.0)[number % 4], truth, "other")
        pairs.append((" ".join(truth), " ".join(said[: rng.integers(7, len(said) + 1)])))
    return pairs


@pytest.mark.parametrize("seed", range(5))
def test_smoothed_bleu_of_any_texts_obeys_the_rules(tables, seed):
    """nltk's own smoothing, averaged over reports, put into the table: no line says that it cannot
    be.
    """
    pairs = reports(seed)
    means = [100 * np.mean([evaluation.bleu_n(*pair, n) for pair in pairs]) for n in ORDERS]
    altered = copy.deepcopy(tables)
    for order, mean in zip(ORDERS, means):
        altered["7"][0][f"iu_xray_bleu{order}"] = round(mean, 2)
    found = [
        line
        for line in published_audit.smoothing(altered)
        if "LLaVA-Med v1.5, IU-Xray" in line.what
    ]
    assert len(found) == 5 and all(line.holds for line in found)


def test_the_smoothing_is_undone_exactly_where_nothing_was_short():
    """Copies in part, as long as their references: the mean precision comes back."""
    rng = np.random.default_rng(3)
    pairs = []
    for _ in range(60):
        truth = [f"w{number}" for number in rng.permutation(60)[:40]]
        start = rng.integers(
            6, 30
        )  # of each order something matches, so that nothing else is smoothed
        said = truth[:start] + [f"x{number}" for number in range(start, 40)]
        pairs.append((truth, said))
    smoothed = [
        100 * np.mean([evaluation.bleu_n(" ".join(a), " ".join(b), n) for a, b in pairs])
        for n in ORDERS
    ]
    plain = []
    for truth, said in pairs:
        for n in ORDERS:
            grams = [
                {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} for text in (truth, said)
            ]
            plain.append(100 * len(grams[0] & grams[1]) / (len(said) - n + 1))
    # q_5 is not known: it lies in [0, q_4], and an eighth of it counts.
    assert undone_bleu(smoothed) == pytest.approx(np.mean(plain), abs=np.mean(plain) / 16)
    assert np.mean(smoothed) > np.mean(plain) + 10
    nothing = [100 / 3**n for n in ORDERS]
    assert remainders(nothing) == pytest.approx([0, 0, 0]) and undone_bleu(
        nothing
    ) == pytest.approx(0)
    assert FLOOR == pytest.approx(np.mean(nothing))
    assert undone_bleu([30.0, 10.0, 3.4, 1.2]) is None, "below the floor: reports were short"


def test_the_cells_that_the_smoothing_cannot_give(lines):
    broken = {line.what for line in lines if line.part == "smoothing" and not line.holds}
    assert broken == {
        "Table 7, + Self-Rewarding, IU-Xray BLEU-3",
        "Table 7, + Self-Rewarding, IU-Xray BLEU-4",
        "Table 7, + STLLaVA-Med, IU-Xray BLEU-4",
        "Table 7, + SIMA, IU-Xray BLEU-4",
    }
    negative = {line.what for line in lines if not line.holds and "a third" in line.rule}
    assert negative == broken - {"Table 7, + SIMA, IU-Xray BLEU-4"}


def test_one_altered_cell_is_found(tables):
    altered = copy.deepcopy(tables)
    altered["8"][4]["mimic_cxr_bleu3"] = 3.9
    before = {line.what for line in audit(tables) if not line.holds}
    after = {line.what for line in audit(altered) if not line.holds}
    assert "Table 8, Stage 1+2 (Multi-LLMs), MIMIC-CXR BLEU-3" in after - before
    assert "Table 7, + MMedPO, mimic_cxr_bleu3" in after - before


def test_what_the_tables_say_of_each_other(lines):
    def found(part: str, start: str) -> dict[str, tuple]:
        return {
            line.rule: (line.printed, line.computed, line.holds)
            for line in lines
            if line.part == part and line.what.startswith(start)
        }

    rows = found("tables", "Table 1, + MMedPO, IU-Xray BLEU")
    assert rows["mean of Table 8's row Stage 1+2 (Single-LLM)"] == (23.49, 23.49, True)
    assert rows["mean of Table 8's row Stage 1+2 (Multi-LLMs)"] == (23.49, 23.57, False)
    stage2 = found("averages", "Table 2, Stage 2 w CRS, SLAKE")
    assert stage2["mean of open recall and closed accuracy of Table 9, Stage 2"] == (
        60.88,
        59.88,
        False,
    )
    reports = found("averages", "Table 2, Stage 2 w CRS, IU-Xray")
    tried = [value for rule, value in reports.items() if "of Table 8" in rule]
    assert [value[2] for value in tried] == [False, False, True], "only with the smoothing undone"
    for start, printed, computed in (
        ("text: open questions, over DPO", 15.8, 15.85),
        ("text: closed questions, over FiSAO", 10.3, 3.75),
        ("text: reports", 16.2, 16.21),
    ):
        (line,) = found("headlines", start).values()
        assert line[:2] == (printed, computed)
    abstract = [line for line in lines if line.what.startswith("abstract")]
    assert len(abstract) == 16 and not any(line.holds for line in abstract)


def test_the_questions_behind_a_gain(lines, tables):
    gains = {
        line.what: line.computed
        for line in lines
        if line.part == "counts" and line.kind == "arithmetic"
    }
    assert gains["Table 1, + MMedPO - + DPO, vqa_rad_closed_accuracy"] == pytest.approx(
        0.0184 * 272, abs=0.01
    )
    assert gains["Table 1, + MMedPO - + DPO, slake_closed_accuracy"] == pytest.approx(
        0.1106 * 416, abs=0.01
    )
    shares = {
        line.what: line for line in lines if line.part == "counts" and line.kind == "inferred"
    }
    assert shares["Table 1, LLaVA-Med v1.5, vqa_rad_closed_accuracy"].holds, "174 of 272"
    assert not shares["Table 1, + POVID, slake_closed_accuracy"].holds, "292.7 of 416"
    assert sum(published_audit.COUNTS.values()) == 1061 + 451
