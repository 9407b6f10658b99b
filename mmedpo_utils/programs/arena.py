"""When does which part of the method help? ``mmedpo arena [--only NAME ...]``.

Each experiment changes one condition and keeps all others; its results go into
``figures``/reference/arena.json as soon as it is done.

Three budgets are fair in three ways: passes over a variant's own pairs (the paper's, 3), equal
optimiser steps, and equal text pairs seen. The first is the default; `dose` shows all three.
Learning rate, beta and passes of each variant are chosen on the validation patients by one rule,
with one number of trials (`tune`); the test patients are asked once, after that.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..base.errors import InputError, exit_status
from ..base.files import atomic_write, load_json
from ..base.rows import Row
from ..base.settings import nearest
from ..lvlm import load_profile_lvlm
from ..metrics import score
from ..noise import noise_mask, noised_pixels
from ..pairs import generator, merge_pairs, stays_true
from ..phantom.panel import reworded
from ..preference_rows import row_source
from ..profiles import load_profile
from ..run_folder import read_events
from ..show.comparison import COMPARED, compare, compare_pair
from ..show.leaks import leak
from ..show.premise import (
    asked_of_split,
    asked_region,
    elsewhere,
    heat_maps,
    measure_premise,
    premise_table,
)
from .baselines import Ingredients
from .build_phantom_lvlm import build
from .recipes import (
    Arena,
    Job,
    QuestionSet,
    Recipe,
    adapter_of,
    keep_result,
    results_path,
    run_folder_of,
)

MAIN_SEEDS = (0, 1, 2, 3, 4)
SEEDS = (0, 1, 2)
PASSES = (1.5, 3.0)
# Lower rates were tried before, on the same patients: every variant chose the highest.
RATES_AND_BETAS = tuple(product((4e-4, 8e-4), (0.1, 0.5)))
# Supervised training has no beta: its trials try more rates, so that each variant has as many.
RATES_OF_SFT = ((2e-4, 0.1), (4e-4, 0.1), (8e-4, 0.1), (1.6e-3, 0.1))
LEAKS = (0.0, 0.25, 0.5, 0.75, 0.94, 1.0)
COUNTS = (45, 90, 180, 360, 720)
DOSES = (1.0, 2.0, 3.0, 4.0, 6.0)
NOISE_PLACES = ("lesion", "elsewhere", "another_film", "global", "released")
SCORES = ("closed_accuracy", "open_recall", "rouge_l")  # whose mean chooses a trial
REPORTED = (*COMPARED, "severity")
LOOK_EVERY = 20  # steps, in the experiment on when to stop
LOOKED_AT = ("validation_loss", "validation_chosen_logp", "validation_accuracy")

VARIANTS = ("sft", "dpo", "stage1", "stage2", "mmedpo")


def tune(arena: Arena) -> dict[str, Any]:
    """Choose each variant's learning rate, beta and passes on the validation patients.

    Every variant gets the same trials, with seed 0; the highest mean of closed accuracy, open
    recall and ROUGE-L wins, the first of equals.
    """
    trials: dict[str, list[Recipe]] = {}
    for name in VARIANTS:
        recipe = Recipe(arena.profile.training.variants[name])
        tried = RATES_OF_SFT if recipe.variant.objective == "sft" else RATES_AND_BETAS
        trials[name] = [
            replace(recipe, learning_rate=rate, beta=beta, passes=passes)
            for (rate, beta), passes in product(tried, PASSES)
        ]
    question = QuestionSet("validation")
    jobs = [Job(recipe, 0, question) for recipes in trials.values() for recipe in recipes]
    answers = arena.answers(jobs, "tune")
    found: dict[str, Any] = {}
    for name, recipes in trials.items():
        scored = []
        for recipe in recipes:
            rows = answers[Job(recipe, 0, question)]
            values = {metric: score(rows, metric) for metric in SCORES}
            chosen = {key: getattr(recipe, key) for key in ("learning_rate", "beta", "passes")}
            scored.append({**chosen, **values, "mean": _mean(values.values())})
        best = max(scored, key=lambda trial: trial["mean"])
        found[name] = {"trials": scored, "chosen": best}
    return {"variants": found, "patients": "validation", "seeds": [0]}


def _mean(values: Any) -> float:
    return float(np.mean([value for value in values if value is not None]))


def tuned(arena: Arena, name: str) -> Recipe:
    """A variant with the values that `tune` chose for it.

    Raises:
        InputError: the experiment `tune` has not run.
    """
    path = results_path(arena.profile)
    kept = load_json(path, "the results of the arena") if path.is_file() else {"experiments": {}}
    if "tune" not in kept["experiments"]:
        raise InputError(f"{path}: has no result of tune; run mmedpo arena --only tune first")
    chosen = kept["experiments"]["tune"]["variants"][name]["chosen"]
    values = {key: chosen[key] for key in ("learning_rate", "beta", "passes")}
    return Recipe(arena.profile.training.variants[name], **values)


def main_table(arena: Arena) -> dict[str, Any]:
    """Base, the variants as tuned, and those that begin from the supervised model; the control for
    each is the same questions on other patients' films.

    ``sft_dpo`` and ``sft_mmedpo`` train on pairs sampled from the supervised model (the lower half
    of Table 1), ``sft_dpo_old`` and ``sft_mmedpo_old`` on those of the base model.
    """
    models: dict[str, Recipe | None] = {"base": None}
    models |= {name: tuned(arena, name) for name in VARIANTS}
    supervised = tuned(arena, "sft")
    own_pairs = supervised_pairs(arena, supervised)
    for name in ("dpo", "mmedpo"):
        after = replace(tuned(arena, name), start=supervised)
        models[f"sft_{name}"] = after.on(own_pairs)
        models[f"sft_{name}_old"] = after
    pairs = [("mmedpo", name) for name in VARIANTS if name != "mmedpo"]
    pairs += [("dpo", "sft"), ("stage1", "dpo"), ("stage2", "base")]
    pairs += [("sft_mmedpo", "sft_dpo"), ("sft_dpo", "sft"), ("sft_mmedpo", "sft")]
    pairs += [("sft_mmedpo", "sft_mmedpo_old"), ("sft_dpo", "sft_dpo_old")]
    pairs += [(name, "base") for name in models if name != "base"]
    return compared(arena, "main", models, MAIN_SEEDS, list(dict.fromkeys(pairs)), shuffled=True)


def supervised_pairs(arena: Arena, supervised: Recipe) -> str:
    """The manifest whose text pairs the supervised model of the first seed has sampled; the visual
    pairs hold true answers, and stay as they are.
    """
    arena.answers([Job(supervised, MAIN_SEEDS[0])], "supervised")
    adapter = str(adapter_of(arena.profile, supervised, MAIN_SEEDS[0]))
    lvlm = replace(arena.profile.lvlm, base_adapter=adapter)
    folder = arena.profile.output / "supervised"
    profile = replace(arena.profile, lvlm=lvlm, output=folder)
    text = Ingredients(profile, arena.dataset).text_rows
    return arena.write_pairs("supervised", merge_pairs(text, base_rows(arena)[1]))


def dose(arena: Arena) -> dict[str, Any]:
    """More and fewer passes: to be drawn against passes, steps and text pairs seen."""
    points = []
    for name in ("sft", "dpo", "stage2", "mmedpo"):
        recipe = tuned(arena, name)
        models = {f"{passes:g}": replace(recipe, passes=passes) for passes in DOSES}
        table = compared(arena, f"dose of {name}", models, SEEDS)["models"]
        for key, run in models.items():
            point = {"variant": name, "passes": run.passes, **seen(arena, run)}
            points.append(point | {"scores": table[key]})
    return {"points": points, "seeds": list(SEEDS)}


def seen(arena: Arena, recipe: Recipe) -> dict[str, float]:
    """The optimiser steps of a recipe's first run, the pairs it has seen, and the text pairs among
    them.
    """
    rows = load_json(arena.profile.output / "pairs" / f"{recipe.variant.pairs}.json", "pairs")
    own = [row_source(row) for row in rows if row_source(row) in recipe.variant.sources]
    folder = run_folder_of(arena.profile, recipe, SEEDS[0])
    result = load_json(folder / "result.json", "the result of a run")
    pairs = recipe.passes * result["pairs"]
    return {
        "steps": result["last"]["step"],
        "pairs_seen": round(pairs),
        "text_pairs_seen": round(pairs * own.count("text") / len(own)),
    }


def curves(arena: Arena) -> dict[str, Any]:
    """When to stop: the looks of one run per variant at its held-out pairs, and the scores on the
    validation patients after each number of passes (each a run of its own, with its own schedule).
    """
    seed = SEEDS[0]
    question = QuestionSet("validation")
    found = {}
    for name in VARIANTS:
        recipe = tuned(arena, name)
        runs = {passes: replace(recipe, passes=passes) for passes in DOSES}
        longest = replace(runs[max(DOSES)], validation_every=LOOK_EVERY)
        jobs = [Job(run, seed, question) for run in (*runs.values(), longest)]
        answers = arena.answers(jobs, f"curve of {name}")
        looks = []
        for event in read_events(run_folder_of(arena.profile, longest, seed)):
            values = {key: event[key] for key in LOOKED_AT if key in event}
            if values:
                looks.append({"step": event["step"], **values})
        points = []
        for passes, run in runs.items():
            rows = answers[Job(run, seed, question)]
            scores = {metric: score(rows, metric) for metric in (*SCORES, "severity")}
            points.append({"passes": passes, **scores})
        found[name] = {"looks": looks, "validation": points}
    return {"variants": found, "patients": "validation", "seeds": [seed]}


def leaks(arena: Arena) -> dict[str, Any]:
    """MMedPO minus DPO against the share of rejected answers that are whole sentences."""
    plain = plain_text_rows(arena)
    _, visual = base_rows(arena)
    points = []
    for share in LEAKS:
        text = reworded(plain, share, arena.profile.seed)
        name = arena.write_pairs(f"leak-{100 * share:.0f}", merge_pairs(text, visual))
        difference = two_variants(arena, f"leak {share:g}", name)
        points.append({"share": share, "won_blind": leak(text)["ranked_right"], **difference})
    return {"points": points}


def counts(arena: Arena) -> dict[str, Any]:
    """The same against the number of questions that pairs are made of, at the default wording."""
    curation = replace(arena.profile.curation, text_pairs=max(COUNTS))
    profile = replace(arena.profile, curation=curation)
    visual = Ingredients(profile, arena.dataset).visual_rows_beside("more", profile.noise)
    profile = replace(profile, output=profile.output / "more")
    text = Ingredients(profile, arena.dataset).text_rows
    order = np.random.default_rng(arena.profile.seed).permutation(len(text))
    points = []
    for count in (count for count in COUNTS if count <= len(text)):
        kept = {text[index]["id"] for index in order[:count]}
        rows = [row for row in merge_pairs(text, visual) if row["id"] in kept]
        name = arena.write_pairs(f"count-{count}", rows)
        points.append({"text_pairs": count, **two_variants(arena, f"count {count}", name)})
    return {"points": points}


def two_variants(arena: Arena, told: str, pairs: str) -> dict[str, Any]:
    """DPO and MMedPO as tuned, on another manifest, and their difference."""
    models = {name: tuned(arena, name).on(pairs) for name in ("dpo", "mmedpo")}
    result = compared(arena, told, models, SEEDS, [("mmedpo", "dpo")])
    return {**result["models"], "difference": result["differences"]["mmedpo - dpo"]}


def masks(arena: Arena) -> dict[str, Any]:
    """Which visual pairs: by where the noise lies, and only those whose answer it makes untrue."""
    text, visual = base_rows(arena)
    kinds = {"tool": visual, "untrue": [row for row in visual if not stays_true(row)]}
    for kind in NOISE_PLACES:
        kinds[kind] = noised_elsewhere(arena, visual, kind)
    models = {}
    for kind, rows in kinds.items():
        name = arena.write_pairs(f"mask-{kind}", merge_pairs(text, rows))
        models[kind] = tuned(arena, "mmedpo").on(name)
    pairs = [("tool", kind) for kind in kinds if kind != "tool"] + [("lesion", "elsewhere")]
    return compared(arena, "masks", models, SEEDS, pairs)


def weights(arena: Arena) -> dict[str, Any]:
    """The weights as they are, permuted among the pairs of a source, reversed, and none."""
    rows = merge_pairs(*base_rows(arena))
    rng = np.random.default_rng(arena.profile.seed)
    permuted: list[Row] = []
    turned: list[Row] = []
    for source in ("text", "visual"):
        own = [row for row in rows if row["source"] == source]
        scores = np.array([row["weighted_score"] for row in own])
        for target, changed in (
            (permuted, rng.permutation(scores)),
            (turned, scores.min() + scores.max() - scores),
        ):
            for row, value in zip(own, changed, strict=True):
                target.append(row | {"weighted_score": round(float(value), 6)})
    recipe = tuned(arena, "mmedpo")
    models = {
        "as_they_are": recipe,
        "permuted": recipe.on(arena.write_pairs("weights-permuted", permuted)),
        "reversed": recipe.on(arena.write_pairs("weights-reversed", turned)),
        "none": replace(recipe, variant=replace(recipe.variant, weights="uniform")),
    }
    pairs = [("as_they_are", name) for name in models if name != "as_they_are"]
    return compared(arena, "weights", models, SEEDS, pairs)


def rates(arena: Arena) -> dict[str, Any]:
    """LoRA's learning rate against the projector's, and beta."""
    recipe = tuned(arena, "mmedpo")
    models: dict[str, Recipe | None] = {}
    # The paper's LoRA learns at a two-hundredth of the projector's rate.
    for share in (200.0, 20.0, 1.0, 0.25):
        rate = recipe.learning_rate if share <= 1 else recipe.learning_rate / share
        models[f"projector {share:g} times"] = replace(
            recipe, learning_rate=rate, projector_share=share
        )
    for beta in (0.05, 0.1, 0.25, 0.5, 1.0):
        models[f"beta {beta:g}"] = replace(recipe, beta=beta)
    return compared(arena, "rates", models, SEEDS)


def compared(
    arena: Arena,
    told: str,
    models: Mapping[str, Recipe | None],
    seeds: Sequence[int],
    pairs: Sequence[tuple[str, str]] = (),
    shuffled: bool = False,
) -> dict[str, Any]:
    """Scores of models on the test patients with 95% intervals over patients and seeds, and paired
    differences.

    Args:
        shuffled: ask each model about other patients' films too, as ``NAME_shuffled``.
    """
    questions = {"": QuestionSet()}
    if shuffled:
        questions["_shuffled"] = QuestionSet(shuffled=True)
    jobs: dict[str, list[Job]] = {}
    for name, recipe in models.items():
        for suffix, question in questions.items():
            own = seeds if recipe is not None else seeds[:1]
            jobs[name + suffix] = [Job(recipe, seed, question) for seed in own]
    answers = arena.answers([job for own in jobs.values() for job in own], told)
    predictions = {name: [answers[job] for job in own] for name, own in jobs.items()}
    samples = arena.profile.evaluation.bootstrap_samples
    differences = {}
    for one, other in pairs:
        difference = compare_pair(predictions[one], predictions[other], samples, REPORTED)
        differences[f"{one} - {other}"] = difference
    return {
        "models": compare(predictions, samples, REPORTED),
        "differences": differences,
        "seeds": list(seeds),
    }


def base_rows(arena: Arena) -> tuple[list[Row], list[Row]]:
    """The profile's text and visual pairs, curated once."""
    ingredients = Ingredients(arena.profile, arena.dataset)
    return ingredients.text_rows, ingredients.visual_rows


