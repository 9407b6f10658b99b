"""An audit of the published numbers: what arithmetic says of the tables, apart from what is a
guess.

Every line compares a printed number with one that a rule gives. A line of kind ``arithmetic`` is
certain where its rule holds; one of kind ``inferred`` rests on the assumption that it states. A
line that does not hold is a misprint, a mixed-up row or another rule than the one assumed: the
tables cannot say which.

The rules of BLEU are those of the authors' released evaluation (`released.evaluation`): nltk's
smoothing method 7 on one order n at a time. With p_n the n-gram precision of a report and BP its
brevity penalty,

    BLEU-1 = BP (1 + 2 p_1 + p_2) / 3        BLEU-n = (BLEU-(n-1) + BP (p_n + p_(n+1))) / 3

and all of them 0 for a report without one right word. These equations are linear, so that means
over a test set obey them too, with q_n, the mean of BP p_n, and the mean of BP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..base.settings import repository_root

Tables = dict[str, list[dict[str, Any]]]
ROUNDING = 0.005  # a number printed with two decimals
HEADLINE_ROUNDING = 0.06  # one with a single decimal, of numbers that are rounded themselves
REPORT_SETS = {"iu_xray": "IU-Xray", "mimic_cxr": "MIMIC-CXR"}
QUESTION_SETS = {"slake": "SLAKE", "vqa_rad": "VQA-RAD"}
ORDERS = (1, 2, 3, 4)
# What the smoothing tends to where hardly a word is right: 1/3, 1/9, 1/27, 1/81.
FLOOR = sum(100 / 3**order for order in ORDERS) / 4
# Questions of the test sets in LLaVA-Med's format (the cards of data_manifests/).
COUNTS = {
    "slake_open_recall": 645,
    "slake_closed_accuracy": 416,
    "vqa_rad_open_recall": 179,
    "vqa_rad_closed_accuracy": 272,
}
HEADLINES = (
    ("open questions, over DPO", "+ DPO", "open_recall", 15.8),
    ("closed questions, over DPO", "+ DPO", "closed_accuracy", 10.3),
    ("reports, over the best baseline, FiSAO", "+ FiSAO", "report", 16.2),
)
OTHER_BASELINE = (
    ("open questions, over FiSAO", "+ FiSAO", "open_recall", 15.8),
    ("closed questions, over FiSAO", "+ FiSAO", "closed_accuracy", 10.3),
)
ABSTRACT = (("visual question answering", "question", 14.2), ("reports", "report", 51.7))


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        part: smoothing | undone | tables | averages | headlines | counts.
        kind: arithmetic, certain under its rule; inferred, a fit under the rule's assumption.
        what: the cells, by table, row and column.
        rule: what was computed, in words.
        printed: the number in the paper.
        computed: what the rule gives; None where it gives nothing.
        holds: whether the two agree within the rounding of what is printed; for undone BLEU,
            whether the assumption is possible at all; for a gain in questions, always.
    """

    part: str
    kind: str
    what: str
    rule: str
    printed: float
    computed: float | None
    holds: bool


def read_tables() -> Tables:
    """Rows of the published tables by number, from ``data_manifests/published_results.json``."""
    path = repository_root() / "data_manifests" / "published_results.json"
    stored = json.loads(path.read_text(encoding="utf-8"))["tables"]
    return {number: table["rows"] for number, table in stored.items()}


def audit(tables: Tables) -> list[Line]:
    """Every line of the audit, part by part."""
    lines: list[Line] = []
    for part in (smoothing, undone, same_numbers, averages, headlines, counts):
        lines += part(tables)
    return lines


def bleu_cells(row: dict[str, Any], dataset: str) -> list[float]:
    """BLEU-1 to BLEU-4 of a row of Table 7 or 8, in percent."""
    return [row[f"{dataset}_bleu{order}"] for order in ORDERS]


def remainders(bleu: Sequence[float]) -> list[float]:
    """3 BLEU-n - BLEU-(n-1) for n = 2, 3, 4: what q_n + q_(n+1) has to be, in percent."""
    return [3 * bleu[n] - bleu[n - 1] for n in (1, 2, 3)]


