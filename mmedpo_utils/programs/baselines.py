"""The baselines of the paper's tables on this kit's trainer: their preference pairs, and one
program that compares them.

    mmedpo baselines --profile phantom-baselines [--seeds 0 1 2] [--build-only]

The tables name DPO, POVID, STLLaVA-Med, Self-Rewarding, SIMA and FiSAO, and the ablations of
MMedPO. An ablation is a setting of the same trainer. A method that ends in "-style" here is only
its idea, on this kit's questions, judge and trainer; what the original does beyond that is in the
docstring of the function that makes its pairs.

FiSAO (fine-grained self-alignment) is left out. It scores each token of a response by its
similarity to the image in the model's own vision encoder, sets margins from the scores of correct
and hallucinated words, and trains by reinforcement with a reward per token (PPO with a clipped
ratio). That takes responses sampled during training, a text tower that matches the vision tower,
which LLaVA-Med does not ship, and a loss per token: another trainer, not another manifest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..base.cards import load_card
from ..base.environment import provenance
from ..base.errors import InputError, exit_status
from ..base.files import read_or_compute, write_json
from ..base.images import open_image, resolve_image
from ..base.rows import Row, question_text
from ..base.sections import Noise
from ..base.settings import nearest
from ..base.tensors import model_digest
from ..curate import curate_text, curate_visual, inputs_digest, training_questions
from ..dataset import FilmDataset, prepare_dataset
from ..judges.language_models import build_judges
from ..lvlm import MedLVLM, generate, load_profile_lvlm
from ..medklip import MedKLIP, load_medklip
from ..pairs import generator, merge_pairs
from ..preference_rows import answer_text, pair_row, write_manifest
from ..profiles import Profile, load_profile
from ..relevance import CHUNK, Judge, Member, debate, sample_candidates
from ..show.premise import answer_logps
from .reference_results import evaluate_seeds
from .run_notebooks import scores_as_text

WHOLE_IMAGE = "whole_image"
TEXT_INPUTS = ("seed", "data", "lvlm", "curation", "judge")
VISUAL_INPUTS = ("seed", "data", "visual_tool", "noise")


class Ingredients:
    """What manifests are made of; each is loaded or made when a manifest first asks for it."""

    def __init__(self, profile: Profile, dataset: FilmDataset) -> None:
        self.profile = profile
        self.dataset = dataset
        self.questions = training_questions(profile, dataset)

    @cached_property
    def lvlm(self) -> MedLVLM:
        """The Med-LVLM before training."""
        return load_profile_lvlm(self.profile)

    @cached_property
    def medklip(self) -> MedKLIP:
        """The visual tool."""
        return load_medklip(self.profile.visual_tool.checkpoint)

    @cached_property
    def judges(self) -> tuple[Judge, list[Member]]:
        """The judge and the panel: the phantom's rules, or language models."""
        return build_judges(self.profile, load_card(self.profile.data.card))

    @cached_property
    def text_rows(self) -> list[Row]:
        """D_t, the paper's text pairs."""
        return curate_text(self.profile, self.dataset, self.lvlm, *self.judges)[0]

    @cached_property
    def visual_rows(self) -> list[Row]:
        """D_v, the paper's visual pairs."""
        return curate_visual(self.profile, self.dataset, self.medklip)

    @cached_property
    def whole_image_rows(self) -> list[Row]:
        """D_v with noise over the whole image."""
        return self.visual_rows_beside(WHOLE_IMAGE, replace(self.profile.noise, kind="global"))

    def visual_rows_beside(self, name: str, noise: Noise) -> list[Row]:
        """Visual pairs whose noised copies lie in a folder ``name`` of their own beside those of
        D_v.
        """
        folder = self.profile.output / "pairs" / "noised" / name
        profile = replace(self.profile, output=folder, noise=noise)
        rows = []
        for row in curate_visual(profile, self.dataset, self.medklip):
            # The trainer looks for rejected images from pairs/noised of the run on.
            copy = f"{name}/pairs/noised/{row['rejected_image']}"
            rows.append(row | {"rejected_image": copy})
        return rows

    def samples(self, count: int, temperature: float) -> list[list[str]]:
        """``count`` responses of the Med-LVLM to each question."""
        values = self.profile.lvlm
        answer = partial(
            generate, self.lvlm, max_new_tokens=values.max_new_tokens, batch_size=values.batch_size
        )
        return sample_candidates(
            answer, self.questions, self.dataset.image_root, count, temperature, self.profile.seed
        )

    def own_scores(
        self, responses: Sequence[Sequence[str]], score: Callable[..., np.ndarray]
    ) -> list[list[float]]:
        """What the Med-LVLM itself makes of responses: ``score`` (see `likelihood`) of each. Shape:
        as ``responses``.
        """
        scores: list[list[float]] = []
        # In chunks: so many images are open at a time.
        for start in range(0, len(self.questions), CHUNK):
            part = slice(start, start + CHUNK)
            images: list[Image.Image] = []
            asked: list[str] = []
            said: list[str] = []
            for question, texts in zip(self.questions[part], responses[part], strict=True):
                image = open_image(resolve_image(self.dataset.image_root, question["image"]))
                for text in texts:
                    images.append(image)
                    asked.append(question_text(question))
                    said.append(text)
            values = score(self.lvlm, images, asked, said, self.profile.lvlm.batch_size).tolist()
            taken = 0
            for texts in responses[part]:
                scores.append(values[taken : taken + len(texts)])
                taken += len(texts)
        return scores


