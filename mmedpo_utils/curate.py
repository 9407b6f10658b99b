"""Curation of one profile's data set: what notebooks 02 and 03 run, step by step, on files.

Each step writes its manifest under ``<output>/pairs`` with a digest of its inputs beside it
(``.sha256``); where the digest still holds, the step reads the file instead of computing it, and
says so.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import partial
from typing import Any

from .base.doors import open_door
from .base.errors import InputError
from .base.files import load_json, read_or_compute, write_json
from .base.images import is_whole_png, with_images
from .base.rows import Row, row_sha
from .base.tensors import model_digest
from .dataset import FilmDataset
from .lvlm import MedLVLM, generate
from .medklip import MedKLIP
from .pairs import medklip_tool, merge_pairs, pick_questions, stays_true, text_pairs
from .phantom.panel import wording
from .preference_rows import read_manifest, row_source, rows_to_questions, write_manifest
from .profiles import Profile
from .relevance import Judge, Member, sample_candidates
from .run_folder import manifest_path


def training_questions(profile: Profile, dataset: FilmDataset) -> list[Row]:
    """The questions that pairs are made of: those of the released rows, else at most
    ``curation.text_pairs`` drawn ones.
    """
    if dataset.released_pairs is not None:
        return rows_to_questions(read_manifest(dataset.released_pairs, dataset.image_root))
    return pick_questions(dataset.questions["train"], profile.curation.text_pairs, profile.seed)


def curate_visual(profile: Profile, dataset: FilmDataset, model: MedKLIP) -> list[Row]:
    """Visual pairs of the training questions; the noised images go to ``pairs/noised``, the rows to
    ``pairs/visual.json``.

    A run that was killed goes on where it was; ``pairs/audit.json`` says what was skipped.
    """
    questions = training_questions(profile, dataset)
    folder = profile.output / "pairs"
    inputs = inputs_digest(profile, questions, "seed", "data", "visual_tool", "noise")
    inputs = f"{inputs} {model_digest(model)}"
    target, audit = folder / "visual.json", folder / "audit.json"

    def compute() -> None:
        open_door("visual curation")(
            questions,
            dataset.image_root,
            folder,
            medklip_tool(model, profile.visual_tool.query),
            profile.noise,
            profile.seed,
            profile.visual_tool.batch_size,
            inputs,
        )

    def whole() -> bool:
        skipped = json.loads(audit.read_text(encoding="utf-8"))["skipped"]
        rows = json.loads(target.read_text(encoding="utf-8"))
        copies = {folder / "noised" / row["rejected_image"] for row in rows}
        # The reader may have corrected what was skipped.
        return not skipped and all(map(is_whole_png, copies))

    read_or_compute(target, inputs, compute, [audit], whole)
    return read_manifest(target, dataset.image_root, folder / "noised", strict=True)


def curate_text(
    profile: Profile, dataset: FilmDataset, lvlm: MedLVLM, judge: Judge, panel: list[Member]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Text pairs and their debates, in ``pairs/text.json`` and ``pairs/debates.json``.

    Released rows are taken as they are; they carry scores but no debates.
    """
    folder = profile.output / "pairs"
    if dataset.released_pairs is not None:
        rows = read_manifest(dataset.released_pairs, dataset.image_root)
        print(f"{dataset.released_pairs.name}: {len(rows)} released text pairs, read as they are")
        return rows, []
    questions = training_questions(profile, dataset)
    questions = with_images(questions, dataset.image_root, "train", decode=True)

    values = profile.curation
    # Language models word their answers themselves.
    share = profile.judge.whole_sentences if profile.judge.backend == "phantom" else 0.0

    def compute() -> None:
        sample = partial(
            generate,
            lvlm,
            max_new_tokens=profile.lvlm.max_new_tokens,
            batch_size=profile.lvlm.batch_size,
        )
        candidates = sample_candidates(
            sample,
            questions,
            dataset.image_root,
            values.candidates,
            values.temperature,
            profile.seed,
        )
        rows, told = text_pairs(
            questions,
            candidates,
            judge,
            panel,
            values.conflict_threshold,
            values.rounds,
            profile.seed,
            wording(share, profile.seed),
        )
        write_json(folder / "debates.json", told)
        write_manifest(folder / "text.json", rows)

    inputs = inputs_digest(profile, questions, "seed", "data", "lvlm", "curation", "judge")
    inputs = f"{inputs} {model_digest(lvlm.model)}"
    debates = folder / "debates.json"
    read_or_compute(folder / "text.json", inputs, compute, [debates])
    rows = read_manifest(folder / "text.json", dataset.image_root, strict=True)
    return rows, load_json(debates, "the debates of the text pairs")


def write_training_pairs(
    profile: Profile, text_rows: list[Row], visual_rows: list[Row]
) -> list[Row]:
    """Both kinds of pairs in one manifest, ``pairs/train.json``, which training reads."""
    true_anyway = sum(map(stays_true, visual_rows))
    keep = profile.curation.still_true == "keep"
    if true_anyway:
        kept = "kept" if keep else "left out"
        print(f"{true_anyway} visual pairs say no, which stays true under noise: {kept}")
    rows = merge_pairs(text_rows, [row for row in visual_rows if keep or not stays_true(row)])
    write_manifest(profile.output / "pairs" / "train.json", rows)
    counts = Counter(row["source"] for row in rows)
    told = ", ".join(f"{count} {source}" for source, count in counts.items())
    print(f"train.json: {told}")
    return rows


def inputs_digest(profile: Profile, questions: list[Row], *sections: str) -> str:
    """SHA-256 (hexadecimal) of what a manifest is made from: the named sections of the profile, and
    the questions.
    """
    return hashlib.sha256(f"{profile.digest(*sections)} {row_sha(questions)}".encode()).hexdigest()


def training_rows(profile: Profile, name: str) -> list[dict[str, Any]]:
    """The pairs that variant ``name`` trains on.

    What the kit wrote, train.json or a manifest with a digest beside it, is read strictly: a bad
    row there is damage. Of somebody's own manifest, rows and images that cannot be used are left
    out with a warning.

    Raises:
        InputError: the manifest cannot be used, or has no pair of the variant's sources.
    """
    manifest = manifest_path(profile, name)
    sources = profile.training.variants[name].sources
    own = manifest.stem == "train" or manifest.with_suffix(".sha256").is_file()
    if own:
        stored = read_manifest(manifest, strict=True)
    else:
        noised = profile.output / "pairs" / "noised"
        stored = read_manifest(manifest, profile.image_root, noised)
    rows = [row for row in stored if row_source(row) in sources]
    if not rows:
        raise InputError(
            f"{manifest}: has no pairs of the sources {', '.join(sources)} that variant {name!r} "
            "trains on; run notebook 03, or change the variant's `sources`"
        )
    return rows
