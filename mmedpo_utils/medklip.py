"""The visual tool: MedKLIP's network, its heat map and its confidence (arXiv 2412.06141, stage 2 of
the curation).

The architecture is the official one by configuration: a ResNet trunk up to its third stage, a
two-layer projection of the 14x14 patches, and a pre-norm decoder in which one query per finding
attends to the patches. ``MedKLIPConfig`` has the official sizes; the phantom checkpoint has smaller
ones. State-dict keys are the official ones, but for the trunk's; ``medklip_official`` reads both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetModel

from .base.doors import open_door
from .base.errors import InputError, first_line
from .base.tensors import check_state, read_safetensors

PHANTOM_CHECKPOINT = Path(__file__).parent / "phantom" / "weights" / "medklip"
IMAGE_SIZE = 224
LARGEST_SIZE = 4096  # of any part of the network; the official one's largest is 1024
GRID = 14
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MedKLIPConfig:
    """Sizes of the network; the defaults are the official ones.

    Attributes:
        queries: the words that are asked for, one decoder query each.
        locations: the zones that the location contrast chooses from.
        text_width: width of the text embeddings of queries and locations.
        block: ``bottleneck`` or ``basic`` residual blocks.
    """

    queries: tuple[str, ...]
    locations: tuple[str, ...]
    text_width: int = 768
    stem_width: int = 64
    stage_widths: tuple[int, ...] = (256, 512, 1024)
    stage_depths: tuple[int, ...] = (3, 4, 6)
    block: str = "bottleneck"
    width: int = 256
    layers: int = 4
    heads: int = 4
    feed_forward: int = 1024


@dataclass(frozen=True)
class MedKLIPOutput:
    """What the network says about a batch.

    Attributes:
        queries: names along the query axis.
        logits: absent, present per query. Shape: [B, Q, 2].
        attentions: cross-attention from queries to patches; each row sums to 1. Shape: [B, layers,
            heads, Q, 196].
        features: decoder output per query. Shape: [B, Q, width].
    """

    queries: tuple[str, ...]
    logits: Tensor
    attentions: Tensor
    features: Tensor

    def index(self, query: str) -> int:
        """Position of ``query`` on the query axis; InputError where the model does not know it."""
        if query not in self.queries:
            raise InputError(
                f"unknown query {query!r}: this checkpoint knows {', '.join(self.queries)}"
            )
        return self.queries.index(query)


class DecoderLayer(nn.Module):
    """Pre-norm layer: self-attention over the queries, cross-attention to the patches,
    feed-forward.
    """

    def __init__(self, config: MedKLIPConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.linear1 = nn.Linear(width, config.feed_forward)
        self.linear2 = nn.Linear(config.feed_forward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, states: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """New query states [B, Q, width] and the cross-attention [B, heads, Q, 196]."""
        normed = self.norm1(states)
        states = states + self.self_attn(normed, normed, normed, need_weights=False)[0]
        update, attention = self.multihead_attn(
            self.norm2(states), patches, patches, average_attn_weights=False
        )
        states = states + update
        return states + self.linear2(functional.relu(self.linear1(self.norm3(states)))), attention


class Decoder(nn.Module):
    """The stack of decoder layers and the final norm."""

    def __init__(self, config: MedKLIPConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, states: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Query features [B, Q, width] and all cross-attention [B, layers, heads, Q, 196]."""
        attentions = []
        for layer in self.layers:
            states, attention = layer(states, patches)
            attentions.append(attention)
        return self.norm(states), torch.stack(attentions, dim=1)


