"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden outputs beside the checkout; the test skips where it is absent."""
    folder = Path(os.environ.get("MMEDPO_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden data at {folder}: set MMEDPO_SHARED to the folder that holds golden/ and data/")
    return folder
