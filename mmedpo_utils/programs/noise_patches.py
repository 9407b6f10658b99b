"""Patches of noise on training films, which tell nothing: what lies under them cannot be seen.

A model that has never met noise reads it as something new. Both phantom models meet it in training,
at places that do not depend on the findings, so that noise on a lesion means "hidden".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..noise import signal_schedule, step_for_signal

NOISED_SHARE = 0.5  # of the films
AREAS = (0.005, 0.30)  # share of a film under noise
CELLS = (4, 7, 14)  # coarse to fine blobs
SIGNALS = (0.3, 0.7)  # share of the signal that is left


def noise_patches(grey: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise half of the films of a batch in blobs at random places, by the paper's equation; of the
    others at most a few pixels.

    Args:
        grey: films in [0, 1]. Shape: [B, H, W].
        rng: draws which films, where, how much and which noise.

    Returns:
        the films with noise, in [0, 1], and where it is, bool. Shape: [B, H, W] each.
    """
    count, height, width = grey.shape
    cells = CELLS[int(torch.randint(len(CELLS), (1,), generator=rng))]
    bumps = torch.randn(count, 1, cells, cells, generator=rng)
    field = functional.interpolate(bumps, size=(height, width), mode="bicubic")[:, 0]
    low, high = AREAS
    areas = low + (high - low) * torch.rand(count, generator=rng)
    areas *= torch.rand(count, generator=rng) < NOISED_SHARE
    # The highest part of each film's field, as large as its area says. It is ranked by a sample:
    # where the area is none, the few pixels above the sample's highest are left.
    ordered = field[:, ::4, ::4].flatten(1).sort(1).values
    place = ((1 - areas) * (ordered.shape[1] - 1)).long()
    hidden = field > ordered.gather(1, place[:, None])[:, :, None]
    schedule = signal_schedule()
    low, high = SIGNALS
    signal = low + (high - low) * float(torch.rand(1, generator=rng))
    alpha_bar = float(schedule[step_for_signal(schedule, signal)])
    noise = torch.randn(grey.shape, generator=rng)
    noised = (alpha_bar**0.5 * grey + (1 - alpha_bar) ** 0.5 * noise).clamp(0, 1)
    return torch.where(hidden, noised, grey), hidden
