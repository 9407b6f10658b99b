"""MedKLIP's official checkpoint: its tensors under our names, and the text embeddings that it does
not store.

The official file is a torch pickle ``{"model": {"module.<key>": tensor}}``. Its query embeddings
are computed at construction: Bio_ClinicalBERT's first token on one description per query, from a
file of the MedKLIP repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.errors import InputError, first_line
from ..base.files import atomic_write
from ..base.tensors import read_safetensors
from ..medklip import MedKLIPConfig

OFFICIAL_QUERIES = tuple(
    """
    normal clear sharp sharply unremarkable intact stable free effusion opacity pneumothorax
    edema atelectasis tube consolidation process abnormality enlarge tip low pneumonia line
    congestion catheter cardiomegaly fracture air tortuous lead disease calcification prominence
    device engorgement picc clip elevation expand nodule wire fluid degenerative pacemaker
    thicken marking scar hyperinflate blunt loss widen collapse density emphysema aerate mass
    crowd infiltrate obscure deformity hernia drainage distention shift stent pressure lesion
    finding borderline hardware dilation chf redistribution aspiration tail_abnorm_obs
    excluded_obs
    """.split()
)
DESCRIPTIONS = "observation explanation.json"
MISSPELT = {"pneumonia": "eumonia"}
LONGEST_DESCRIPTION = 64


def official_checkpoint(
    path: Path, descriptions: str | os.PathLike | None, text_encoder: str | os.PathLike
) -> tuple[MedKLIPConfig, dict[str, Tensor]]:
    """The door for MedKLIP: sizes and tensors of a checkpoint file of the official network.

    Args:
        descriptions, text_encoder: as `medklip.load_medklip`.

    Raises:
        InputError: a file is missing or unreadable.
    """
    state = read_state(path)
    if "disease_book" not in state:
        beside = path.parent / DESCRIPTIONS
        state["disease_book"] = query_embeddings(
            Path(descriptions or beside), os.fspath(text_encoder)
        )
    state.setdefault("location_book", torch.zeros(0, MedKLIPConfig.text_width))
    locations = len(torch.atleast_1d(state["location_book"]))
    names = tuple(str(number) for number in range(locations))
    return MedKLIPConfig(OFFICIAL_QUERIES, names), state


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint under our names, from safetensors or a torch pickle, with official
    keys or ours.

    A pickle is read with ``weights_only``: it cannot run code.

    Raises:
        InputError: the file is missing or unreadable, is no mapping of names to tensors, or says a
            name twice.
    """
    if path.suffix == ".safetensors":
        stored = read_safetensors(path)
    else:
        stored = _read_pickle(path)
    state = {our_key(key): value for key, value in stored.items()}
    if len(state) < len(stored):
        counts = [our_key(key) for key in stored]
        twice = sorted(key for key in state if counts.count(key) > 1)
        raise InputError(
            f"{path}: holds {twice[0]} under two names; expected either official names or ours"
        )
    return state


def our_key(key: str) -> str:
    """Our state-dict key of an official one, with or without ``module.``; only the trunk's differ,
    ours stay.
    """
    key = key.removeprefix("module.")
    key = re.sub(r"^res_features\.0\.", "res_features.embedder.embedder.convolution.", key)
    key = re.sub(r"^res_features\.1\.", "res_features.embedder.embedder.normalization.", key)
    block = re.fullmatch(r"res_features\.(\d)\.(\d+)\.(.*)", key)
    if not block:
        return key
    # torchvision counts convolutions from 1 and puts the stages at places 4 to 6 of the trunk;
    # transformers counts both from 0.
    stage = int(block[1]) - 4
    rest = block[3]
    rest = rest.replace("downsample.0", "shortcut.convolution")
    rest = rest.replace("downsample.1", "shortcut.normalization")
    rest = re.sub(r"conv(\d)", lambda found: f"layer.{int(found[1]) - 1}.convolution", rest)
    rest = re.sub(r"bn(\d)", lambda found: f"layer.{int(found[1]) - 1}.normalization", rest)
    return f"res_features.encoder.stages.{stage}.layers.{block[2]}.{rest}"


def query_embeddings(descriptions: Path, text_encoder: str) -> Tensor:
    """Text embedding of each official query, computed once and then read from a file beside the
    descriptions.

    Args:
        descriptions: JSON ``{query: description}``, as in the MedKLIP repository (which writes
            "eumonia").
        text_encoder: hub name or folder of a BERT; the state of its first token is the embedding.

    Returns:
        float32. Shape: [75, width of the encoder].

    Raises:
        InputError: the descriptions are unreadable or incomplete, or the encoder cannot be loaded.
    """
    texts = _read_descriptions(descriptions)
    identity = json.dumps([text_encoder, LONGEST_DESCRIPTION, OFFICIAL_QUERIES, texts])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    cache = descriptions.parent / f"query_embeddings-{digest}.safetensors"
    if cache.is_file():
        try:
            return load_file(cache)["disease_book"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"{cache}: cannot be read as the stored text embeddings ({first_line(error)}); "
                "delete it, and it is computed again"
            ) from error
    embeddings = _embed(texts, text_encoder)
    try:
        with atomic_write(cache) as temporary:
            save_file({"disease_book": embeddings}, temporary)
    except InputError as error:
        warnings.warn(f"text embeddings are not kept for the next time: {error}", stacklevel=2)
    return embeddings


@torch.inference_mode()
def _embed(texts: Sequence[str], text_encoder: str) -> Tensor:
    """The state of the first token on each text. Shape: [texts, width of the encoder]."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(text_encoder, trust_remote_code=False)
        model = AutoModel.from_pretrained(text_encoder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"text encoder {text_encoder!r}: cannot be loaded ({first_line(error)}); give the "
            f"folder of a downloaded copy, or let this machine fetch it"
        ) from error
    tokens = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=LONGEST_DESCRIPTION,
        return_tensors="pt",
    )
    return model.eval()(**tokens).last_hidden_state[:, 0].float().contiguous()


def _read_descriptions(path: Path) -> list[str]:
    """The descriptions in the order of the official queries."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({first_line(error)}); expected one description per "
            f'query: fetch "{DESCRIPTIONS}" from PreTrain_MedKLIP/data_file of the MedKLIP '
            "repository and put it beside the checkpoint"
        ) from error
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: expected an object {{query: description}}, found {type(found).__name__}"
        )
    texts: list[str] = []
    without: list[str] = []
    for query in OFFICIAL_QUERIES:
        # The repository's file writes "eumonia".
        text = found.get(query, found.get(MISSPELT.get(query)))
        if isinstance(text, str) and text.strip():
            texts.append(text)
        else:
            without.append(query)
    if without:
        named = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        raise InputError(
            f"{path}: no description of {len(without)} of {len(OFFICIAL_QUERIES)} queries "
            f"({named}); expected a text for each"
        )
    return texts


def _read_pickle(path: Path) -> dict[str, Any]:
    """Tensors of a torch pickle by name; it cannot run code."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle torch raises whatever its bytes lead to
        reason = first_line(error)
        raise InputError(
            f"{path}: cannot be read as MedKLIP weights ({reason}); expected the official "
            "checkpoint, tensors only: fetch it again"
        ) from error
    state = stored.get("model", stored) if isinstance(stored, dict) else stored
    if not isinstance(state, dict) or not state:
        raise InputError(
            f'{path}: expected {{"model": {{name: tensor}}}}, found {type(state).__name__}'
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{path}: entry {key!r}: expected a tensor under a name, found "
                f"{type(value).__name__}"
            )
    return state
