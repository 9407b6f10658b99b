"""Curation of one profile's data set: what notebooks 02 and 03 run, step by step, on files.

Each step writes its manifest under ``<output>/pairs`` with a digest of its inputs beside it (``.sha256``); where the digest
still holds, the step reads the file instead of computing it, and says so.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from .datasets import Dataset
from .files import atomic_write, write_json
from .hallucinate import Judge, sample_candidates
from .lvlm import MedLVLM, generate
from .manifests import Row, read_manifest, row_sha, rows_to_questions, write_manifest
from .medklip import MedKLIP
from .pairs import medklip_look, merge_pairs, pick_questions, text_pairs, visual_pairs
from .profiles import Profile
from .relevance import Member


def training_questions(profile: Profile, dataset: Dataset) -> list[Row]:
    """The questions that pairs are made of: those of the released rows, else at most ``curation.text_pairs`` drawn ones."""
    if dataset.released_pairs is not None:
        return rows_to_questions(read_manifest(dataset.released_pairs, dataset.image_root))
    return pick_questions(dataset.questions["train"], profile.curation.text_pairs, profile.seed)


def curate_visual(profile: Profile, dataset: Dataset, model: MedKLIP) -> list[Row]:
    """Visual pairs of the training questions; the noised images go to ``pairs/noised``, the rows to ``pairs/visual.json``."""
    questions, folder = training_questions(profile, dataset), profile.output / "pairs"
    digest = _digest(profile, questions, "seed", "visual_tool", "noise")

    def compute() -> None:
        look = medklip_look(model, profile.visual_tool.query)
        rows = visual_pairs(questions, dataset.image_root, folder / "noised", look, profile.noise, profile.seed,
                            profile.visual_tool.batch_size)
        write_manifest(folder / "visual.json", rows)

    _once(folder / "visual.json", digest, compute)
    return read_manifest(folder / "visual.json", dataset.image_root, folder / "noised")


def curate_text(profile: Profile, dataset: Dataset, lvlm: MedLVLM, judge: Judge,
                panel: list[Member]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Text pairs and their debates, in ``pairs/text.json`` and ``pairs/debates.json``.

    Released rows are taken as they are; they carry scores but no debates.
    """
    folder = profile.output / "pairs"
    if dataset.released_pairs is not None:
        rows = read_manifest(dataset.released_pairs, dataset.image_root)
        print(f"{dataset.released_pairs.name}: {len(rows)} released text pairs, read as they are")
        return rows, []
    questions = training_questions(profile, dataset)

    def compute() -> None:
        sample = partial(generate, lvlm, max_new_tokens=profile.lvlm.max_new_tokens, batch_size=profile.lvlm.batch_size)
        values = profile.curation
        candidates = sample_candidates(sample, questions, dataset.image_root, values.candidates, values.temperature,
                                       profile.seed)
        rows, debates = text_pairs(questions, candidates, judge, panel, values.conflict_threshold, values.rounds,
                                   profile.seed)
        write_json(folder / "debates.json", debates)
        write_manifest(folder / "text.json", rows)

    _once(folder / "text.json", _digest(profile, questions, "seed", "lvlm", "curation", "judge"), compute)
    return read_manifest(folder / "text.json", dataset.image_root), json.loads((folder / "debates.json").read_text())


def merge(profile: Profile, text_rows: list[Row], visual_rows: list[Row]) -> list[Row]:
    """Both kinds of pairs in one manifest, ``pairs/train.json``, which training reads."""
    rows = merge_pairs(text_rows, visual_rows)
    write_manifest(profile.output / "pairs" / "train.json", rows)
    print("train.json: " + ", ".join(f"{count} {source}" for source, count in Counter(r["source"] for r in rows).items()))
    return rows


def _digest(profile: Profile, questions: list[Row], *sections: str) -> str:
    return hashlib.sha256(f"{profile.digest(*sections)} {row_sha(questions)}".encode()).hexdigest()


def _once(path: Path, digest: str, compute: Any) -> None:
    """Call ``compute``, which writes ``path``, unless the digest beside it says that it has run on the same inputs."""
    stamp = path.with_suffix(".sha256")
    if path.is_file() and stamp.is_file() and stamp.read_text().strip() == digest:
        print(f"{path.name}: read, made earlier from the same inputs")
        return
    stamp.unlink(missing_ok=True)
    compute()
    with atomic_write(stamp) as temporary:
        temporary.write_text(digest + "\n")
    print(f"{path.name}: computed")
