"""Profiles of earlier versions: keys that are read no more, and keys that were not there yet."""

from __future__ import annotations

from typing import Any

RETIRED_KEYS = [("training", "reuse_vision_features"), ("evaluation", "processes")]
# What older profiles do not say, and what they did; a digest leaves these values out.
ADDED_KEYS: dict[tuple[str, str], Any] = {
    ("curation", "still_true"): "keep",
    ("judge", "whole_sentences"): 0.0,
}


def bring_up_to_date(values: dict[str, Any], file: str) -> None:
    """Leave out keys that profiles have no more, and add those that they had not yet, and say so:
    older run folders hold such profiles.
    """
    for outer, key in RETIRED_KEYS:
        if isinstance(values.get(outer), dict) and key in values[outer]:
            del values[outer][key]
            print(f"{file}: key `{outer}.{key}` is read no more, and left out")
    for (outer, key), before in ADDED_KEYS.items():
        if isinstance(values.get(outer), dict) and key not in values[outer]:
            values[outer][key] = before
            print(f"{file}: key `{outer}.{key}` is new, and taken as {before}, as it was before")
