"""Preference pairs in the browser: filtered, side by side, with what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import InputError
from ..base.images import open_image, resolve_image
from ..base.rows import Row, question_text
from ..preference_rows import answer_text, row_source
from . import plots
from .leaks import told_apart
from .pages import Packed, Page, fitted

SIDE = 224  # pixels of a shown film


def pair_view(
    rows: Sequence[Row],
    image_root: str | Path,
    noised_root: str | Path | None = None,
    debates: Sequence[Mapping[str, Any]] = (),
    count: int = 24,
) -> Page:
    """Look at preference pairs: both films with a wipe between them, both answers with the words
    that differ marked, the debate, and what words alone give away.

    The view holds ``count`` pairs, every so-manieth of each source, so that it stays small.

    Args:
        rows: preference rows.
        image_root: folder of the images.
        noised_root: folder of the rejected images; None leaves them out.
        debates: `curate.curate_text`'s, for the history of each text pair's score.

    Raises:
        InputError: no rows.
    """
    if not rows:
        raise InputError("no preference pairs to show: curate some first (notebooks 02 and 03)")
    history = {item["id"]: item["history"] for item in debates}
    told = told_apart(rows)
    films: dict[str, np.ndarray] = {}
    changes: list[np.ndarray] = []
    listed = []
    chosen = _chosen(rows, count)
    for number in chosen:
        row = rows[number]
        # Visual pairs have the ids of the questions that text pairs are made of, too.
        of_text = row_source(row) == "text"
        name = row["image"]
        if name not in films:
            films[name] = fitted(open_image(resolve_image(image_root, name)), SIDE)
        change = None
        if row.get("rejected_image") and noised_root is not None:
            change = len(changes)
            noised = open_image(resolve_image(noised_root, row["rejected_image"]))
            # uint8 wraps, and the browser's sum wraps back; outside the noise this is zero.
            changes.append(fitted(noised, SIDE) - films[name])
        preferred, rejected = differing(answer_text(row), answer_text(row, rejected=True))
        listed.append(
            {
                "label": f"{name}: {question_text(row)}",
                "image": name,
                "source": row_source(row),
                "finding": row.get("finding"),
                "origin": row.get("origin"),
                "weight": row.get("weighted_score"),
                "question": question_text(row),
                "preferred": preferred,
                "rejected": rejected,
                "history": [_turn(turn) for turn in history.get(row["id"], ()) if of_text],
                "leak": told[number],
                "film": list(films).index(name),
                "change": change,
            }
        )
    shape = (len(changes), SIDE, SIDE)
    arrays = {
        "films": Packed(np.stack(list(films.values())), "film"),
        "changes": Packed(np.reshape(changes, shape), "bytes"),
    }
    first = listed[0]
    row = rows[chosen[0]]
    film = films[first["image"]]
    still = partial(
        plots.pair_card,
        film,
        None if first["change"] is None else film + changes[first["change"]],
        question_text(row),
        answer_text(row),
        answer_text(row, rejected=True),
        row.get("weighted_score"),
    )
    return Page("pairs", {"pairs": listed}, arrays, still, f"A pair about {first['image']}")


def _chosen(rows: Sequence[Row], count: int) -> list[int]:
    """The numbers of ``count`` rows at most, spread evenly over the rows of each source."""
    sources: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        sources.setdefault(row_source(row), []).append(number)
    chosen = []
    for of_source in sources.values():
        share = max(1, count // len(sources))
        places = np.linspace(0, len(of_source) - 1, min(share, len(of_source))).astype(int)
        chosen += [of_source[place] for place in places]
    return chosen


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    agrees = "yes" if turn["agrees"] else "no"
    score = f"{turn['score']:.2f}"
    return {"member": turn["member"], "score": score, "agrees": agrees, "reason": turn["reason"]}


def differing(one: str, other: str) -> tuple[list[list], list[list]]:
    """Each text's words, and whether the other text lacks the word at its place.

    Returns:
        for each text a list of [word, differs].
    """
    words = one.split(), other.split()
    marked = [[[word, True] for word in words[0]], [[word, True] for word in words[1]]]
    lowered = [[word.lower() for word in text] for text in words]
    matcher = SequenceMatcher(None, lowered[0], lowered[1], autojunk=False)
    for block in matcher.get_matching_blocks():
        for n in range(block.size):
            marked[0][block.a + n][1] = False
            marked[1][block.b + n][1] = False
    return marked[0], marked[1]