def likelihood(
    lvlm: MedLVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    responses: Sequence[str],
    batch_size: int,
) -> np.ndarray:
    """Mean log-probability per token of each response, its end mark included, given image and
    question. Shape: [N].
    """
    logps, tokens = answer_logps(lvlm, images, questions, responses, batch_size)
    return logps / tokens


def visual_evidence(
    lvlm: MedLVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    responses: Sequence[str],
    batch_size: int,
) -> np.ndarray:
    """How much an image raises the `likelihood` of each response over a black one of its size.
    Shape: [N].
    """
    black = [Image.new("L", image.size) for image in images]
    seen = likelihood(lvlm, images, questions, responses, batch_size)
    unseen = likelihood(lvlm, black, questions, responses, batch_size)
    return seen - unseen


def ranked_pairs(
    questions: Sequence[Row], responses: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
) -> list[Row]:
    """Pairs of two responses of the model itself: the one with the highest score is preferred, the
    lowest rejected.

    A question whose responses have one score, or are one text, makes no pair. Every pair counts the
    same (score 1).
    """
    rows = []
    for question, texts, values in zip(questions, responses, scores, strict=True):
        scored = []
        for text, value in zip(texts, values, strict=True):
            if text.strip():
                scored.append((value, text.strip()))
        if not scored:
            continue
        # By the score alone: of responses with one score the first is taken.
        best_score, best = max(scored, key=itemgetter(0))
        worst_score, worst = min(scored, key=itemgetter(0))
        if best_score > worst_score and best.lower() != worst.lower():
            preferred = question | {"gpt4_answer": best}
            rows.append(pair_row(preferred, worst, 1.0, source="text", origin="sampled"))
    return rows


def train_pairs(ingredients: Ingredients) -> list[Row]:
    """The paper's own pairs: D_t and D_v."""
    return merge_pairs(ingredients.text_rows, ingredients.visual_rows)


def global_noise(ingredients: Ingredients) -> list[Row]:
    """The paper's pairs with noise over the whole image in place of the lesion: Table 4."""
    return merge_pairs(ingredients.text_rows, ingredients.whole_image_rows)


def truth(ingredients: Ingredients) -> list[Row]:
    """Questions and true answers for supervised fine-tuning, where the lower half of Table 1
    starts. Needs no judge.

    The format asks for a rejected answer and there is none: the true one is there again, marked by
    the ``origin`` none. The SFT objective does not read it, and DPO would learn nothing from it.
    """
    rows = []
    for question in ingredients.questions:
        answer = question["gpt4_answer"]
        rows.append(pair_row(question, answer, 1.0, source="text", origin="none"))
    return rows


