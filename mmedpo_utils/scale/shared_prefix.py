"""Rows that share a prompt: one row holds a prompt and every answer to it, so that image and prompt
are read once.

A row is the prompt, then its answers, one after the other. An answer sees the prompt and itself,
never another answer, and its positions go on from the prompt's end. So each answer's
log-probability is what a row of its own would give. The functions are pure: tensors and lists in,
tensors out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PREFIX_ATTENTION = "shared_prefix_sdpa"


@dataclass(frozen=True)
class PackedRow:
    """One row of a batch.

    Attributes:
        prompt: token ids, one or more.
        answers: the owner of each answer (its place among the answers of the batch) and its token
            ids.
    """

    prompt: Sequence[int]
    answers: Sequence[tuple[int, Sequence[int]]]

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(ids) for _, ids in self.answers)


class AnswerToken(NamedTuple):
    """One token of an answer: its row, where it is predicted from, the token, whose answer."""

    row: int
    position: int
    token: int
    owner: int


def pack(rows: Sequence[PackedRow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Write rows as tensors, padded on the right.

    Returns:
        ``input_ids``, ``position_ids`` and ``branches`` (0 for prompt and padding, n for a row's
        n-th answer). Shape: [R, T].
        ``answer_rows``, ``answer_positions``: where the N answer tokens are predicted from. Shape:
            [N].
        ``answer_ids``, ``answer_owners``: the answer tokens, and whose they are. Shape: [N].
    """
    ids = []
    positions = []
    branches = []
    answers: list[AnswerToken] = []
    for row_number, row in enumerate(rows):
        row_ids = list(row.prompt)
        row_positions = list(range(len(row.prompt)))
        row_branches = [0] * len(row.prompt)
        for branch, (owner, answer) in enumerate(row.answers, 1):
            # A token is predicted from the one before it: an answer's first one from the prompt's
            # last, wherever in the row the answer is.
            before = len(row.prompt) - 1
            for offset, token in enumerate(answer):
                answers.append(AnswerToken(row_number, before, token, owner))
                before = len(row_ids)
                row_ids.append(token)
                row_positions.append(len(row.prompt) + offset)
                row_branches.append(branch)
        ids.append(torch.tensor(row_ids))
        positions.append(torch.tensor(row_positions))
        branches.append(torch.tensor(row_branches))
    answer_rows, answer_positions, answer_ids, answer_owners = torch.tensor(answers).unbind(1)
    return {
        "input_ids": pad_sequence(ids, True, pad_token_id),
        "position_ids": pad_sequence(positions, True),
        "branches": pad_sequence(branches, True),
        "answer_rows": answer_rows,
        "answer_positions": answer_positions,
        "answer_ids": answer_ids,
        "answer_owners": answer_owners,
    }


def first_branching(branches: torch.Tensor) -> int:
    """The first position where a second answer begins, over all rows; T where none does.
    ``branches``. Shape: [R, T].
    """
    places = (branches > 1).any(0).nonzero()
    return int(places[0]) if len(places) else branches.shape[1]


def attention_mask(branches: torch.Tensor, start: int = 0) -> torch.Tensor:
    """What the tokens from ``start`` on see: prompt, own answer, nothing later.

    Before `first_branching` this is the plain causal rule, also in rows of one answer, whose
    padding comes last.

    Args:
        branches: 0 for the prompt, n for the n-th answer. Shape: [R, T].

    Returns:
        True where a token sees another. Shape: [R, 1, T - start, T].
    """
    place = torch.arange(branches.shape[1], device=branches.device)
    seen = branches[:, None, :]
    own = branches[:, start:, None]
    return (((seen == 0) | (seen == own)) & (place <= place[start:, None]))[:, None]


def block_mask(branches: torch.Tensor) -> BlockMask:
    """The rule of `attention_mask` as FlexAttention takes it. ``branches``. Shape: [R, T]."""

    def sees(row: Any, _: Any, query: Any, key: Any) -> Any:
        return ((branches[row, key] == 0) | (branches[row, key] == branches[row, query])) & (
            key <= query
        )

    return create_block_mask(
        sees, len(branches), None, branches.shape[1], branches.shape[1], device=branches.device
    )


def prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA in two parts: plain causal attention before the first branching, the few tokens after it
    with their mask.

    Without a mask, or with one over all tokens, this is transformers' ``sdpa``.

    Args:
        query, key, value: Shape: [R, heads, T, head size]; key and value may have fewer heads.
        mask: `attention_mask` of the last tokens. Shape: [R, 1, T - start, T].

    Returns:
        Shape: [R, T, heads, head size]; and None, as transformers expects.
    """
    start = 0 if mask is None else query.shape[2] - mask.shape[2]
    if start == 0:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    before, _ = sdpa_attention_forward(
        module, query[:, :, :start], key[:, :, :start], value[:, :, :start], None, **options
    )
    after, _ = sdpa_attention_forward(module, query[:, :, start:], key, value, mask, **options)
    return torch.cat([before, after], dim=1), None


AttentionInterface.register(PREFIX_ATTENTION, prefix_attention)
AttentionMaskInterface.register(PREFIX_ATTENTION, sdpa_mask)
