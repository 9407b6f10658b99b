"""Figures: arrays and tables in, a matplotlib `Figure` out (or HTML for a table); nothing is read,
written or shown.

Images are [H, W] or [H, W, 3], uint8 or float in [0, 1]. Maps use the upper part of inferno and
categories the Okabe-Ito colours, which colour-blind readers can tell apart. Text that comes from
data is never read as TeX or HTML.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from ..phantom.world import FINDINGS

# The map's colours begin where they can be told from a grey film. Shape: [256, 4].
MAP_COLOURS = colormaps["inferno"](np.linspace(0.35, 1, 256))
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, BLACK = OKABE_ITO = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#000000",
)
# A model has one colour in all notebooks; its shuffled twin is the hollow mark of the same colour.
MODEL_COLOURS = {
    "base": BLACK,
    "sft": GREEN,
    "dpo": ORANGE,
    "stage1": SKY,
    "stage2": PINK,
    "mmedpo": BLUE,
}
# For names that the kit does not know: none of these is a known model's.
OTHER_COLOURS = (RED, "#5D3A9B", "#8B5A2B", "#7F7F7F", YELLOW)
COLUMN_WORDS = {
    "slake": "SLAKE",
    "vqa_rad": "VQA-RAD",
    "iu_xray": "IU-Xray",
    "mimic_cxr": "MIMIC-CXR",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
}
METRIC_NAMES = {
    "closed_accuracy": "closed accuracy",
    "open_recall": "open recall",
    "bleu": "BLEU (mean of 1 to 4)",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "attention_in_lesion": "attention in the lesion",
    "severity": "severity (less is better)",
}


def _axes(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _title(axes: Axes, text: str, size: float = 9) -> None:
    axes.set_title(text, fontsize=size, parse_math=False)


def _tidy(axes: Axes, **settings: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set(**settings)


def model_colour(name: str, place: int = 0) -> str:
    """The colour of a model, or of its variant such as ``dpo_shuffled`` or ``dpo-live``; for a name
    that the kit does not know, another one by its ``place``.
    """
    for known, colour in MODEL_COLOURS.items():
        if name == known or name.startswith((f"{known}_", f"{known}-")):
            return colour
    return OTHER_COLOURS[place % len(OTHER_COLOURS)]


def _finding_colours(names: Sequence[str]) -> dict[str, str]:
    """One colour a finding in all figures; other names get those that are left."""
    known = {name: OKABE_ITO[place % 7] for place, name in enumerate(FINDINGS)}
    used = {known[name] for name in names if name in known}
    left = [colour for colour in OKABE_ITO[:7] if colour not in used] or OKABE_ITO[:7]
    others = [name for name in names if name not in known]
    return known | {name: left[place % len(left)] for place, name in enumerate(others)}


def _film(axes: Axes, image: np.ndarray, title: str, title_size: float = 9) -> None:
    image = np.asarray(image)
    axes.imshow(
        image,
        cmap="gray",
        vmin=0,
        vmax=255 if image.dtype == np.uint8 else 1,
        interpolation="antialiased",
    )
    axes.set_axis_off()
    _title(axes, title, title_size)


def _outline(axes: Axes, mask: np.ndarray, colour: str = SKY) -> None:
    mask = np.asarray(mask, float)
    if mask.min() < 0.5 <= mask.max():
        drawn = axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)
        # A dark line beneath keeps it visible on bright films and bright colours.
        drawn.set_path_effects([withStroke(linewidth=2.4, foreground="black")])


def upsampled(heat_map: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A map brought to an image's size, bilinear between cell centres. Shape: [g, g] to [H, W]."""
    heat = Image.fromarray(np.asarray(heat_map, np.float32))
    return np.asarray(heat.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _heat(axes: Axes, image: np.ndarray, heat: np.ndarray, full: float, opacity: float) -> None:
    """A map over a film that shows through: opacity follows the value, and is ``opacity`` at
    ``full``.
    """
    colours = MAP_COLOURS.copy()
    colours[:, 3] = opacity * np.linspace(0, 1, 256)
    heat = upsampled(heat, np.shape(image))
    axes.imshow(heat, cmap=ListedColormap(colours), vmin=0, vmax=full)


def _heat_bar(axes: Axes, label: str) -> None:
    """The key of a map's colours, as they look over a dark film."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    bar = figure.colorbar(axes.images[-1], ax=axes, shrink=0.75)
    bar.ax.set_facecolor("0.15")
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=8)


def film_grid(
    films: Sequence[np.ndarray],
    titles: Sequence[str],
    masks: Sequence[Mapping[str, np.ndarray]] | None = None,
    columns: int = 4,
) -> Figure:
    """Films in a grid; each film's lesion masks (name to [H, W]) are outlined, one colour a name,
    with one legend.
    """
    rows = -(-len(films) // columns)
    figure, grid = _axes(rows, columns, (1.9 * columns, 2.2 * rows + 0.4))
    names = sorted({name for each in masks or [] for name in each})
    colours = _finding_colours(names)
    for place, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if place < len(films):
            _film(axes, films[place], textwrap.fill(titles[place], 28), 8)
            for name, mask in (masks[place] if masks else {}).items():
                _outline(axes, mask, colours[name])
    if names:
        lines = [Line2D([], [], color=colours[name]) for name in names]
        figure.legend(lines, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def attention_overlay(
    image: np.ndarray,
    heat_map: np.ndarray,
    lesion_mask: np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """A film beside its heat map, overlaid. Shapes: heat_map [g, g], lesion_mask [H, W]
    (outlined).
    """
    figure, ((left, right),) = _axes(1, 2, (5.8, 2.7))
    _film(left, image, "film")
    _film(right, image, title or "attention")
    # In multiples of the mean cell, an absent finding's map is not stretched to look like one
    # that is sure.
    times = np.asarray(heat_map) * np.size(heat_map) / np.sum(heat_map)
    _heat(right, image, times, float(times.max()), 0.9)
    if lesion_mask is not None:
        for axes in (left, right):
            _outline(axes, lesion_mask)
    _heat_bar(right, "attention, times the mean cell")
    return figure


def attention_grid(
    image: np.ndarray, maps: np.ndarray, lesion_mask: np.ndarray | None = None
) -> Figure:
    """One overlay per decoder layer (rows) and head (columns). Shape of maps: [layers, heads, g,
    g].
    """
    layers, heads = np.shape(maps)[:2]
    figure, grid = _axes(layers, heads, (1.45 * heads, 1.6 * layers))
    for layer, row in enumerate(grid):
        for head, axes in enumerate(row):
            _film(axes, image, f"layer {layer + 1}, head {head + 1}", 8)
            heat = np.asarray(maps[layer][head])
            _heat(axes, image, heat, float(heat.max()), 0.9)
            if lesion_mask is not None:
                _outline(axes, lesion_mask)
    return figure


def attention_before_after(
    image: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    lesion_mask: np.ndarray | None = None,
    boxed: bool = False,
) -> Figure:
    """A model's attention to the image before and after training on one scale, and the change.

    Args:
        before: Shape: [g, g], with sum 1; ``after`` likewise.
        lesion_mask: outlined. Shape: [H, W].
        boxed: draw a box around the cells that rose by half of the largest rise or more.
    """
    figure, (panels,) = _axes(1, 4, (10, 2.4))
    cells = np.size(before)
    top = cells * float(max(np.max(before), np.max(after)))
    _film(panels[0], image, "film")
    for axes, heat, title in zip(
        panels[1:3], (before, after), ("before training", "after training")
    ):
        _film(axes, image, title)
        _heat(axes, image, cells * np.asarray(heat), top, 0.9)
    _heat_bar(panels[2], "times the mean cell")
    _film(panels[3], image, "after minus before")
    change = cells * upsampled(np.subtract(after, before), np.shape(image))
    limit = float(np.abs(change).max()) + 1e-12
    # Opacity follows the size of the change, so that the film shows where nothing changed.
    colours = colormaps["PuOr_r"](np.linspace(0, 1, 256))
    colours[:, 3] = np.abs(np.linspace(-1, 1, 256))
    panels[3].imshow(change, cmap=ListedColormap(colours), vmin=-limit, vmax=limit)
    _heat_bar(panels[3], "times the mean cell")
    rise = np.subtract(after, before)
    if boxed and rise.max() > 0:
        rows, columns = np.nonzero(rise >= rise.max() / 2)
        down, across = np.shape(image)[0] / len(rise), np.shape(image)[1] / len(rise)
        corner = (columns.min() * across - 0.5, rows.min() * down - 0.5)
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        box = Rectangle(corner, width * across, height * down, fill=False, edgecolor=RED, lw=1.8)
        panels[2].add_patch(box)
    if lesion_mask is not None:
        for axes in panels:
            _outline(axes, lesion_mask)
    return figure


def head_grid(table: Sequence[Mapping[str, Any]], names: Sequence[str], chance: float) -> Figure:
    """Which heads look at the lesion: one square a head, for each model and for their difference.

    A difference whose interval holds zero is written in brackets.

    Args:
        table: `lesion_attention.head_table`'s rows.
        names: the models' names, and ``difference`` where it is to be shown.
        chance: the lesion's share of the film, in percent.
    """
    layers = max(row["layer"] for row in table)
    heads = max(row["head"] for row in table)
    figure, (panels,) = _axes(1, len(names), (0.62 * heads * len(names) + 1, 0.5 * layers + 1.3))
    most = max(row[name]["mean"] for row in table for name in names if name != "difference")
    for axes, name in zip(panels, names, strict=True):
        change = name == "difference"
        values = np.zeros((layers, heads))
        for row in table:
            entry = row[name]
            values[row["layer"] - 1, row["head"] - 1] = entry["mean"]
            text = f"{entry['mean']:+.1f}" if change else f"{entry['mean']:.0f}"
            if change and entry["low"] <= 0 <= entry["high"]:
                text = f"({text})"
            place = (row["head"] - 1, row["layer"] - 1)
            axes.text(*place, text, ha="center", va="center", fontsize=8)
        if change:
            limit = float(np.abs(values).max()) or 1.0
            axes.imshow(values, cmap="PuOr_r", vmin=-2 * limit, vmax=2 * limit, aspect="auto")
        else:
            axes.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * most, aspect="auto")
        axes.set_xticks(range(heads), [str(n + 1) for n in range(heads)], fontsize=8)
        axes.set_yticks(range(layers), [str(n + 1) for n in range(layers)], fontsize=8)
        axes.set_xlabel("head", fontsize=8)
        _title(axes, f"{name}, points" if change else name)
    panels[0].set_ylabel("layer", fontsize=8)
    title = f"attention to the image that lies in the lesion, percent; by area {chance:.1f}"
    figure.suptitle(title, fontsize=10)
    return figure


def noise_comparison(
    image: np.ndarray,
    mask: np.ndarray,
    noised: Mapping[str, np.ndarray],
    lesion: np.ndarray | None = None,
) -> Figure:
    """The original, the mask that the noise fills, and one column per kind of noise (name to
    image); the true lesion is outlined where it is known. Shape of all: [H, W].
    """
    figure, (panels,) = _axes(1, 2 + len(noised), (1.8 * (2 + len(noised)), 2.1))
    _film(panels[0], image, "original")
    mask = np.asarray(mask, float)
    _film(panels[1], image, f"mask: {100 * np.mean(mask):.1f}% of the film")
    panels[1].imshow(np.ones_like(mask), cmap=ListedColormap([YELLOW]), alpha=0.5 * mask)
    if lesion is not None:
        for axes in panels[:2]:
            _outline(axes, lesion)
    for axes, (name, picture) in zip(panels[2:], noised.items()):
        _film(axes, picture, name)
    return figure


def noise_ladder(noised: Mapping[float, np.ndarray]) -> Figure:
    """One film at several signal levels, sqrt of the cumulative schedule (level to image)."""
    figure, (panels,) = _axes(1, len(noised), (1.7 * len(noised), 2.0))
    for axes, (level, picture) in zip(panels, noised.items()):
        _film(axes, picture, f"signal {level:.2f}")
    return figure


def weight_histograms(
    weights: Mapping[str, np.ndarray], low: float = 0.75, high: float = 1.25
) -> Figure:
    """Weights under each normalisation side by side, with the paper's bounds and the share that
    is at a bound.
    """
    figure, (panels,) = _axes(1, len(weights), (3.1 * len(weights), 2.8), sharex=True)
    every = np.concatenate([*weights.values(), (0, 1.3)])
    edges = np.linspace(every.min(), every.max(), 40)
    for axes, (name, values), colour in zip(panels, weights.items(), (BLUE, ORANGE, GREEN, PINK)):
        values = np.asarray(values)
        at_bound = np.mean(np.isclose(values, low) | np.isclose(values, high))
        axes.hist(values, bins=edges, color=colour)
        for bound in (low, high):
            axes.axvline(bound, color=BLACK, linewidth=0.9, linestyle="dashed")
        _title(axes, f"{name}: mean {values.mean():.2f}, {100 * at_bound:.0f}% at a bound")
        _tidy(axes, xlabel="weight in the loss", ylabel="pairs" if axes is panels[0] else "")
    return figure


def _paragraphs(
    axes: Axes, parts: Sequence[tuple[str, str, str]], width: int = 46, limit: int = 170
) -> None:
    """Headed paragraphs (heading, text, heading's colour) down an empty axes; a text is cut at
    ``limit`` letters.
    """
    axes.set_axis_off()
    line = 12  # points
    down = 0.0
    for heading, text, colour in parts:
        short = textwrap.shorten(str(text), limit, placeholder=" ...")
        lines = textwrap.wrap(short, width) or ["(empty)"]
        settings: dict[str, Any] = {
            "xy": (0, 1),
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "fontsize": 9,
            "va": "top",
            "parse_math": False,
            "in_layout": False,
            "annotation_clip": False,
        }
        axes.annotate(heading, xytext=(0, -down), color=colour, weight="bold", **settings)
        body = "\n".join(lines)
        axes.annotate(body, xytext=(0, -down - 1.2 * line), linespacing=1.25, **settings)
        down += line * (1.9 + len(lines))


def pair_card(
    image: np.ndarray,
    rejected_image: np.ndarray | None,
    question: str,
    chosen: str,
    rejected: str,
    weight: float | None,
) -> Figure:
    """One preference pair: what is preferred on which image, what is rejected on which, and the
    pair's relevance.
    """
    figure, (panels,) = _axes(1, 3, (9, 3.0), width_ratios=(1, 1, 1.5))
    _film(panels[0], image, "image of the preferred side")
    _film(
        panels[1],
        image if rejected_image is None else rejected_image,
        "the same image" if rejected_image is None else "image of the rejected side",
    )
    _paragraphs(
        panels[2],
        [
            ("Question", question, BLACK),
            ("Preferred", chosen, BLUE),
            ("Rejected", rejected, RED),
            ("Clinical relevance", "none given" if weight is None else f"{weight:.2f}", BLACK),
        ],
    )
    return figure


def debate_plot(turns: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """The scores of one debate, turn by turn; ``turns`` is a `Debate`'s history as plain values."""
    figure, ((axes,),) = _axes(1, 1, (6.4, 2.9))
    draw_debate(axes, turns)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _title(axes, title)
    key = "turn (filled: an own score; hollow: agrees with the score before)"
    _tidy(axes, xlabel=key, ylabel="relevance score")
    return figure


def draw_debate(axes: Axes, turns: Sequence[Mapping[str, Any]]) -> None:
    """A debate's scores by turn, a colour and a mark for each member; a turn that agrees with the
    score before it is hollow.
    """
    scores = [turn["score"] for turn in turns]
    axes.plot(range(1, len(turns) + 1), scores, color="0.6", linewidth=1, zorder=1)
    members = list(dict.fromkeys(turn["member"] for turn in turns))
    for place, member in enumerate(members):
        spoken = [(n, turn) for n, turn in enumerate(turns, 1) if turn["member"] == member]
        colour, marker = OKABE_ITO[place % 7], "os^Dv"[place % 5]
        axes.scatter(
            [n for n, _ in spoken],
            [turn["score"] for _, turn in spoken],
            s=60,
            zorder=2,
            facecolors=["white" if turn["agrees"] else colour for _, turn in spoken],
            edgecolors=colour,
            marker=marker,
        )
        axes.scatter([], [], s=60, color=colour, marker=marker, label=str(member))
    axes.set(ylim=(-0.05, 1.05), xticks=range(1, len(turns) + 1))


def training_curves(events: Sequence[Mapping[str, float]], stopped: bool = False) -> Figure:
    """Loss, log-probabilities, margin and accuracy by step; the title tells the time left, or that
    the run was ``stopped``.

    ``events`` hold ``step``, ``total_steps``, ``loss``, ``chosen_logp``, ``rejected_logp``,
    ``margin``, ``accuracy`` and ``seconds_left``; a key that an event lacks is not drawn for it.
    """
    figure, (panels,) = _axes(1, 4, (11, 2.7))
    lines = {
        "loss": {"loss": BLUE},
        "log-probability": {"chosen_logp": BLUE, "rejected_logp": RED},
        "reward margin": {"margin": GREEN},
        "pairs ranked right": {"accuracy": PINK},
    }
    for axes, (name, keys) in zip(panels, lines.items()):
        for key, colour in keys.items():
            points = [(event["step"], event[key]) for event in events if event.get(key) is not None]
            if not points:
                continue
            axes.plot(
                *np.transpose(points),
                "--" if key == "rejected_logp" else "-",
                color=colour,
                marker="." if len(points) < 30 else "",
                label=key.removesuffix("_logp"),
            )
        if axes.lines and len(keys) > 1:
            axes.legend(fontsize=8, frameon=False)
        _title(axes, name)
        _tidy(
            axes,
            xlabel="step",
            xlim=(0, max((event["total_steps"] for event in events), default=1)),
        )
    panels[3].set_ylim(-0.05, 1.05)
    if events:
        left = events[-1].get("seconds_left") or 0
        last = events[-1]
        if stopped:
            ending = "stopped"
        elif left >= 90:
            ending = f"about {left / 60:.0f} min left"
        elif left:
            ending = f"about {left:.0f} s left"
        else:
            ending = "done"
        figure.suptitle(
            f"step {last['step']:.0f} of {last['total_steps']:.0f}, {ending}", fontsize=10
        )
    return figure


def chosen_curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Chosen log-probability by step, one line a run (name to events), each smoothed over ten
    steps.
    """
    figure, ((axes,),) = _axes(1, 1, (6.6, 3))
    for place, (name, events) in enumerate(runs.items()):
        logged = [(e["step"], e["chosen_logp"]) for e in events if e.get("chosen_logp") is not None]
        if not logged:
            continue
        steps, values = np.transpose(logged)
        width = min(10, len(values))
        axes.plot(
            steps[width - 1 :],
            np.convolve(values, np.ones(width) / width, "valid"),
            color=model_colour(name, place),
            marker="." if len(values) < 30 else "",
            label=name,
        )
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _title(axes, "log-probability of the chosen answer, training pairs")
    _tidy(axes, xlabel="step", ylabel="nats")
    return figure


def column_name(key: str) -> str:
    """A published column's key in words: ``iu_xray_bleu1`` is "IU-Xray BLEU-1"."""
    for part, words in COLUMN_WORDS.items():
        key = key.replace(part, words)
    return key.replace("_", " ")


def score_dots(
    rows: Sequence[Mapping[str, Any]],
    label: str,
    highlight: str = "",
    title: str = "",
    baseline: str = "",
) -> Figure:
    """Published scores: one panel a column, one dot a row; the row named ``highlight`` is marked,
    and a dashed line stands at that of ``baseline``.

    Args:
        rows: one dict a method; ``label`` is the key of its name, every other key a column of
            numbers (or None).
    """
    columns = [key for key in rows[0] if key != label]
    figure, grid = _axes(
        -(-len(columns) // 4),
        min(4, len(columns)),
        (2.4 * min(4, len(columns)) + 1.2, (0.24 * len(rows) + 0.8) * -(-len(columns) // 4) + 0.3),
        sharey=True,
    )
    for axes, column in zip(grid.flat, columns):
        if baseline:
            first = next(row for row in rows if row[label] == baseline)
            if first[column] is not None:
                axes.axvline(first[column], color="0.6", linestyle="--", linewidth=0.9)
        for place, row in enumerate(rows):
            if row[column] is not None:
                marked = row[label] == highlight
                axes.plot(
                    row[column],
                    place,
                    "D" if marked else "o",
                    color=RED if marked else BLUE,
                    markersize=7 if marked else 5,
                )
        axes.set_yticks(range(len(rows)), [row[label] for row in rows])
        axes.margins(x=0.12, y=0.08)
        axes.grid(axis="y", color="0.9")
        _title(axes, column_name(column))
        _tidy(axes)
    grid[0][0].invert_yaxis()
    for axes in grid.flat[len(columns) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure


def undone_dots(rows: Sequence[Mapping[str, Any]], label: str, floor: float) -> Figure:
    """Mean BLEU as printed and with the smoothing undone, one line a row.

    Args:
        rows: one dict a method: its name under ``label``, ``printed`` and ``undone`` in percent.
        floor: what the smoothing gives where hardly a word is right, in percent.
    """
    figure, ((axes,),) = _axes(1, 1, (6.4, 0.28 * len(rows) + 1.1))
    for place, row in enumerate(rows):
        axes.plot(
            [row["undone"], row["printed"]], [place, place], color="0.7", linewidth=1.5, zorder=1
        )
    places = range(len(rows))
    axes.plot([row["printed"] for row in rows], places, "o", color=BLUE, label="printed")
    axes.plot([row["undone"] for row in rows], places, "D", color=ORANGE, label="smoothing undone")
    axes.axvline(
        floor, color=BLACK, linestyle=":", linewidth=1, label="hardly a word right, smoothed"
    )
    axes.set_yticks(places, [row[label] for row in rows])
    axes.invert_yaxis()
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12 - 1.2 / len(rows)),
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    _title(axes, "Mean of BLEU-1 to BLEU-4 on IU-Xray, published, and with the smoothing undone")
    _tidy(axes, xlabel="percent")
    return figure


def score_intervals(
    table: Mapping[str, Mapping[str, Mapping[str, float]]], metrics: Sequence[str] | None = None
) -> Figure:
    """Models side by side with 95% intervals, one panel a metric; ``table`` is what
    `comparison.compare` returns. A ``_shuffled`` twin is the hollow mark in its model's colour; the
    dashed line is the first model.
    """
    metrics = metrics or list(
        dict.fromkeys(metric for scores in table.values() for metric in scores)
    )
    figure, (panels,) = _axes(
        1, len(metrics), (2.9 * len(metrics), 0.26 * len(table) + 1.1), sharey=True
    )
    first = next(iter(table.values()))
    for axes, metric in zip(panels, metrics):
        if metric in first:
            axes.axvline(first[metric]["mean"], color="0.6", linestyle="--", linewidth=0.9)
        for place, (name, scores) in enumerate(table.items()):
            if metric in scores:
                entry = scores[metric]
                colour = model_colour(name, place)
                fill = "white" if name.endswith("_shuffled") else colour
                axes.plot([entry["low"], entry["high"]], [place] * 2, color=colour, linewidth=1.6)
                axes.plot(entry["mean"], place, "o", color=colour, markerfacecolor=fill)
                text = f"  {entry['mean']:.1f}"
                axes.text(entry["high"], place, text, va="center", fontsize=8)
        axes.set_yticks(range(len(table)), list(table))
        axes.margins(x=0.2)
        axes.grid(axis="y", color="0.92")
        _title(axes, METRIC_NAMES.get(metric, metric))
        _tidy(axes, xlabel="percent")
    panels[0].invert_yaxis()
    return figure


def faithfulness_curves(
    curves: Mapping[str, Mapping[str, np.ndarray]], shares: Sequence[float]
) -> Figure:
    """Mean deletion and insertion curves, one panel each: the probability of what was said by the
    share of the cells that are hidden, or shown, in the order of the map, of the true lesion, and
    at random.

    Args:
        curves: by way and order, a probability for each of ``shares``.
    """
    figure, (panels,) = _axes(1, len(curves), (3.6 * len(curves), 3), sharey=True)
    colours = {"map": BLUE, "lesion": GREEN, "random": BLACK}
    labels = {"deletion": "hidden", "insertion": "shown"}
    for axes, (way, orders) in zip(panels, curves.items(), strict=True):
        for order, values in orders.items():
            dash = "--" if order == "random" else "-"
            percent = 100 * np.asarray(shares)
            axes.plot(percent, values, dash, marker=".", color=colours[order], label=order)
        _title(axes, way)
        _tidy(axes, xlabel=f"cells {labels[way]}, percent", ylim=(0, 1))
    panels[0].set_ylabel("probability of what was said", fontsize=8)
    panels[0].legend(fontsize=8, frameon=False, title="order", title_fontsize=8)
    return figure


def memory_bars(runs: Mapping[str, Mapping[str, float]]) -> Figure:
    """Memory of one GPU in GiB: one bar per run, ``{run: {part: GiB}}``, its parts side by side;
    every run has the same parts.
    """
    figure, axes = _axes(1, 1, (7.5, 0.9 + 0.45 * len(runs)))
    axes = axes[0, 0]
    start = np.zeros(len(runs))
    for part, colour in zip(next(iter(runs.values())), (BLUE, ORANGE, GREEN, SKY, PINK)):
        values = np.array([parts[part] for parts in runs.values()])
        axes.barh(list(runs), values, left=start, color=colour, label=part)
        start += values
    for place, value in enumerate(start):
        axes.text(value, place, f" {value:.1f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.legend(fontsize=8, frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    _tidy(axes, xlabel="GiB on each GPU, estimated")
    return figure


def pointing_game_bars(rates: Mapping[str, float], chance: Mapping[str, float] | float) -> Figure:
    """Share (0 to 1) of films whose map peaks inside the lesion, per finding, with the chance level
    as a tick.
    """
    figure, ((axes,),) = _axes(1, 1, (6.2, 0.3 * len(rates) + 1.1))
    for place, (name, rate) in enumerate(rates.items()):
        by_chance = chance[name] if isinstance(chance, Mapping) else chance
        axes.barh(place, 100 * rate, color=BLUE, height=0.65)
        axes.plot(
            [100 * by_chance] * 2,
            [place - 0.4, place + 0.4],
            color=RED,
            linewidth=2,
            label="chance" if place == 0 else None,
        )
        axes.text(100 * rate, place, f" {100 * rate:.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rates)), list(rates))
    axes.set_xlim(0, 108)
    axes.invert_yaxis()
    if rates:
        figure.legend(loc="outside upper right", fontsize=8, frameon=False)
    _tidy(axes, xlabel="films whose map peaks in the lesion or within 8 pixels (percent)")
    return figure


def results_table(rows: Sequence[Mapping[str, Any]], caption: str = "", decimals: int = 1) -> str:
    """An HTML table of dicts, columns in the order of their first appearance, headed by their names
    in words; every text is escaped. A table wider than its place gets a scroll bar.

    A float gets ``decimals``, a missing value or None a dash, a ``{"mean", "low", "high"}`` its
    interval. Without rows the table says so.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row)) or ["no rows"]
    heads = [html.escape(column_name(str(name))) for name in columns]
    label = html.escape(caption or "table")
    lines = [
        # By keys, too, a wide table can be scrolled.
        f'<div style="overflow-x:auto" tabindex="0" role="region" aria-label="{label}"><table>',
        f"<caption>{html.escape(caption)}</caption>" if caption else "",
        "<tr>" + "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr>",
    ]
    for row in rows:
        cells = []
        for name in columns:
            # JupyterLab sets all cells to the right, sentences too.
            side = ' style="text-align:left"' if isinstance(row.get(name), str) else ""
            cells.append(f"<td{side}>{html.escape(_cell(row.get(name), decimals))}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join(line for line in [*lines, "</table></div>"] if line)


def _cell(value: Any, decimals: int) -> str:
    if isinstance(value, Mapping):
        mean, low, high = (f"{value[key]:.{decimals}f}" for key in ("mean", "low", "high"))
        return f"{mean} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.{decimals}f}"
    return "-" if value is None else str(value)
