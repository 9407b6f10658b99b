"""Recipes of the arena's models: each model that an experiment needs is trained and asked once,
whichever experiments share it, in as many processes as there are cores, one thread each.

What is done is kept under the profile's ``output``, so that a run that was cut goes on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..base.environment import provenance
from ..base.files import load_json, write_json
from ..base.rows import Row, row_sha
from ..base.sections import Variant
from ..base.tensors import model_digest
from ..dataset import FilmDataset, prepare_dataset
from ..evaluate import asked_questions, predict, profile_decoding, read_predictions
from ..launch import folder_of
from ..lvlm import load_profile_lvlm
from ..preference_rows import write_manifest
from ..profiles import Profile
from .baselines import build_manifests


@dataclass(frozen=True)
class Recipe:
    """What a model is trained on, and how; with a seed it decides the model.

    Attributes:
        variant: objective, pairs, weights, and what learns.
        passes: over the variant's pairs (the paper's 3).
        projector_share: the projector's learning rate over that of LoRA.
        validation_every: steps between two looks at the held-out pairs; None: none but the last.
        start: the recipe of a model that is trained first, with the same seed, and starts from the
            base model itself; the reference is that model.
    """

    variant: Variant
    passes: float = 3.0
    learning_rate: float = 1e-4
    projector_share: float = 0.25
    beta: float = 0.5
    validation_every: int | None = None
    start: Recipe | None = None

    def on(self, pairs: str) -> Recipe:
        """The same recipe on another manifest."""
        return replace(self, variant=replace(self.variant, pairs=pairs))


@dataclass(frozen=True)
class QuestionSet:
    """What is asked of a model: the questions of a split, or those about another patient's film."""

    split: str = "test"
    shuffled: bool = False


@dataclass(frozen=True)
class Job:
    """One model, and what it is asked; no recipe is the base model."""

    recipe: Recipe | None
    seed: int
    question: QuestionSet = QuestionSet()


class Arena:
    """The models that were trained so far, and their answers; the manifests of the profile's
    variants are built first.

    Args:
        profile: its values hold where a recipe says nothing.
        workers: processes, one thread each.
    """

    def __init__(self, profile: Profile, workers: int) -> None:
        self.profile = profile
        self.dataset: FilmDataset = prepare_dataset(profile)
        self.workers = workers
        build_manifests(profile, self.dataset)

    def write_pairs(self, name: str, rows: Sequence[Row]) -> str:
        """Keep a manifest for the recipes that name it. Returns the name."""
        write_manifest(self.profile.output / "pairs" / f"{name}.json", rows)
        return name

    def answers(self, jobs: Iterable[Job], told: str) -> dict[Job, list[Row]]:
        """Each job's predictions; what is missing is trained and asked, with the time left printed.

        Args:
            told: the experiment's name, for the lines of progress.
        """
        wanted = list(dict.fromkeys(jobs))
        paths = {job: predictions_path(self.profile, job) for job in wanted}
        missing = [job for job in wanted if not paths[job].is_file()]
        # A model is trained by one process: its questions go together, after those it starts from.
        groups: dict[tuple[Recipe | None, int], list[Job]] = {}
        for job in missing:
            groups.setdefault((job.recipe, job.seed), []).append(job)
        first = [group for group in groups.values() if not _starts_elsewhere(group[0])]
        later = [group for group in groups.values() if _starts_elsewhere(group[0])]
        starts = {(job.recipe.start, job.seed) for group in later for job in group if job.recipe}
        first += [[Job(recipe, seed)] for recipe, seed in starts if (recipe, seed) not in groups]
        done = 0
        began = time.monotonic()
        for wave in (first, later):
            for _ in self._finished(wave):
                done += 1
                total = len(first) + len(later)
                left = (time.monotonic() - began) / done * (total - done) / 60
                print(f"{told}: {done} of {total} models, {left:.0f} min left", flush=True)
        return {job: read_predictions(paths[job]) for job in wanted}

    def _finished(self, groups: Sequence[Sequence[Job]]) -> Iterable[None]:
        """One item for each group of jobs that is done."""
        if not groups:
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, _begin_worker) as pool:
            tasks = [pool.submit(train_and_ask, self.profile, group) for group in groups]
            for task in as_completed(tasks):
                task.result()
                yield


def _starts_elsewhere(job: Job) -> bool:
    return job.recipe is not None and job.recipe.start is not None