def rescored(ingredients: Ingredients, members: int | None) -> list[Row]:
    """D_t with the relevance that the first ``members`` of the panel settle on (None: all of them):
    Table 3.

    Where the kit made the text pairs itself, the whole panel gives them the scores that they have.
    """
    _, panel = ingredients.judges
    rounds = ingredients.profile.curation.rounds
    rows = []
    for row in merge_pairs(ingredients.text_rows, []):
        rejected = answer_text(row, rejected=True)
        result = debate(question_text(row), answer_text(row), rejected, panel[:members], rounds)
        rows.append(row | {"weighted_score": result.score})
    return rows


def single_llm(ingredients: Ingredients) -> list[Row]:
    """D_t with the relevance that the panel's first member gives alone."""
    return rescored(ingredients, members=1)


def several_llm(ingredients: Ingredients) -> list[Row]:
    """D_t with the relevance of the whole panel."""
    return rescored(ingredients, members=None)


def povid_style(ingredients: Ingredients) -> list[Row]:
    """Hallucinations written into the true answer, and the true answer about a wholly noised image.

    POVID uses general images and GPT-4V, which sees them; the judge here sees the texts. POVID
    draws the noise's effect token by token during training, in the same loss as the written answer;
    here it is a pair of its own.
    """
    judge, _ = ingredients.judges
    written = []
    for question in ingredients.questions:
        rng = generator(ingredients.profile.seed, str(question["question_id"]))
        text = judge.write(question_text(question), question["gpt4_answer"], rng)
        written.append(pair_row(question, text.strip(), 1.0, source="text", origin="written"))
    return merge_pairs(written, ingredients.whole_image_rows)


def stllava_med_style(ingredients: Ingredients) -> list[Row]:
    """Both responses sampled from the Med-LVLM; the judge prefers the one that contradicts the true
    answer least.

    STLLaVA-Med first trains the model to ask questions too, and makes its pairs from questions of
    its own about unlabelled images; its judge, GPT-4o, has no true answer to compare with. Here the
    questions and their answers are the data set's.
    """
    judge, _ = ingredients.judges
    values = ingredients.profile.curation
    responses = ingredients.samples(values.candidates, values.temperature)
    scores = []
    for question, texts in zip(ingredients.questions, responses):
        asked = question_text(question)
        truth = question["gpt4_answer"]
        # The higher the better, as `ranked_pairs` takes scores.
        scores.append([-judge.conflict(asked, truth, text) for text in texts])
    return ranked_pairs(ingredients.questions, responses, scores)


def self_rewarding_style(ingredients: Ingredients) -> list[Row]:
    """Both responses sampled from the Med-LVLM, ranked by itself: `likelihood` per token is its own
    judgement.

    Self-Rewarding language models judge through a prompt with five points and repeat sampling and
    training several times, on prompts of their own. Here it is one round. A likelihood takes the
    prompt's place because a small model with a vocabulary of words cannot follow one; any model can
    say how likely it finds a response. It is a poor judge where the model is misaligned: it prefers
    its own habits, and orders fewer than half of the phantom's short answers rightly.
    """
    values = ingredients.profile.curation
    responses = ingredients.samples(values.candidates, values.temperature)
    scores = ingredients.own_scores(responses, likelihood)
    return ranked_pairs(ingredients.questions, responses, scores)


def sima_style(ingredients: Ingredients) -> list[Row]:
    """The Med-LVLM's greedy and one sampled response; it prefers the one for which it finds more
    `visual_evidence`.

    SIMA asks the model in words which response is better, with the true answer and three criteria
    of what is seen in the prompt. A small model with a vocabulary of words cannot follow such a
    prompt. So the question is put in numbers: does the image speak for the response? The true
    answer is not used.
    """
    greedy = ingredients.samples(1, 0.0)
    sampled = ingredients.samples(1, ingredients.profile.curation.temperature)
    responses = [first + second for first, second in zip(greedy, sampled, strict=True)]
    scores = ingredients.own_scores(responses, visual_evidence)
    return ranked_pairs(ingredients.questions, responses, scores)


@dataclass(frozen=True)
class Manifest:
    """How one manifest is made, and the profile's sections that decide it (with the models that
    they name).
    """

    build: Callable[[Ingredients], list[Row]]
    sections: tuple[str, ...]


