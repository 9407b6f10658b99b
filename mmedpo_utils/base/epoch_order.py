"""The order of pairs in an epoch, the same in every process and in a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochOrder(torch.utils.data.Sampler):
    """The order of the pairs in each epoch: seed and epoch alone decide, so that every process and
    a resumed run agree.

    Args:
        lengths: tokens of each pair's longest row. Length: N.
        group: pairs of one step; with it, pairs of like length come together. None: any order.
        epoch: tells the epoch that begins; the libraries' own samplers forget it where several
            processes resume.
    """

    def __init__(
        self, lengths: Sequence[int], group: int | None, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.lengths = lengths
        self.group = group
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.group:
            return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))
        return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
