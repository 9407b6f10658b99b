"""Every figure is drawn from tables alone; what it shows is read back from its axes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmedpo_utils.show import conditions, paper, plots

DATA_MANIFESTS = Path(__file__).resolve().parents[1] / "data_manifests"
RNG = np.random.default_rng(0)
FILM = np.tile(np.linspace(0, 1, 64), (64, 1))
MASK = np.zeros((64, 64), bool)
MASK[10:30, 20:40] = True
HEAT = RNG.random((14, 14))
EVENTS = [
    {
        "step": n,
        "total_steps": 40,
        "loss": 0.7 - n / 100,
        "chosen_logp": -9.0,
        "rejected_logp": -9.0 - n,
        "margin": n / 9,
        "accuracy": 0.5,
        "seconds_left": 40 - n,
    }
    for n in range(1, 21)
]
TABLE = {
    name: {"closed_accuracy": {"mean": 50.0 + n, "low": 45.0, "high": 60.0, "seeds": 1}}
    for n, name in enumerate(
        ("base", "sft", "dpo", "stage1", "stage2", "mmedpo", "mmedpo_shuffled")
    )
}
TURNS = [
    {"round": 1, "member": name, "score": score, "agrees": False, "reason": ""}
    for name, score in (("a $x", 0.2), ("b", 0.4), ("c", 0.4))
]
ENTRY = {"mean": 50.0, "low": 45.0, "high": 60.0, "seeds": 3}
BOTH = {"closed_accuracy": ENTRY, "severity": {**ENTRY, "mean": 48.0}}
APART = {"closed_accuracy": {"mean": 3.0, "low": 1.0, "high": 5.0}, "severity": ENTRY}
TOUCHING = {"closed_accuracy": {"mean": 3.0, "low": -1.0, "high": 5.0}}
LEAK_POINTS = [
    {"share": share, "dpo": BOTH, "mmedpo": BOTH, "difference": APART} for share in (0.0, 0.5, 1.0)
]
DOSE_POINTS = [
    {
        "variant": variant,
        "passes": passes,
        "steps": 27 * passes,
        "text_pairs_seen": seen * passes,
        "scores": BOTH,
    }
    for variant, seen in (("dpo", 650), ("stage2", 0))
    for passes in (1, 3)
]
CURVES = {
    "dpo": {
        "looks": [
            {"step": step, "validation_accuracy": 0.6, "validation_chosen_logp": -step / 10}
            for step in (20, 40)
        ],
        "validation": [{"passes": n, "closed_accuracy": 60.0 + n} for n in (1, 3)],
    }
}
HEADS = [
    {"layer": layer, "head": head, "base": ENTRY, "mmedpo": ENTRY, "difference": difference}
    for layer, head, difference in (
        (1, 1, APART["closed_accuracy"]),
        (1, 2, TOUCHING["closed_accuracy"]),
    )
]
FIGURES = {
    "condition_lines": lambda: conditions.condition_lines(
        LEAK_POINTS, "share", "share of sentences", list(BOTH), [LEAK_POINTS[1]]
    ),
    "dose_lines": lambda: conditions.dose_lines(DOSE_POINTS, list(BOTH)),
    "difference_dots": lambda: conditions.difference_dots(
        {"a - b": APART, "a - $c": TOUCHING}, list(BOTH)
    ),
    "stop_curves": lambda: conditions.stop_curves(CURVES, ["closed_accuracy"]),
    "film_grid": lambda: plots.film_grid([FILM] * 5, ["a $b$ c"] * 5, [{"nodule": MASK}] * 5),
    "film_grid_plain": lambda: plots.film_grid([FILM], ["one"], columns=1),
    "attention_overlay": lambda: plots.attention_overlay(FILM, HEAT, MASK, title="disease"),
    "attention_grid": lambda: plots.attention_grid(FILM, RNG.random((2, 3, 14, 14)), MASK),
    "attention_before_after": lambda: plots.attention_before_after(FILM, HEAT, HEAT[::-1], MASK),
    "method_drawing": lambda: paper.method_drawing(
        FILM,
        HEAT,
        MASK,
        FILM,
        {"question": "Where is $a?", "preferred": "left", "rejected": "right " * 60},
        TURNS,
        0.9,
        (1.1, 0.8),
    ),
    "noise_comparison": lambda: plots.noise_comparison(
        FILM, MASK, {"paper": FILM, "released": FILM, "global": FILM}
    ),
    "noise_ladder": lambda: plots.noise_ladder({1.0: FILM, 0.5: FILM}),
    "weight_histograms": lambda: plots.weight_histograms(
        {"rescaled": RNG.random(50) + 0.5, "literal": np.full(50, 0.75), "none": RNG.random(50)}
    ),
    "pair_card": lambda: plots.pair_card(
        FILM, None, "Is there $a nodule?", "yes", "no " * 200, 0.5
    ),
    "debate_plot": lambda: plots.debate_plot(TURNS),
    "training_curves": lambda: plots.training_curves(EVENTS),
    "training_curves_empty": lambda: plots.training_curves([]),
    "score_intervals": lambda: plots.score_intervals(TABLE),
    "head_grid": lambda: plots.head_grid(HEADS, ["base", "mmedpo", "difference"], 1.3),
    "pointing_game_bars": lambda: plots.pointing_game_bars(
        {"nodule": 0.6, "b": 0.9}, {"nodule": 0.01, "b": 0.1}
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_draws_without_a_warning_and_without_global_state(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = FIGURES[name]()
        FigureCanvasAgg(figure).draw()
    assert isinstance(figure, Figure) and not pyplot.get_fignums()


def test_upsampling_keeps_values_and_place():
    heat = np.zeros((14, 14))
    heat[3, 9] = 1 / 196
    wide = plots.upsampled(heat, (140, 280))
    assert wide.shape == (140, 280) and wide.min() == 0 and 0.9 < 196 * wide.max() <= 1
    assert np.allclose(np.unravel_index(wide.argmax(), wide.shape), (35, 190), atol=6)
    assert plots.upsampled(np.full((14, 14), 0.3), (20, 20)) == pytest.approx(0.3)


def test_a_faint_map_is_not_drawn_like_a_sure_one():
    sure = np.full((14, 14), 0.5 / 195)
    sure[3, 9] = 0.5
    faint = np.full((14, 14), 1.0)
    faint[3, 9] = 2.0
    tops = []
    for heat in (sure, faint):
        overlay = plots.attention_overlay(FILM, heat).axes[1].images[-1]
        tops.append(overlay.get_clim()[1])
    assert tops == pytest.approx([0.5 * 196, 2 * 196 / 197])
    colours = overlay.cmap(np.linspace(0, 1, 9))
    assert colours[0, 3] == 0 and (np.diff(colours[:, 3]) > 0).all(), "the film shows through"


def test_a_difference_is_filled_where_its_interval_leaves_out_zero():
    figure = conditions.difference_dots({"a": APART, "b": TOUCHING}, ["closed_accuracy"])
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [mark.get_markerfacecolor() == "white" for mark in marks] == [False, True]
    assert [mark.get_xdata()[0] for mark in marks] == [3.0, 3.0]


def test_a_dose_is_drawn_against_what_was_seen_and_visual_pairs_alone_see_no_text():
    by_passes, by_steps, by_text = conditions.dose_lines(DOSE_POINTS, ["closed_accuracy"]).axes
    assert [len(axes.lines) for axes in (by_passes, by_steps, by_text)] == [2, 2, 1]
    assert by_text.lines[0].get_xdata().tolist() == [650, 1950]
    assert by_steps.lines[0].get_xdata().tolist() == [27, 81]


def test_when_to_stop_shows_looks_by_step_and_patients_by_passes():
    right, chosen, patients = conditions.stop_curves(CURVES, ["closed_accuracy"]).axes
    assert right.lines[0].get_xdata().tolist() == [20, 40]
    assert chosen.lines[0].get_ydata().tolist() == [-2, -4]
    assert patients.lines[0].get_xydata().tolist() == [[1, 61], [3, 63]]


def test_training_curves_tell_the_time_left_and_hold_the_numbers():
    figure = plots.training_curves(EVENTS)
    assert figure.get_suptitle() == "step 20 of 40, about 20 s left"
    assert plots.training_curves(EVENTS, stopped=True).get_suptitle() == "step 20 of 40, stopped"
    rejected = next(line for line in figure.axes[1].lines if line.get_label() == "rejected")
    assert rejected.get_ydata()[-1] == -29
    sparse = plots.training_curves([{"step": 1, "total_steps": 9, "loss": 0.7, "seconds_left": 0}])
    assert sparse.get_suptitle().endswith("done") and not sparse.axes[1].lines


def test_scores_are_dots_with_intervals_and_a_model_keeps_its_colour():
    (axes,) = plots.score_intervals(TABLE).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [50 + n for n in range(7)]
    intervals = [line for line in axes.lines if list(line.get_xdata()) == [45, 60]]
    assert len(intervals) == 7
    colours = [dot.get_color() for dot in dots]
    assert colours[5] == colours[6] and len(set(colours)) == 6
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False] * 6 + [True]
    reordered = {name: TABLE[name] for name in ("mmedpo", "dpo")}
    (other,) = plots.score_intervals(reordered).axes
    again = [line.get_color() for line in other.lines if line.get_marker() == "o"]
    assert again == [colours[5], colours[2]]


def test_a_box_holds_the_cells_that_rose():
    before = np.full((8, 8), 1 / 64)
    after = before.copy()
    after[2, 3:5] += 0.1
    after[6, 6] += 0.03
    panel = plots.attention_before_after(FILM, before, after, boxed=True).axes[2]
    (box,) = panel.patches
    assert box.get_bbox().extents == pytest.approx([23.5, 15.5, 39.5, 23.5])
    assert not plots.attention_before_after(FILM, before, after).axes[2].patches


def test_a_published_column_is_named_in_words_and_the_baseline_is_marked():
    rows = [{"method": "base", "iu_xray_bleu1": 3.0}, {"method": "x", "iu_xray_bleu1": 5.0}]
    figure = plots.score_dots(rows, "method", highlight="x", baseline="base")
    (axes,) = figure.axes
    assert axes.get_title() == "IU-Xray BLEU-1"
    (line,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(line.get_xdata()) == [3.0, 3.0]


def prediction(kind: str, truth: str, said: str, number: int) -> dict:
    return {
        "question": f"Q{number}",
        "image": "a.png",
        "answer_type": kind,
        "answer": truth,
        "prediction": said,
    }


def test_cases_are_chosen_by_their_rule():
    said = [("no", "yes"), ("yes", "no"), ("yes", "yes"), ("left", "right upper"), ("no", "yes")]
    truth = ["yes", "yes", "yes", "right upper", "yes"]
    kinds = ["CLOSED", "CLOSED", "CLOSED", "OPEN", "CLOSED"]
    sides = [
        [prediction(kinds[n], truth[n], said[n][side], n) for n in range(5)] for side in (0, 1)
    ]
    mended, spoiled = paper.mended_and_spoiled(*sides, 2)
    assert [row["question"] for row in mended] == ["Q0", "Q3"]
    assert [row["question"] for row in spoiled] == ["Q1"]
    models = {"base": sides[0], "trained": sides[1]}
    found = paper.first_apart(models, "OPEN")
    assert found["question"] == "Q3" and found["base"] == "left" and found["trained"] != "left"
    assert paper.first_apart({"base": sides[0]}, "OPEN") is None


def test_stages_are_what_the_paper_prints(shared):
    published = json.loads((DATA_MANIFESTS / "published_results.json").read_text())
    tables = {number: table["rows"] for number, table in published["tables"].items()}
    one, two, both = paper.published_stages(tables)
    assert both["SLAKE, mean of both scores"] == pytest.approx((53.99 + 73.08) / 2)
    assert two["VQA-RAD, mean of both scores"] == pytest.approx((31.09 + 62.87) / 2)
    source = json.loads((shared / "paper/tables.json").read_text())["table8"]
    columns = source["columns"]
    row = dict(zip(columns, source["rows"]["Stage 1 (Multi-LLMs)"], strict=True))
    assert one["IU-Xray, ROUGE-L"] == row["iu_xray_rouge_l"]


def test_a_heads_difference_is_in_brackets_where_its_interval_holds_zero():
    *_, difference = plots.head_grid(HEADS, ["base", "mmedpo", "difference"], 1.3).axes
    assert [text.get_text() for text in difference.texts] == ["+3.0", "(+3.0)"]


def test_weight_titles_state_mean_and_share_at_the_bounds():
    axes = plots.weight_histograms({"literal": np.full(9, 0.75), "none": np.full(9, 0.5)}).axes
    assert [a.get_title() for a in axes] == [
        "literal: mean 0.75, 100% at a bound",
        "none: mean 0.50, 0% at a bound",
    ]


def test_table_escapes_and_formats():
    table = plots.results_table(
        [
            {"model": "<script>x</script>", "closed": {"mean": 50.04, "low": 45, "high": 55}},
            {"model": "b & c", "bleu": 12.345},
        ],
        "a <b>",
    )
    assert (
        "<script>" not in table
        and "&lt;script&gt;" in table
        and "b &amp; c" in table
        and "a &lt;b&gt;" in table
    )
    assert (
        "<td>50.0 (45.0 to 55.0)</td>" in table
        and "<td>-</td>" in table
        and "<td>12.3</td>" in table
    )
    assert ">no rows<" in plots.results_table([], "empty")
    assert "<td>12.35</td>" in plots.results_table([{"bleu": 12.346}], decimals=2)


def test_published_numbers_are_the_papers(shared):
    published = json.loads((DATA_MANIFESTS / "published_results.json").read_text())
    source = json.loads((shared / "paper/tables.json").read_text())
    assert published["title"] == source["source"]["title"] and published["arxiv"].startswith(
        "2412.06141"
    )
    for number, table in published["tables"].items():
        origin = source[f"table{number}"]
        assert [list(row.values())[1:] for row in table["rows"]] == list(origin["rows"].values())
        assert all(list(row)[1:] == origin["columns"] for row in table["rows"])
    assert list(published["tables"]) == [str(n) for n in range(1, 10)]
    assert "53.99" in plots.results_table(published["tables"]["1"]["rows"], decimals=2)


def test_undone_dots_stand_at_their_numbers():
    rows = [
        {"method": "a $b$", "printed": 20.0, "undone": 8.5},
        {"method": "c", "printed": 14.5, "undone": 2.2},
    ]
    (axes,) = plots.undone_dots(rows, "method", 12.3).axes
    marks = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert marks["printed"] == [20.0, 14.5] and marks["smoothing undone"] == [8.5, 2.2]
    assert marks["hardly a word right, smoothed"] == [12.3, 12.3]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a $b$", "c"]


def test_pair_schema_accepts_the_released_files_and_refuses_broken_rows(shared):
    schema = json.loads((DATA_MANIFESTS / "pair_schema.json").read_text())
    rows = json.loads((shared / "data/released/vqa-rad_dpo_weighted.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(rows)
    human, gpt = rows[0]["conversations"]
    for broken in (
        {"weighted_score": "1"},
        {"weighted_score": -0.1},
        {"image": ""},
        {"conversations": [human]},
        {"conversations": [{"from": "human", "value": "no mark"}, gpt]},
    ):
        assert not validator.is_valid([{**rows[0], **broken}])
    assert not validator.is_valid([])


def test_memory_bars_are_as_long_as_their_parts_together() -> None:
    figure = plots.memory_bars(
        {"one": {"weights": 3.0, "optimiser": 1.0}, "two": {"weights": 1.0, "optimiser": 0.5}}
    )
    ends = [
        max(bar.get_x() + bar.get_width() for bar in bars)
        for bars in zip(*figure.axes[0].containers)
    ]
    assert ends == [4.0, 1.5]
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["4.0", "1.5"]