def _begin_worker() -> None:
    """Settle a worker process: one thread, and no setting that another training left."""
    from .train import settle_environment

    settle_environment(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)


_BASES: dict[str, str] = {}  # by the profile's digest: weights and questions are read once


def base_digest(profile: Profile) -> str:
    """All that every model of an arena shares: the base model's weights, the questions, and the
    profile, whose values hold where a recipe says nothing.
    """
    whole = profile.digest()
    if whole not in _BASES:
        questions = prepare_dataset(profile).questions
        asked = [row_sha(questions[split]) for split in sorted(questions)]
        text = f"{whole} {model_digest(load_profile_lvlm(profile).model)} {asked}"
        _BASES[whole] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return _BASES[whole]


def recipe_digest(profile: Profile, recipe: Recipe) -> str:
    """What names a recipe's run: `base_digest`, the recipe's values, and the bytes of the manifests
    that it trains on.
    """
    digest = hashlib.sha256(base_digest(profile).encode())
    digest.update(json.dumps(asdict(recipe), sort_keys=True).encode())
    part: Recipe | None = recipe
    while part is not None:
        manifest = profile.output / "pairs" / f"{part.variant.pairs}.json"
        digest.update(manifest.read_bytes())
        part = part.start
    return digest.hexdigest()[:16]


def recipe_profile(profile: Profile, recipe: Recipe, seed: int) -> Profile:
    """The profile that trains a recipe: one variant, in a run folder of its own."""
    values = profile.training
    training = replace(
        values,
        variants={f"arena-{recipe_digest(profile, recipe)}": recipe.variant},
        epochs=recipe.passes,
        max_steps=None,
        learning_rate=recipe.learning_rate,
        projector_learning_rate=recipe.learning_rate * recipe.projector_share,
        beta=recipe.beta,
        validation_every=recipe.validation_every or values.validation_every,
    )
    lvlm = profile.lvlm
    if recipe.start is not None:
        lvlm = replace(lvlm, base_adapter=str(adapter_of(profile, recipe.start, seed)))
    return replace(profile, training=training, lvlm=lvlm)


def run_folder_of(profile: Profile, recipe: Recipe, seed: int) -> Path:
    """Where a recipe's run lies, or will lie."""
    own = recipe_profile(profile, recipe, seed)
    (name,) = own.training.variants
    return folder_of(own, name, seed)


def adapter_of(profile: Profile, recipe: Recipe, seed: int) -> Path:
    """Where a recipe's adapter lies, or will lie."""
    return run_folder_of(profile, recipe, seed) / "adapter"


def predictions_path(profile: Profile, job: Job) -> Path:
    """Where a job's answers lie, or will lie."""
    model = f"base-{base_digest(profile)}"
    if job.recipe is not None:
        model = f"{recipe_digest(profile, job.recipe)}-seed{job.seed}"
    shuffled = "-shuffled" if job.question.shuffled else ""
    return profile.output / "evaluation" / f"{model}-{job.question.split}{shuffled}.jsonl"


def train_and_ask(profile: Profile, jobs: Sequence[Job]) -> None:
    """Train the one model of ``jobs``, unless it is there, and ask it each job's questions."""
    from .train import run

    recipe, seed = jobs[0].recipe, jobs[0].seed
    adapter = None
    own = profile
    if recipe is not None:
        own = recipe_profile(profile, recipe, seed)
        (name,) = own.training.variants
        folder = folder_of(own, name, seed)
        run(own, name, seed, folder)
        adapter = folder / "adapter"
    lvlm = load_profile_lvlm(own, adapter)
    dataset = prepare_dataset(profile)
    for job in jobs:
        predict(
            lvlm,
            asked_questions(profile, dataset, job.question.split),
            dataset.image_root,
            predictions_path(profile, job),
            profile.evaluation.batch_size,
            profile_decoding(profile),
            profile.seed if job.question.shuffled else None,
        )


def results_path(profile: Profile) -> Path:
    """The file that receives every experiment's results."""
    return profile.figures / "reference" / "arena.json"


def keep_result(profile: Profile, name: str, result: dict[str, Any], seconds: float) -> None:
    """Put one experiment's result beside the others', with the machine and the versions."""
    path = results_path(profile)
    kept = load_json(path, "the results of the arena") if path.is_file() else {}
    experiments = kept.get("experiments", {})
    experiments[name] = result | {"seconds": round(seconds, 1), **provenance()}
    write_json(path, {"profile": profile.name, "experiments": experiments})