MANIFESTS = {
    "train": Manifest(train_pairs, TEXT_INPUTS + VISUAL_INPUTS),
    "truth": Manifest(truth, ("seed", "data", "curation")),
    "single_llm": Manifest(single_llm, TEXT_INPUTS),
    "several_llm": Manifest(several_llm, TEXT_INPUTS),
    "global_noise": Manifest(global_noise, TEXT_INPUTS + VISUAL_INPUTS),
    "povid_style": Manifest(povid_style, ("curation", "judge", *VISUAL_INPUTS)),
    "stllava_med_style": Manifest(stllava_med_style, TEXT_INPUTS),
    "self_rewarding_style": Manifest(self_rewarding_style, TEXT_INPUTS),
    "sima_style": Manifest(sima_style, TEXT_INPUTS),
}


def build_manifests(profile: Profile, dataset: FilmDataset) -> None:
    """Write the manifests that the profile's variants name, ``output``/pairs/NAME.json, unless they
    are there already.

    A manifest of another name has to be there: it is somebody's own.

    Raises:
        InputError: no such manifest, nothing to make one of, or what curation raises.
    """
    ingredients = Ingredients(profile, dataset)
    # Several variants may train on one manifest; a dictionary keeps the order of the first.
    names = dict.fromkeys(variant.pairs for variant in profile.training.variants.values())
    for name in names:
        path = profile.output / "pairs" / f"{name}.json"
        if name in MANIFESTS:
            build = partial(_build, ingredients, name, path)
            read_or_compute(path, _digest(ingredients, name), build)
        elif not path.is_file():
            raise InputError(
                f"{path}: no such manifest, and nothing here makes one of that "
                f"name{nearest(name, MANIFESTS)}"
            )


def _digest(ingredients: Ingredients, name: str) -> str:
    """What a manifest is made of: a digest of settings and questions, and one of each model."""
    sections = MANIFESTS[name].sections
    digests = [inputs_digest(ingredients.profile, ingredients.questions, *sections)]
    if "lvlm" in sections:
        digests.append(model_digest(ingredients.lvlm.model))
    if "visual_tool" in sections:
        digests.append(model_digest(ingredients.medklip))
    return " ".join(digests)


def _build(ingredients: Ingredients, name: str, path: Path) -> None:
    rows = MANIFESTS[name].build(ingredients)
    if not rows:
        raise InputError(
            f"{path}: no question makes a pair, since its responses are all the same or of one "
            "score; sample more of them (`curation.candidates`, `curation.temperature`)"
        )
    write_manifest(path, rows)


def compare_baselines(profile: Profile, seeds: Sequence[int]) -> dict[str, Any]:
    """Build the manifests, train and evaluate every variant, write ``figures``/reference/NAME.json,
    return its values.

    The differences are those of each variant to the base model, and of ``mmedpo``, where there is
    one, to each other variant.
    """
    dataset = prepare_dataset(profile)
    build_manifests(profile, dataset)
    torch.cuda.empty_cache()  # the training processes need the room
    names = list(profile.training.variants)
    pairs = [(name, "base") for name in names]
    if "mmedpo" in names:
        pairs += [("mmedpo", name) for name in names if name != "mmedpo"]
    result = {
        **evaluate_seeds(profile, dataset, seeds, pairs),
        "profile": profile.name,
        **provenance(),
    }
    target = profile.figures / "reference" / f"{profile.name.replace('-', '_')}.json"
    write_json(target, result)
    print(f"{scores_as_text(result['models'])}\nwritten: {target}")
    return result


def main() -> int:
    """Command line: build, train, evaluate, compare; or build alone."""
    parser = argparse.ArgumentParser(
        description="Compare a profile's variants, baselines among them."
    )
    parser.add_argument(
        "--profile",
        default="phantom-baselines",
        help="a profile's name, or the path of a YAML file",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="training seeds; the profile's evaluation.seeds where absent",
    )
    parser.add_argument(
        "--build-only", action="store_true", help="write the manifests, and train nothing"
    )
    options = parser.parse_args()

    def action() -> None:
        profile = load_profile(options.profile)
        if options.build_only:
            build_manifests(profile, prepare_dataset(profile))
        else:
            compare_baselines(profile, options.seeds or profile.evaluation.seeds)

    return exit_status(action)


if __name__ == "__main__":
    sys.exit(main())