def plain_text_rows(arena: Arena) -> list[Row]:
    """The profile's text pairs without a sentence of the judge's, from a folder of their own."""
    judge = replace(arena.profile.judge, whole_sentences=0.0)
    profile = replace(arena.profile, judge=judge, output=arena.profile.output / "plain")
    return Ingredients(profile, arena.dataset).text_rows


def noised_elsewhere(arena: Arena, rows: Sequence[Row], kind: str) -> list[Row]:
    """Visual pairs with the noise at another place.

    Args:
        kind: ``lesion``, the true mask of the finding that is asked about (of a report: of all);
            ``elsewhere``, a region of the same shape that touches no lesion; ``another_film``, the
            visual tool's mask of the next film; ``global``; ``released``, the authors' mask and
            noise.

    Returns:
        as many rows. One that asks about nothing that is there keeps the visual tool's mask under
        ``lesion`` and ``elsewhere``.
    """
    profile = arena.profile
    root = profile.output / "pairs" / "noised"
    names = list(dict.fromkeys(row["image"] for row in rows))
    films = {name: arena.dataset.image(name).convert("L") for name in names}
    heat = heat_maps(profile, arena.dataset, names)
    following = dict(zip(names, names[1:] + names[:1], strict=True))
    changed = []
    for row in rows:
        rng = generator(profile.seed, f"{kind} {row['id']}")
        pixels = np.asarray(films[row["image"]])
        size = pixels.shape
        if kind in ("lesion", "elsewhere"):
            masks = arena.dataset.masks(row["image"])
            mask = asked_region(masks, row["finding"])
            if mask is None:
                changed.append(row)
                continue
            if kind == "elsewhere":
                mask = elsewhere(mask, np.any(list(masks.values()), axis=0), rng)
        else:
            name = following[row["image"]] if kind == "another_film" else row["image"]
            where = kind if kind in ("global", "released") else "localized"
            mask = noise_mask(heat[name], size, where, profile.noise.mask, profile.noise.quantile)
        way = "released" if kind == "released" else "localized"
        noised = noised_pixels(pixels, mask, way, profile.noise.signal, rng)
        copy = f"{kind}/{row['id']}.png"
        with atomic_write(root / copy) as temporary:
            Image.fromarray(noised).save(temporary, format="PNG", compress_level=1)
        changed.append(row | {"rejected_image": copy})
    return changed


