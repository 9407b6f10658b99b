"""The paper's figures, drawn anew from this kit's own films, pairs and answers (arXiv 2412.06141,
Figures 1 to 10), and the rules by which their cases are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from ..base.rows import Row
from ..metrics import answer_score
from .figures import FORMULA
from .plots import (
    BLACK,
    BLUE,
    RED,
    YELLOW,
    _film,
    _heat,
    _outline,
    _paragraphs,
    _tidy,
    _title,
    draw_debate,
)


def method_drawing(
    film: np.ndarray,
    heat: np.ndarray,
    mask: np.ndarray,
    noised: np.ndarray,
    pair: Mapping[str, str],
    turns: Sequence[Mapping[str, Any]],
    confidence: float,
    weights: tuple[float, float],
) -> Figure:
    """The method in one drawing, from computed parts (the paper's Figure 2).

    Args:
        film: Shape: [H, W], uint8.
        heat: the visual tool's map. Shape: [g, g].
        mask: where the noise lies. Shape: [H, W].
        noised: the film of the visual pair's rejected side. Shape: [H, W].
        pair: ``question``, ``preferred`` and ``rejected`` of a text pair.
        turns: the debate about it.
        confidence: the visual tool's, 0 to 1.
        weights: of the text pair and of the visual pair in the loss.
    """
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    top, bottom = halves
    top.suptitle("I · Curate: a visual pair, and a text pair", fontsize=11, weight="bold")
    panels = top.subplots(1, 5, width_ratios=(1, 1, 1, 1, 1.7))
    _film(panels[0], film, "film x, preferred side")
    _film(panels[1], film, "where MedKLIP looks")
    _heat(panels[1], film, heat, float(np.max(heat)), 0.9)
    _film(panels[2], film, "brightest part: the mask")
    _outline(panels[2], mask, YELLOW)
    _film(panels[3], noised, "noised film x*, rejected")
    for left, right in zip(panels[:3], panels[1:4]):
        arrow = ConnectionPatch(
            (1.01, 0.5), (-0.01, 0.5), left.transAxes, right.transAxes, arrowstyle="-|>"
        )
        top.add_artist(arrow)
    _paragraphs(
        panels[4],
        [
            ("Question", pair["question"], BLACK),
            ("Preferred answer", pair["preferred"], BLUE),
            ("Rejected answer", pair["rejected"], RED),
        ],
        width=40,
    )
    scored, trained = bottom.subfigures(1, 2, width_ratios=(1.2, 1))
    scored.suptitle("II · Score the clinical relevance", fontsize=11, weight="bold")
    debate, tool = scored.subplots(1, 2, width_ratios=(2, 1))
    _debate(debate, turns)
    _bar(tool, confidence)
    trained.suptitle("III · Train by weighted DPO", fontsize=11, weight="bold")
    axes = trained.subplots()
    axes.set_axis_off()
    loss = r"$-\,s'\,\log\sigma\left(\beta\,[\,r(y_w, x) - r(y_l, x^*)\,]\right)$"
    axes.text(0.5, 0.78, loss, ha="center", fontsize=13, label=FORMULA)
    lines = [
        "r: log-probability of an answer, less that of the model before training",
        f"text pair: x* is x, and its weight s' here is {weights[0]:.2f}",
        f"visual pair: both answers are equal, and s' here is {weights[1]:.2f}",
        "s': the relevance score, normalised to 0.75 to 1.25",
    ]
    axes.text(0.5, 0.58, "\n".join(lines), ha="center", va="top", fontsize=9, linespacing=1.7)
    return figure


def _debate(axes: Axes, turns: Sequence[Mapping[str, Any]]) -> None:
    if not turns:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no debate is stored", ha="center", fontsize=9)
        return
    draw_debate(axes, turns)
    axes.legend(fontsize=7, frameon=False, loc="upper center", ncols=3)
    _title(axes, "text: a panel debates")
    _tidy(axes, ylim=(-0.05, 1.25))
    axes.set_xlabel("turn (hollow: agrees)", fontsize=8)


def _bar(axes: Axes, confidence: float) -> None:
    axes.bar([0], [confidence], color=BLUE, width=0.5)
    axes.text(0, confidence, f"{confidence:.2f}", ha="center", va="bottom", fontsize=9)
    axes.set_xticks([])
    axes.set_xlim(-0.7, 0.7)
    _title(axes, "film: the tool's confidence")
    _tidy(axes, ylim=(0, 1.15))


def mended_and_spoiled(
    base: Sequence[Row], trained: Sequence[Row], count: int
) -> tuple[list[Row], list[Row]]:
    """The first ``count`` questions that training mended, and the first that it spoiled.

    The rule: closed and open questions in the order of the test file; mended is wrong before
    (score 0) and right after (score 1), spoiled the other way round.

    Returns:
        rows with ``question``, ``truth``, ``image``, ``before`` and ``after``.
    """
    found: dict[bool, list[Row]] = {True: [], False: []}
    for before, after in zip(base, trained, strict=True):
        if before["answer_type"] == "REPORT":
            continue
        scores = answer_score(before), answer_score(after)
        if set(scores) == {0.0, 1.0}:
            row = {key: before[key] for key in ("question", "image")}
            row |= {"truth": before["answer"], "before": before["prediction"]}
            found[scores[1] == 1.0].append(row | {"after": after["prediction"]})
    return found[True][:count], found[False][:count]


def first_apart(predictions: Mapping[str, Sequence[Row]], kind: str) -> dict[str, Any] | None:
    """The first question of a kind (``CLOSED``, ``OPEN``) that not all models answer alike: its
    ``question``, ``image``, ``truth``, and each model's answer; None where there is none.
    """
    for rows in zip(*predictions.values(), strict=True):
        said = [str(row["prediction"]) for row in rows]
        if rows[0]["answer_type"] == kind and len(set(said)) > 1:
            found = {"question": rows[0]["question"], "image": rows[0]["image"]}
            found["truth"] = rows[0]["answer"]
            return found | dict(zip(predictions, said, strict=True))
    return None


def published_stages(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Stage 1, stage 2 and both on the four data sets, as far as the paper prints them (its Figure
    3 is drawn without numbers).

    Questions: the mean of open recall and closed accuracy, Tables 9 and 1. Reports: ROUGE-L, Table
    8.
    """
    answered = {row["method"]: row for row in tables["9"]}
    answered["both"] = next(row for row in tables["1"] if row["method"] == "+ MMedPO")
    reported = {row["method"]: row for row in tables["8"]}
    names = {
        "stage 1": ("Stage 1 (Multi-LLMs)", "Stage 1 (Multi-LLMs)"),
        "stage 2": ("Stage 2", "Stage 2"),
        "both": ("both", "Stage 1+2 (Multi-LLMs)"),
    }
    rows = []
    for name, (of_questions, of_reports) in names.items():
        row: dict[str, Any] = {"method": name}
        for words, key in (("SLAKE", "slake"), ("VQA-RAD", "vqa_rad")):
            values = answered[of_questions]
            both = values[f"{key}_open_recall"] + values[f"{key}_closed_accuracy"]
            row[f"{words}, mean of both scores"] = both / 2
        for words, key in (("IU-Xray", "iu_xray"), ("MIMIC-CXR", "mimic_cxr")):
            row[f"{words}, ROUGE-L"] = reported[of_reports][f"{key}_rouge_l"]
        rows.append(row)
    return rows