def smoothing(tables: Tables) -> list[Line]:
    """Could smoothing method 7 have given these cells?

    Precisions are not negative, so that BLEU-n is at least a third of BLEU-(n-1). And longer
    n-grams do not match more often than shorter ones, so that 3 BLEU-n - BLEU-(n-1) does not grow
    with n.
    """
    lines = []
    for number, row, dataset in _report_rows(tables):
        bleu = bleu_cells(row, dataset)
        rest = remainders(bleu)
        for n in (2, 3, 4):
            what = f"Table {number}, {row['method']}, {REPORT_SETS[dataset]} BLEU-{n}"
            printed = bleu[n - 1]
            least = bleu[n - 2] / 3
            rule = f"at least a third of BLEU-{n - 1}: precisions are not negative"
            # A printed number may be half a unit off, and so may the one that it is compared with.
            holds = printed + ROUNDING >= least - ROUNDING / 3
            lines.append(_arithmetic("smoothing", what, rule, printed, least, holds))
            if n > 2:
                # The line above says already where a remainder is below 0.
                most = (bleu[n - 2] + max(rest[n - 3], 0.0)) / 3
                rule = (
                    f"at most what BLEU-{n - 1} and BLEU-{n - 2} allow: {n + 1}-grams match no "
                    "more often"
                )
                # `most` is (4 BLEU-(n-1) - BLEU-(n-2)) / 3: up to five half units, by three.
                holds = printed - ROUNDING <= most + ROUNDING * 5 / 3
                lines.append(_arithmetic("smoothing", what, rule, printed, most, holds))
    return lines


def undone_bleu(bleu: Sequence[float]) -> float | None:
    """The mean of BLEU-1 to 4 without the smoothing, if no report was short and each had a right
    word.

    With BP = 1 the equations at the top leave one number open, q_5, which lies between 0 and q_4;
    half of that range is taken, and it moves the result by less than 0.1. A smaller BP would raise
    the result.

    Args:
        bleu: smoothed BLEU-1 to BLEU-4, in percent.

    Returns:
        percent; None where BLEU-1 is below 33.33, so that BP cannot have been 1 in every report.
    """
    second, third, fourth = remainders(bleu)
    q5 = fourth / 4
    q4 = fourth - q5
    q3 = third - q4
    q2 = second - q3
    q1 = (3 * bleu[0] - 100 - q2) / 2
    return sum((q1, q2, q3, q4)) / 4 if q1 >= 0 else None


def undone(tables: Tables) -> list[Line]:
    """Mean BLEU with the smoothing undone beside the printed mean."""
    lines = []
    for number, row, dataset in _report_rows(tables):
        bleu = bleu_cells(row, dataset)
        what = f"Table {number}, {row['method']}, {REPORT_SETS[dataset]}, mean of BLEU-1 to 4"
        value = undone_bleu(bleu)
        rule = (
            "smoothing undone, if no report was shorter than its reference and each had a right "
            "word (BP 1)"
        )
        if value is None:
            most = 3 * bleu[0] / 100
            rule += (
                f"; impossible here, since BLEU-1 is below 33.33: the mean BP was {most:.2f} at "
                "most"
            )
        printed = _round(sum(bleu) / 4)
        computed = None if value is None else _round(value)
        lines.append(Line("undone", "inferred", what, rule, printed, computed, value is not None))
    return lines


def same_numbers(tables: Tables) -> list[Line]:
    """Cells that several tables print."""
    lines = []
    main = _by_method(tables["1"])
    detailed = _by_method(tables["7"])
    ablation = _by_method(tables["8"])
    for method, row in main.items():
        if method in detailed:
            lines += _compare_with_table7(method, row, detailed[method])
    # Which row of the ablation is the method as Table 1 has it? Each is tried.
    for method, row in ablation.items():
        mean = sum(bleu_cells(row, "iu_xray")) / 4
        what = "Table 1, + MMedPO, IU-Xray BLEU"
        rule = f"mean of Table 8's row {method}"
        lines.append(_equal("tables", what, rule, main["+ MMedPO"]["iu_xray_bleu"], mean))
    whole = detailed["+ MMedPO"]
    final = ablation["Stage 1+2 (Multi-LLMs)"]
    for key in whole:
        if key != "method":
            what = f"Table 7, + MMedPO, {key}"
            rule = "the cell of Table 8, Stage 1+2 (Multi-LLMs)"
            lines.append(_equal("tables", what, rule, whole[key], final[key]))
    return lines


def _compare_with_table7(method: str, row: dict[str, Any], other: dict[str, Any]) -> list[Line]:
    """A row of Table 1 beside the same row of Table 7."""
    lines = []
    for dataset, name in REPORT_SETS.items():
        what = f"Table 1, {method}, {name} BLEU"
        mean = sum(bleu_cells(other, dataset)) / 4
        rule = "mean of Table 7's BLEU-1 to 4"
        lines.append(_equal("tables", what, rule, row[f"{dataset}_bleu"], mean))
        for score in ("rouge_l", "meteor"):
            what = f"Table 1, {method}, {name} {score}"
            key = f"{dataset}_{score}"
            lines.append(_equal("tables", what, "the cell of Table 7", row[key], other[key]))
    return lines


