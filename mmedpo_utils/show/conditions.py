"""Figures of the arena (`mmedpo arena`): what changes where one condition is changed and all others
are kept.

An *entry* is ``{"mean", "low", "high", "seeds"}``, in percent or percentage points, as
`comparison.compare` gives it; its band or bar is the 95% interval over patients and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import BLACK, METRIC_NAMES, RED, _axes, _tidy, _title, model_colour

Entry = Mapping[str, float]


def _band(
    axes: Axes, places: Sequence[float], entries: Sequence[Entry], colour: str, label: str = ""
) -> None:
    """A line through the means with its intervals."""
    axes.plot(places, [entry["mean"] for entry in entries], "o-", color=colour, label=label)
    axes.fill_between(
        places,
        [entry["low"] for entry in entries],
        [entry["high"] for entry in entries],
        color=colour,
        alpha=0.2,
        linewidth=0,
    )


def _stars(
    axes: Axes,
    points: Sequence[Mapping[str, Any]],
    condition: str,
    name: str,
    metric: str,
    colour: str,
) -> None:
    """The means of the points that have ``name``."""
    for point in points:
        if name in point:
            axes.plot(point[condition], point[name][metric]["mean"], "*", color=colour, ms=13)


def condition_lines(
    points: Sequence[Mapping[str, Any]],
    condition: str,
    label: str,
    metrics: Sequence[str],
    live: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """DPO and MMedPO by the value of one condition (above), and their difference (below), one
    column a metric.

    Args:
        points: one per value: the value under ``condition``, and entries by metric under ``dpo``,
            ``mmedpo`` and ``difference``.
        label: what the condition is called on the axis.
        live: points of the reader's own, drawn as stars: of ``dpo``, ``mmedpo`` and ``difference``
            those that they have.
    """
    figure, grid = _axes(2, len(metrics), (3.3 * len(metrics), 5), sharex=True)
    places = [point[condition] for point in points]
    for column, metric in enumerate(metrics):
        above, below = grid[0][column], grid[1][column]
        for name in ("dpo", "mmedpo"):
            colour = model_colour(name)
            _band(above, places, [point[name][metric] for point in points], colour, name)
            _stars(above, live, condition, name, metric, colour)
        _band(below, places, [point["difference"][metric] for point in points], BLACK)
        _stars(below, live, condition, "difference", metric, RED)
        below.axhline(0, color="0.5", linewidth=1)
        _title(above, METRIC_NAMES.get(metric, metric))
        _tidy(above, ylabel="percent" if column == 0 else "")
        _tidy(below, xlabel=label, ylabel="mmedpo - dpo, points" if column == 0 else "")
    grid[0][0].legend(fontsize=8, frameon=False)
    return figure


def dose_lines(points: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Figure:
    """Scores by dose, one row a metric; the same runs drawn against passes, optimiser steps and
    text pairs seen, because "as much training" means all three.

    Args:
        points: one per run: ``variant``, ``passes``, ``steps``, ``text_pairs_seen`` and entries by
            metric under ``scores``.
    """
    doses = {
        "passes": "passes over its own pairs",
        "steps": "optimiser steps",
        "text_pairs_seen": "text pairs seen",
    }
    figure, grid = _axes(len(metrics), 3, (9.6, 2.4 * len(metrics) + 0.4), sharey="row")
    variants = list(dict.fromkeys(point["variant"] for point in points))
    for row, metric in zip(grid, metrics, strict=True):
        for axes, (dose, label) in zip(row, doses.items(), strict=True):
            for variant in variants:
                own = [point for point in points if point["variant"] == variant]
                if dose == "text_pairs_seen" and not any(point[dose] for point in own):
                    continue  # visual pairs alone: no text pair is seen
                places = [point[dose] for point in own]
                entries = [point["scores"][metric] for point in own]
                _band(axes, places, entries, model_colour(variant), variant)
            _tidy(axes)
            if metric == metrics[-1]:
                axes.set_xlabel(label, fontsize=9)
        row[0].set_ylabel(METRIC_NAMES.get(metric, metric), fontsize=8)
    lines, names = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def difference_dots(
    differences: Mapping[str, Mapping[str, Entry]], metrics: Sequence[str]
) -> Figure:
    """Paired differences with their intervals, one row each, one panel a metric; filled where the
    interval leaves out zero.
    """
    figure, (panels,) = _axes(
        1, len(metrics), (2.6 * len(metrics) + 1.4, 0.3 * len(differences) + 1.1), sharey=True
    )
    for axes, metric in zip(panels, metrics, strict=True):
        for place, entries in enumerate(differences.values()):
            if metric not in entries:
                continue
            entry = entries[metric]
            apart = entry["low"] > 0 or entry["high"] < 0
            axes.plot([entry["low"], entry["high"]], [place, place], color=BLACK, linewidth=1.6)
            face = BLACK if apart else "white"
            axes.plot(entry["mean"], place, "o", color=BLACK, markerfacecolor=face)
        axes.axvline(0, color="0.5", linewidth=1)
        axes.set_yticks(range(len(differences)), list(differences))
        axes.grid(axis="y", color="0.92")
        _title(axes, METRIC_NAMES.get(metric, metric))
        _tidy(axes, xlabel="points")
    panels[0].invert_yaxis()
    return figure


def stop_curves(variants: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> Figure:
    """When to stop: a run's looks at its held-out pairs beside the scores of the validation
    patients.

    Args:
        variants: per variant ``looks`` (``step``, ``validation_accuracy``,
            ``validation_chosen_logp``) and ``validation`` (``passes``, a score for each metric).
    """
    figure, (panels,) = _axes(1, 2 + len(metrics), (3 * (2 + len(metrics)), 2.9))
    for name, curve in variants.items():
        colour = model_colour(name)
        looks = curve["looks"]
        steps = [look["step"] for look in looks]
        for axes, key in zip(panels, ("validation_accuracy", "validation_chosen_logp")):
            axes.plot(steps, [look.get(key) for look in looks], "o-", color=colour, label=name)
        points = curve["validation"]
        passes = [point["passes"] for point in points]
        for axes, metric in zip(panels[2:], metrics, strict=True):
            axes.plot(passes, [point[metric] for point in points], "o-", color=colour)
            _title(axes, f"{METRIC_NAMES.get(metric, metric)}, validation patients")
            _tidy(axes, xlabel="passes")
    panels[0].legend(fontsize=8, frameon=False)
    _title(panels[0], "held-out pairs ranked right")
    _title(panels[1], "held-out chosen log-probability")
    _tidy(panels[0], xlabel="step")
    _tidy(panels[1], xlabel="step", ylabel="nats")
    return figure
