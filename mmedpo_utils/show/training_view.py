"""Training runs in the browser: any logged quantity of several runs, one over the other, and what
each model answered on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from . import plots
from .pages import Page

QUANTITIES = {
    "chosen_logp": "log-probability of the chosen answer",
    "rejected_logp": "log-probability of the rejected answer",
    "loss": "loss",
    "margin": "reward margin",
    "accuracy": "pairs ranked right",
}
SOURCES = {"": "", "text_": ", text pairs", "visual_": ", visual pairs"}
SPLITS = {"": "", "validation_": ", held-out"}


def training_view(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Page:
    """Compare runs: a line each, for all pairs, for each source, in training and held out; and the
    answers to held-out questions at each look.

    Args:
        runs: each run's events by name (`launch.RunResult.events`).
    """
    metrics = []
    for split, of_split in SPLITS.items():
        for source, of_source in SOURCES.items():
            for key, name in QUANTITIES.items():
                metrics.append({"key": split + source + key, "name": name + of_source + of_split})
    keys = [metric["key"] for metric in metrics]
    listed: list[dict[str, Any]] = []
    for place, (name, events) in enumerate(runs.items()):
        points: dict[str, list[list[float]]] = {}
        for event in events:
            for key in keys:
                if event.get(key) is not None:
                    points.setdefault(key, []).append([event["step"], round(event[key], 4)])
        looks = []
        for event in events:
            if "samples" in event:
                asked = [_sample(sample) for sample in event["samples"]]
                looks.append({"step": event["step"], "samples": asked})
        colour = plots.model_colour(name, place)
        # Where a colour comes again, its line is dashed.
        dash = "6 4" if colour in [run["colour"] for run in listed] else ""
        run = {"name": name, "colour": colour, "dash": dash, "points": points, "looks": looks}
        listed.append(run)
    known = {key for run in listed for key in run["points"]}
    last = max((event["step"] for events in runs.values() for event in events), default=1)
    values = {
        "runs": listed,
        "metrics": [metric for metric in metrics if metric["key"] in known],
        "lastStep": int(last),
    }
    still = partial(plots.chosen_curves, runs)
    return Page("training", values, {}, still, f"Training curves of {', '.join(runs)}")


def _sample(sample: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(sample[key]) for key in ("question", "preferred", "answer")}