def averages(tables: Tables) -> list[Line]:
    """The "average scores" of Tables 2 to 4 beside the scores that they average."""
    table2 = _by_method(tables["2"])
    table3 = _by_method(tables["3"])
    table4 = _by_method(tables["4"])
    table8 = _by_method(tables["8"])
    table9 = _by_method(tables["9"])
    # An average: its name, its row, and the row of Tables 8 and 9 that it may be the average of.
    pairs = [
        ("Table 3, Single-LLM", table3["Single-LLM"], "Stage 1 (Single-LLM)"),
        ("Table 3, Multi-LLMs", table3["Multi-LLMs"], "Stage 1 (Multi-LLMs)"),
        ("Table 2, Stage 1 w CRS", table2["Stage 1 w CRS"], "Stage 1 (Single-LLM)"),
        ("Table 2, Stage 1 w CRS", table2["Stage 1 w CRS"], "Stage 1 (Multi-LLMs)"),
        ("Table 2, Stage 2 w CRS", table2["Stage 2 w CRS"], "Stage 2"),
        ("Table 4, Local", table4["Local"], "Stage 2"),
    ]
    lines = []
    for (name, row, method), (dataset, title) in product(pairs, QUESTION_SETS.items()):
        scores = table9[method]
        mean = (scores[f"{dataset}_open_recall"] + scores[f"{dataset}_closed_accuracy"]) / 2
        rule = f"mean of open recall and closed accuracy of Table 9, {method}"
        lines.append(_equal("averages", f"{name}, {title}", rule, row[dataset], mean))
    for (name, row, method), (dataset, title) in product(pairs, REPORT_SETS.items()):
        lines += _report_averages(f"{name}, {title}", row[dataset], table8[method], dataset)
    for dataset, title in (QUESTION_SETS | REPORT_SETS).items():
        what = f"Table 2, Stage 2 w CRS, {title}"
        rule = "the cell of Table 4, Local"
        printed = table2["Stage 2 w CRS"][dataset]
        lines.append(_equal("averages", what, rule, printed, table4["Local"][dataset]))
    return lines


def _report_averages(what: str, printed: float, row: dict[str, Any], dataset: str) -> list[Line]:
    """An average over reports beside the means that one would try."""
    bleu = bleu_cells(row, dataset)
    others = [row[f"{dataset}_rouge_l"], row[f"{dataset}_meteor"]]
    tried = {
        "mean of mean BLEU, ROUGE-L and METEOR": (sum(bleu) / 4 + sum(others)) / 3,
        "mean of all six columns": (sum(bleu) + sum(others)) / 6,
    }
    lines = []
    for mean, tried_value in tried.items():
        rule = f"{mean} of Table 8, {row['method']}"
        lines.append(_equal("averages", what, rule, printed, tried_value))
    plain = undone_bleu(bleu)
    value = None if plain is None else (plain + sum(others)) / 3
    rule = (
        f"mean of BLEU with the smoothing undone, ROUGE-L and METEOR of Table 8, {row['method']}; "
        "within 1%"
    )
    holds = value is not None and abs(value - printed) <= 0.01 * printed
    computed = None if value is None else _round(value)
    lines.append(Line("averages", "inferred", what, rule, printed, computed, holds))
    return lines


def headlines(tables: Tables) -> list[Line]:
    """The gains in percent that the text states, beside Table 1."""
    rows = _by_method(tables["1"])
    ours = rows["+ MMedPO"]
    lines = []
    stated = [(*headline, "the row that the text compares with") for headline in HEADLINES]
    stated += [(*headline, "the best baseline of Table 1") for headline in OTHER_BASELINE]
    for title, baseline, kind, printed, which in stated:
        what = f"text: {title}"
        value = mean_gain(ours, rows[baseline], _columns(ours, kind))
        rule = f"mean over Table 1's columns of the relative gain over {baseline}, {which}"
        lines.append(_equal("headlines", what, rule, printed, value, HEADLINE_ROUNDING))
    for title, kind, printed in ABSTRACT:
        what = f"abstract: {title}"
        for rule, value in _abstract_candidates(rows, _columns(ours, kind)).items():
            lines.append(_equal("headlines", what, rule, printed, value, HEADLINE_ROUNDING))
    return lines