def premise(arena: Arena) -> dict[str, Any]:
    """What noise on the lesion, on the visual tool's mask and elsewhere takes away from each model
    (`show.premise`).
    """
    asked = asked_of_split(arena.profile, arena.dataset, "test")
    signal = arena.profile.noise.signal
    batch_size = arena.profile.evaluation.batch_size
    recipes = {name: tuned(arena, name) for name in VARIANTS}
    jobs = [Job(recipe, seed) for recipe in recipes.values() for seed in SEEDS]
    arena.answers(jobs, "premise")
    adapters: dict[str, list[Path | None]] = {"base": [None]}
    for name, recipe in recipes.items():
        adapters[name] = [adapter_of(arena.profile, recipe, seed) for seed in SEEDS]
    models: dict[str, list[list[Row]]] = {}
    for name, of_seeds in adapters.items():
        models[name] = []
        for adapter in of_seeds:
            lvlm = load_profile_lvlm(arena.profile, adapter)
            models[name].append(measure_premise(lvlm, asked, signal, batch_size))
        print(f"premise: {name} measured", flush=True)
    samples = arena.profile.evaluation.bootstrap_samples
    table = premise_table(models, samples)
    return {"models": table, "questions": len(asked), "seeds": list(SEEDS)}


def baselines(arena: Arena) -> dict[str, Any]:
    """The baselines of the paper's tables, each at the values that `tune` chose for DPO or MMedPO,
    as it has text pairs alone or both kinds.
    """
    models: dict[str, Recipe | None] = {}
    for name, variant in arena.profile.training.variants.items():
        like = tuned(arena, "mmedpo" if "visual" in variant.sources else "dpo")
        models[name] = replace(like, variant=variant)
    return compared(arena, "baselines", models, SEEDS)


