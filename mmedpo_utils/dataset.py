"""The data set that a profile names: the phantom world, drawn on demand, a folder in the released
layout, or a data set's own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .base.cards import load_card
from .base.doors import open_door
from .base.errors import InputError
from .base.files import read_or_compute, remove_temporaries
from .base.images import is_whole_png, open_image, resolve_image
from .base.privacy import check_origin, check_outputs
from .base.rows import pair_images
from .base.settings import SPLITS
from .phantom.texts import read_masks, write_dataset
from .phantom.world import VERSION
from .preference_rows import read_questions
from .profiles import Profile


@dataclass(frozen=True)
class FilmDataset:
    """Where a data set lies, and its questions.

    Attributes:
        questions: rows in LLaVA-Med's question format per split; a folder has only "test", VQA-RAD
            no "validation".
        masks_root: one packed lesion mask per film; None where no masks are known.
        released_pairs: a released MMedPO preference file; None where the kit makes its own text
            pairs.
    """

    image_root: Path
    questions: dict[str, list[dict[str, Any]]]
    masks_root: Path | None
    released_pairs: Path | None

    def image(self, name: str) -> Image.Image:
        """Open one image, upright."""
        return open_image(resolve_image(self.image_root, name))

    def masks(self, name: str) -> dict[str, Any]:
        """The lesion masks of one image, bool [H, W] per finding; empty where none are known."""
        if self.masks_root is None:
            return {}
        return read_masks(resolve_image(self.masks_root, name))

    def lesion_mask(self, name: str) -> np.ndarray | None:
        """The union of one image's masks, bool [H, W]; None where no lesion is known."""
        masks = self.masks(name)
        return np.any(list(masks.values()), axis=0) if masks else None

    def image_names(self, split: str) -> list[str]:
        """The images that a split's questions ask about, each once, in order."""
        return list(dict.fromkeys(row["image"] for row in self.questions[split]))


def prepare_dataset(profile: Profile) -> FilmDataset:
    """Return the profile's data set. Films of the phantom world are drawn once, then read back.

    Raises:
        InputError: the folder of a real data set is not there, not in its layout, or without a
            test question; MIMIC-CXR's rows lie under another card; or figures of credentialed data
            would leave the run folder.
    """
    card = load_card(profile.data.card)
    check_outputs(card, profile.output, profile.figures, in_place=False)
    if profile.data.source == "phantom":
        return _phantom(profile)
    dataset = _folder(profile) if profile.data.source == "folder" else _layout(profile)
    if not dataset.questions.get("test"):
        raise InputError(
            f"{profile.data.root}: has no test question that can be used, and models are compared "
            "on them; the warnings above, or the data set's card, say what is missing"
        )
    for split, rows in dataset.questions.items():
        check_origin(card, (row["image"] for row in rows), f"{profile.data.root}, split {split}")
    if dataset.released_pairs is not None:
        names = pair_images(dataset.released_pairs)
        check_origin(card, names, dataset.released_pairs)
    return dataset


def _root(profile: Profile) -> Path:
    """The folder of real data, which a profile of such data names."""
    if profile.data.root is None:
        raise InputError("data.root: expected the data set's folder, for every source but phantom")
    return profile.data.root


def _layout(profile: Profile) -> FilmDataset:
    root = _root(profile)
    released = root / "train_preferences.json"
    questions = open_door("data set")(profile.data.source, root)
    return FilmDataset(
        profile.image_root, questions, None, released if released.is_file() else None
    )


def _folder(profile: Profile) -> FilmDataset:
    root = _root(profile)
    if not (root / "test_questions.jsonl").is_file():
        raise InputError(
            f"{root}: no test_questions.jsonl; set data.root in the profile, or the environment "
            "variable MMEDPO_DATA_ROOT, to the folder that holds images/, train_preferences.json "
            "and test_questions.jsonl"
        )
    questions = {"test": read_questions(root / "test_questions.jsonl", root / "images")}
    return FilmDataset(root / "images", questions, None, root / "train_preferences.json")


def _phantom(profile: Profile) -> FilmDataset:
    folder = profile.output / "data"
    sizes = {split: getattr(profile.data, f"{split}_patients") for split in SPLITS}
    recipe = json.dumps({"world": VERSION, "seed": profile.seed, "patients": sizes})

    def draw() -> None:
        remove_temporaries(folder)
        print(f"drawing {sum(sizes.values())} phantom films")
        write_dataset(folder, sizes, profile.seed)

    asked = {split: folder / f"{split}_questions.jsonl" for split in SPLITS}

    def whole() -> bool:
        drawn = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        kinds = (folder / "images", folder / "masks")
        return all(is_whole_png(kind / f"{film}.png") for kind in kinds for film in drawn)

    inputs = hashlib.sha256(recipe.encode()).hexdigest()
    read_or_compute(folder / "facts.json", inputs, draw, [*asked.values()], whole)
    questions = {split: read_questions(asked[split]) for split in SPLITS if sizes[split]}
    return FilmDataset(folder / "images", questions, folder / "masks", None)