def mean_gain(ours: dict[str, Any], other: dict[str, Any], columns: Sequence[str]) -> float:
    """Mean over ``columns`` of 100 (ours / other - 1), in percent."""
    return sum(100 * (ours[column] / other[column] - 1) for column in columns) / len(columns)


def _abstract_candidates(
    rows: dict[str, dict[str, Any]], columns: Sequence[str]
) -> dict[str, float]:
    """Simple means over ``columns`` of Table 1 that the abstract's gains might be."""
    ours = rows["+ MMedPO"]
    baselines = [row for name, row in rows.items() if name.startswith("+ ") and row is not ours]
    mean_row = {}
    best_row = {}
    for column in columns:
        scores = [row[column] for row in baselines]
        mean_row[column] = sum(scores) / len(scores)
        best_row[column] = max(scores)
    references = {
        "LLaVA-Med v1.5": rows["LLaVA-Med v1.5"],
        "+ DPO": rows["+ DPO"],
        "the mean of the baselines": mean_row,
        "the best baseline of each column": best_row,
    }
    candidates = {}
    our_sum = sum(ours[column] for column in columns)
    for name, row in references.items():
        candidates[f"mean of the relative gains over {name}"] = mean_gain(ours, row, columns)
        ratio = our_sum / sum(row[column] for column in columns)
        candidates[f"relative gain of the mean score over {name}"] = 100 * (ratio - 1)
    return candidates


def counts(tables: Tables) -> list[Line]:
    """Is a printed accuracy a share of the test set's questions, and how many questions is a
    gain?
    """
    lines = []
    rows = _by_method(tables["1"])
    for column, total in COUNTS.items():
        if not column.endswith("closed_accuracy"):
            continue
        for method, row in rows.items():
            printed = row[column]
            nearest = 100 * round(printed * total / 100) / total
            rule = (
                f"the nearest share of {total} closed questions; other values need several runs or "
                "another count"
            )
            # Some cells are cut after two decimals instead of rounded.
            holds = abs(nearest - printed) < 2 * ROUNDING
            what = f"Table 1, {method}, {column}"
            lines.append(Line("counts", "inferred", what, rule, printed, _round(nearest), holds))
    for column, total in COUNTS.items():
        for other in ("+ DPO", "+ FiSAO"):
            gain = rows["+ MMedPO"][column] - rows[other][column]
            rule = (
                f"the gain in points, and in questions of {total} (open ones: as wholly right "
                "answers)"
            )
            what = f"Table 1, + MMedPO - {other}, {column}"
            lines.append(
                _arithmetic("counts", what, rule, _round(gain), gain * total / 100, holds=True)
            )
    return lines


def _columns(row: dict[str, Any], kind: str) -> list[str]:
    """Table 1's columns of a kind: open_recall, closed_accuracy, question (both) or report."""
    questions = [key for key in row if key.endswith(("open_recall", "closed_accuracy"))]
    if kind == "question":
        return questions
    if kind == "report":
        return [key for key in row if key != "method" and key not in questions]
    return [key for key in questions if key.endswith(kind)]


def _report_rows(tables: Tables) -> list[tuple[str, dict[str, Any], str]]:
    """Table number, row and data set of every row of Tables 7 and 8."""
    found = []
    for number in ("7", "8"):
        for row, dataset in product(tables[number], REPORT_SETS):
            found.append((number, row, dataset))
    return found


def _by_method(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of a table by its first column."""
    return {row["method"]: row for row in rows}


def _arithmetic(
    part: str, what: str, rule: str, printed: float, computed: float, holds: bool
) -> Line:
    return Line(part, "arithmetic", what, rule, printed, _round(computed), holds)


def _equal(
    part: str, what: str, rule: str, printed: float, value: float, rounding: float = 2 * ROUNDING
) -> Line:
    """A line that holds where both are one number, within the rounding of what is printed."""
    holds = abs(printed - value) <= rounding + 1e-9
    return _arithmetic(part, what, rule, printed, value, holds)


def _round(value: float) -> float:
    """As the paper prints: with two decimals."""
    return round(value, 2)


def select(lines: Sequence[Line], keep: Callable[[Line], bool]) -> list[dict[str, Any]]:
    """The lines that ``keep`` wants, as rows of a table: what, rule, printed, computed."""
    rows = []
    for line in lines:
        if keep(line):
            rows.append(
                {
                    "what": line.what,
                    "rule": line.rule,
                    "printed": line.printed,
                    "computed": line.computed,
                }
            )
    return rows