def backbone(arena: Arena) -> dict[str, Any]:
    """Another language model, a LLaMA, on the same vision tower (the paper's Figure 4): pairs are
    sampled from it, rate, beta and passes are those that `tune` chose for the shipped model.
    """
    folder = arena.profile.output / "llama"
    if not (folder / "scores.json").is_file():  # written last
        build(folder, llama=True)
    names = ("sft", "dpo", "mmedpo")
    training = arena.profile.training
    profile = replace(
        arena.profile,
        lvlm=replace(arena.profile.lvlm, model=str(folder)),
        training=replace(training, variants={name: training.variants[name] for name in names}),
        output=folder / "runs",
    )
    models: dict[str, Recipe | None] = {"base": None}
    models |= {name: tuned(arena, name) for name in names}
    pairs = [("dpo", "base"), ("mmedpo", "base"), ("mmedpo", "dpo"), ("sft", "mmedpo")]
    return compared(Arena(profile, arena.workers), "backbone", models, SEEDS, pairs)


EXPERIMENTS: dict[str, Callable[[Arena], dict[str, Any]]] = {
    "tune": tune,
    "main": main_table,
    "leak": leaks,
    "masks": masks,
    "weights": weights,
    "dose": dose,
    "count": counts,
    "premise": premise,
    "curves": curves,
    "baselines": baselines,
    "rates": rates,
    "backbone": backbone,
}


def main() -> int:
    """Command line: run the experiments, or those that are named."""
    parser = argparse.ArgumentParser(description="When does which part of the method help?")
    parser.add_argument(
        "--profile", default="arena", help="a profile's name, or the path of a YAML file"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"some of {', '.join(EXPERIMENTS)}"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes, one thread each"
    )
    options = parser.parse_args()

    def action() -> None:
        for name in options.only or ():
            if name not in EXPERIMENTS:
                raise InputError(f"--only {name}: no such experiment{nearest(name, EXPERIMENTS)}")
        profile = load_profile(options.profile)
        arena = Arena(profile, options.workers)
        for name in options.only or EXPERIMENTS:
            began = time.monotonic()
            result = EXPERIMENTS[name](arena)
            keep_result(profile, name, result, time.monotonic() - began)
            print(f"{name}: written to {results_path(profile)}", flush=True)

    return exit_status(action)


if __name__ == "__main__":
    sys.exit(main())
