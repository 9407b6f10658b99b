"""Curation of one profile's data set: what notebooks 02 and 03 run, step by step, on files.

Each step writes its manifest under ``<output>/pairs`` with a digest of its inputs beside it
(``.sha256``); where the digest still holds, the step reads the file instead of computing it, and
says so.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .base.errors import InputError
from .base.files import atomic_write, remove_temporaries, write_json
from .dataset import Dataset, with_images
from .lvlm import MedLVLM, generate, model_digest
from .medklip import MedKLIP
from .pairs import (
    Look,
    image_batches,
    medklip_look,
    merge_pairs,
    noised_copies,
    open_or_reason,
    pick_questions,
    text_pairs,
    visual_rows,
)
from .preference_rows import (
    Row,
    read_manifest,
    row_sha,
    row_source,
    rows_to_questions,
    write_manifest,
)
from .profiles import Noise, Profile
from .relevance import Judge, Member, sample_candidates
from .scale.journal import Journal

PROGRESS_SECONDS = 30


def training_questions(profile: Profile, dataset: Dataset) -> list[Row]:
    """The questions that pairs are made of: those of the released rows, else at most
    ``curation.text_pairs`` drawn ones.
    """
    if dataset.released_pairs is not None:
        return rows_to_questions(read_manifest(dataset.released_pairs, dataset.image_root))
    return pick_questions(dataset.questions["train"], profile.curation.text_pairs, profile.seed)


def curate_visual(profile: Profile, dataset: Dataset, model: MedKLIP) -> list[Row]:
    """Visual pairs of the training questions; the noised images go to ``pairs/noised``, the rows to
    ``pairs/visual.json``.

    A run that was killed goes on where it was; ``pairs/audit.json`` says what was skipped.
    """
    questions, folder = training_questions(profile, dataset), profile.output / "pairs"
    digest = (
        f"{inputs_digest(profile, questions, 'seed', 'data', 'visual_tool', 'noise')} "
        f"{model_digest(model)}"
    )
    audit = folder / "audit.json"
    if audit.is_file() and json.loads(audit.read_text(encoding="utf-8"))["skipped"]:
        (folder / "visual.sha256").unlink(
            missing_ok=True
        )  # the reader may have mended what was skipped

    def compute() -> None:
        look = medklip_look(model, profile.visual_tool.query)
        curate_folder(
            questions,
            dataset.image_root,
            folder,
            look,
            profile.noise,
            profile.seed,
            profile.visual_tool.batch_size,
            digest,
        )

    once(folder / "visual.json", digest, compute)
    return read_manifest(folder / "visual.json", dataset.image_root, folder / "noised", strict=True)


def curate_folder(
    questions: Sequence[Row],
    image_root: str | Path,
    folder: str | Path,
    look: Look,
    noise: Noise,
    seed: int,
    batch_size: int,
    tool: str,
) -> Row:
    """Visual pairs of any number of images, restartable: killed at any point, the same call goes on
    where it was.

    Under ``folder``: ``noised/``, one PNG per image; ``visual.jsonl``, the journal, one line per
        batch; in the end
    ``visual.json``, the rows, and ``audit.json``. All are the same, byte for byte, however often
    the run was killed.

    Args:
        look, noise, seed, batch_size: as for ``visual_pairs``.
        tool: identifies the visual tool (and whatever else decides the result); the journal of
            another one is not used.

    Returns:
        the audit of ``audit_visual``. An image that cannot be used is skipped, with its rows.

    Raises:
        InputError: something cannot be written, or no image can be used.
    """
    folder, batches = Path(folder), image_batches(questions, batch_size)
    remove_temporaries(folder)
    digest = row_sha([{"batches": batches, "noise": asdict(noise), "seed": seed, "tool": tool}])
    journal = Journal(
        folder / "visual.jsonl",
        digest,
        partial(_is_written, Path(image_root).resolve(), folder / "noised"),
    )
    total, done = sum(map(len, batches)), sum(map(len, journal.entries))
    if done:
        print(f"visual pairs: going on after {done:,} of {total:,} images")
    left, said = batches[len(journal.entries) :], time.monotonic()
    for records in noised_copies(left, image_root, folder / "noised", look, noise, seed):
        journal.append(records)
        done += len(records)
        if time.monotonic() - said >= PROGRESS_SECONDS:
            print(f"visual pairs: {done:,} of {total:,} images", flush=True)
            said = time.monotonic()
    records = [record for entry in journal.entries for record in entry]
    if all("skipped" in record for record in records):
        raise InputError(
            f"{image_root}: none of {total:,} images can be used; the first: "
            f"{records[0]['skipped']}"
        )
    write_manifest(folder / "visual.json", visual_rows(questions, records))
    audit = audit_visual(questions, records)
    write_json(folder / "audit.json", audit)
    print(
        f"visual pairs: {audit['rows']:,} rows of {audit['images']:,} images, "
        f"{audit['rows_skipped']:,} rows skipped; "
        f"mask over {audit['coverage']['mean']:.1%} of an image; mean confidence "
        f"{audit['confidence']['mean']:.2f}"
    )
    return audit


def audit_visual(questions: Sequence[Row], records: Sequence[Row]) -> Row:
    """What a curation did, from the records of ``noised_copies``, at least one of them with a copy.

    Returns:
        ``images`` with a copy, ``unchanged`` ones among them, ``rows``, ``rows_skipped``;
        ``coverage`` (share of an image under the mask) and ``confidence``, each with mean, least,
        most and counts in ten equal bins from 0 to 1;
        ``skipped``: per image why, and how many rows.
    """
    asked = Counter(question["image"] for question in questions)
    made = [record for record in records if "skipped" not in record]
    skipped = [
        {"image": record["image"], "why": record["skipped"], "rows": asked[record["image"]]}
        for record in records
        if "skipped" in record
    ]
    lost = sum(entry["rows"] for entry in skipped)
    return {
        "images": len(made),
        "unchanged": sum(not record["changed"] for record in made),
        "rows": len(questions) - lost,
        "rows_skipped": lost,
        **{key: _spread([record[key] for record in made]) for key in ("coverage", "confidence")},
        "skipped": skipped,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    return {
        "mean": round(float(np.mean(values)), 6),
        "least": min(values),
        "most": max(values),
        "bins": counts.tolist(),
    }


def _is_written(image_root: Path, noised_root: Path, records: Any) -> bool:
    """Whether a journal's entry is a list of records whose copies are there, or whose images still
    cannot be used.
    """
    return isinstance(records, list) and all(
        isinstance(open_or_reason(image_root, record["image"])[1], str)
        if "skipped" in record
        else (noised_root / record["rejected_image"]).is_file()
        for record in records
    )


def curate_text(
    profile: Profile, dataset: Dataset, lvlm: MedLVLM, judge: Judge, panel: list[Member]
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

    def compute() -> None:
        sample = partial(
            generate,
            lvlm,
            max_new_tokens=profile.lvlm.max_new_tokens,
            batch_size=profile.lvlm.batch_size,
        )
        values = profile.curation
        candidates = sample_candidates(
            sample,
            questions,
            dataset.image_root,
            values.candidates,
            values.temperature,
            profile.seed,
        )
        rows, debates = text_pairs(
            questions,
            candidates,
            judge,
            panel,
            values.conflict_threshold,
            values.rounds,
            profile.seed,
        )
        write_json(folder / "debates.json", debates)
        write_manifest(folder / "text.json", rows)

    digest = (
        f"{inputs_digest(profile, questions, 'seed', 'data', 'lvlm', 'curation', 'judge')} "
        f"{model_digest(lvlm.model)}"
    )
    once(folder / "text.json", digest, compute)
    rows = read_manifest(folder / "text.json", dataset.image_root, strict=True)
    return rows, json.loads((folder / "debates.json").read_text())


def merge(profile: Profile, text_rows: list[Row], visual_rows: list[Row]) -> list[Row]:
    """Both kinds of pairs in one manifest, ``pairs/train.json``, which training reads."""
    rows = merge_pairs(text_rows, visual_rows)
    write_manifest(profile.output / "pairs" / "train.json", rows)
    print(
        "train.json: "
        + ", ".join(
            f"{count} {source}" for source, count in Counter(r["source"] for r in rows).items()
        )
    )
    return rows


def inputs_digest(profile: Profile, questions: list[Row], *sections: str) -> str:
    """SHA-256 (hexadecimal) of what a manifest is made from: the named sections of the profile, and
    the questions.
    """
    return hashlib.sha256(f"{profile.digest(*sections)} {row_sha(questions)}".encode()).hexdigest()


def once(path: Path, digest: str, compute: Any) -> None:
    """Call ``compute``, which writes ``path``, unless the digest beside it says that it has run on
    the same inputs.
    """
    stamp = path.with_suffix(".sha256")
    if path.is_file() and stamp.is_file() and stamp.read_text().strip() == digest:
        print(f"{path.name}: read, made earlier from the same inputs")
        return
    stamp.unlink(missing_ok=True)
    compute()
    with atomic_write(stamp) as temporary:
        temporary.write_text(digest + "\n")
    print(f"{path.name}: computed")


def manifest_path(profile: Profile, variant: str) -> Path:
    """The preference manifest that ``variant`` trains on; notebook 03 writes train.json."""
    return profile.output / "pairs" / f"{profile.training.variants[variant].pairs}.json"


def training_rows(profile: Profile, name: str) -> list[dict[str, Any]]:
    """The pairs that variant ``name`` trains on.

    What the kit wrote, train.json or a manifest with a digest beside it, is read strictly: a bad
    row there is damage. Of somebody's own manifest, rows and images that cannot be used are left
    out with a warning.

    Raises:
        InputError: the manifest cannot be used, or has no pair of the variant's sources.
    """
    manifest, sources = manifest_path(profile, name), profile.training.variants[name].sources
    own = manifest.stem == "train" or manifest.with_suffix(".sha256").is_file()
    roots = () if own else (profile.image_root, profile.output / "pairs" / "noised")
    stored = read_manifest(manifest, *roots, strict=own)
    rows = [row for row in stored if row_source(row) in sources]
    if not rows:
        raise InputError(
            f"{manifest}: has no pairs of the sources {', '.join(sources)} that variant {name!r} "
            "trains on; run notebook 03, or change the variant's `sources`"
        )
    return rows