class MedKLIP(nn.Module):
    """Findings by attention: presence logits per query and the cross-attention behind them.

    The buffers ``disease_book`` [Q, text_width] and ``location_book`` [L, text_width] hold the text
    embeddings of the queries and of the zones; no text encoder is needed after training.
    """

    def __init__(self, config: MedKLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = config.queries
        self.res_features = ResNetModel(
            ResNetConfig(
                embedding_size=config.stem_width,
                hidden_sizes=list(config.stage_widths),
                depths=list(config.stage_depths),
                layer_type=config.block,
            )
        )
        channels = config.stage_widths[-1]
        self.res_l1 = nn.Linear(channels, channels)
        self.res_l2 = nn.Linear(channels, config.width)
        self.disease_embedding_layer = nn.Linear(config.text_width, config.width)
        self.decoder = Decoder(config)
        self.classifier = nn.Linear(config.width, 2)
        self.cl_fc = nn.Linear(config.width, config.text_width)
        self.register_buffer("disease_book", torch.zeros(len(config.queries), config.text_width))
        self.register_buffer("location_book", torch.zeros(len(config.locations), config.text_width))

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB, 224x224 bilinear whatever the shape, [0, 1], ImageNet mean and deviation. Shape: [B,
        3, 224, 224].

        A grey image is resized before its channel is repeated, which gives the same values.
        """
        small = [
            (image if image.mode == "L" else image.convert("RGB"))
            .resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
            .convert("RGB")
            for image in images
        ]
        pixels = (
            torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2)
            / 255
        )
        pixels = (pixels - torch.tensor(CHANNEL_MEAN).view(3, 1, 1)) / torch.tensor(
            CHANNEL_STD
        ).view(3, 1, 1)
        return pixels.to(self.classifier.weight.device)

    def forward(self, pixel_values: Tensor) -> MedKLIPOutput:
        """Read a batch of films.

        Args:
            pixel_values: from ``preprocess``. Shape: [B, 3, 224, 224].
        """
        return self.decode(self.encode(pixel_values))

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Patch features after the projection, row by row of the 14x14 grid. Shape: [B, 196,
        width].
        """
        trunk = self.res_features
        patches = (
            trunk.encoder(trunk.embedder(pixel_values)).last_hidden_state.flatten(2).transpose(1, 2)
        )
        return self.res_l2(functional.relu(self.res_l1(patches)))

    def decode(self, patches: Tensor) -> MedKLIPOutput:
        """Let all queries attend to the patches of ``encode``."""
        queries = self.disease_embedding_layer(self.disease_book).expand(len(patches), -1, -1)
        features, attentions = self.decoder(queries, patches)
        return MedKLIPOutput(self.queries, self.classifier(features), attentions, features)

    def location_logits(self, output: MedKLIPOutput) -> Tensor:
        """Similarity of each query's output with each zone's text embedding. Shape: [B, Q, L]."""
        return self.cl_fc(output.features) @ self.location_book.T / self.config.text_width**0.5


def load_medklip(
    checkpoint: str | os.PathLike = "phantom",
    device: str | torch.device = "cpu",
    descriptions: str | os.PathLike | None = None,
    text_encoder: str | os.PathLike = "emilyalsentzer/Bio_ClinicalBERT",
) -> MedKLIP:
    """Load a checkpoint for inference.

    Args:
        checkpoint: ``"phantom"`` (shipped); a folder that holds ``config.json`` and
            ``model.safetensors``; or a file of
            the official sizes: the official torch pickle, or safetensors with official keys or
                ours.
        descriptions: JSON {query: description} behind the official text embeddings; None: the file
            of the MedKLIP repository, "observation explanation.json", beside the checkpoint. Unused
            where the file has embeddings.
        text_encoder: hub name or folder of the BERT that embeds the descriptions.

    Raises:
        InputError: a file is missing or unreadable, or its tensors are not those of the configured
            architecture.
    """
    folder = PHANTOM_CHECKPOINT if checkpoint == "phantom" else Path(checkpoint)
    if folder.is_file():
        path = folder
        config, state = open_door("MedKLIP")(path, descriptions, text_encoder)
    else:
        path = folder / "model.safetensors"
        config = _read_config(folder / "config.json")
        state = read_safetensors(path)
    try:
        with torch.device("meta"):  # compared before anything of these sizes is allocated
            check_state(path, state, MedKLIP(config).state_dict())
        model = MedKLIP(config)
    except InputError:
        raise
    except Exception as error:  # a value that no network can have fails wherever it is first used
        raise InputError(
            f"{folder / 'config.json'}: its values make no MedKLIP ({first_line(error)}); expected "
            "those of a trained checkpoint: fetch the folder again"
        ) from error
    model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False)


def heat_map(
    output: MedKLIPOutput, query: str = "disease", layer: int | None = None, head: int | None = None
) -> Tensor:
    """Cross-attention of one query over the 14x14 patches: the paper's h = T(x_v).

    Args:
        layer, head: one of each, or None for the mean over all of them (the paper's choice).

    Returns:
        non-negative maps; each sums to 1. Shape: [B, 14, 14].
    """
    rows = output.attentions[:, :, :, output.index(query)]
    rows = rows.mean(1) if layer is None else rows[:, layer]
    rows = rows.mean(1) if head is None else rows[:, head]
    return rows.unflatten(-1, (GRID, GRID))


def confidence(output: MedKLIPOutput, query: str = "disease") -> Tensor:
    """Probability that ``query`` is present: the raw relevance s of a visual pair. Shape: [B], in
    [0, 1].
    """
    return output.logits[:, output.index(query)].softmax(-1)[:, 1]


def peak(heat: Tensor, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> tuple[int, int]:
    """Row and column of the maximum of a map [h, w] after bilinear upsampling to ``size`` (height,
    width).
    """
    wide = functional.interpolate(
        heat[None, None].float(), size=size, mode="bilinear", align_corners=False
    )
    row, column = divmod(int(wide.argmax()), size[1])
    return row, column


def pointing_hit(heat: Tensor, mask: np.ndarray, tolerance: float = 8) -> bool:
    """Whether the map's peak lies in the mask or at most ``tolerance`` pixels from it (the pointing
    game).

    Args:
        heat: attention of one film. Shape: [14, 14].
        mask: lesion, bool, with at least one pixel. Shape: [H, W].
    """
    row, column = peak(heat, mask.shape)
    rows, columns = np.nonzero(mask)
    return bool(np.hypot(rows - row, columns - column).min() <= tolerance)


def _read_config(path: Path) -> MedKLIPConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sizes: dict[str, Any] = {}
        for value in values.values():
            for size in value if isinstance(value, list) else [value]:
                if isinstance(size, float) or (isinstance(size, int) and size > LARGEST_SIZE):
                    raise ValueError(f"a size of {size!r:.40}; at most {LARGEST_SIZE} are read")
        for key, value in values.items():
            sizes[key] = tuple(value) if isinstance(value, list) else value
        return MedKLIPConfig(**sizes)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a MedKLIP configuration ({first_line(error)}); expected a folder with "
            "config.json and "
            'model.safetensors, the official checkpoint file, or "phantom"'
        ) from error
