"""Rows of a shared prompt: the packing by hand, the mask against its rule, the attention against a
softmax written out.
"""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from mmedpo_utils.scale import shared_prefix
from mmedpo_utils.scale.shared_prefix import PackedRow

ROWS = [
    PackedRow([5, 6, 7], [(0, [8, 9]), (2, [10, 11, 12])]),
    PackedRow([5, 6], [(1, [8, 9, 10])]),
    PackedRow([5], [(3, [9])]),
]


def random_rows(seed: int, count: int = 5) -> list[PackedRow]:
    generator = torch.Generator().manual_seed(seed)

    def length() -> int:
        return int(torch.randint(1, 7, (), generator=generator))

    return [
        PackedRow([3] * length(), [(0, [4] * length()) for _ in range(1 + length() % 3)])
        for _ in range(count)
    ]


def sees(row: PackedRow, query: int, key: int) -> bool:
    """The rule, told by the row itself: the prompt and one's own answer, nothing later."""

    def owner(place: int) -> int | None:
        place -= len(row.prompt)
        for number, (_, answer) in enumerate(row.answers):
            if place < 0:
                return None
            if place < len(answer):
                return number
            place -= len(answer)
        return None

    return key <= query and (owner(key) is None or owner(key) == owner(query))


def test_a_row_is_prompt_and_answers_and_each_answer_goes_on_from_the_prompt():
    batch = shared_prefix.pack(ROWS, pad_token_id=1)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 10, 11, 12],
        [5, 6, 8, 9, 10, 1, 1, 1],
        [5, 9, 1, 1, 1, 1, 1, 1],
    ]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert batch["branches"].tolist() == [
        [0, 0, 0, 1, 1, 2, 2, 2],
        [0, 0, 1, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
    ]
    assert batch["answer_ids"].tolist() == [8, 9, 10, 11, 12, 8, 9, 10, 9]
    assert batch["answer_owners"].tolist() == [0, 0, 2, 2, 2, 1, 1, 1, 3]
    assert batch["answer_rows"].tolist() == [0] * 5 + [1] * 3 + [2]
    assert batch["answer_positions"].tolist() == [2, 3, 2, 5, 6, 1, 2, 3, 0], (
        "both answers follow the prompt's last token"
    )
    assert [len(row) for row in ROWS] == [8, 5, 2]


@pytest.mark.parametrize("seed", range(5))
def test_a_token_sees_the_prompt_and_its_own_answer_only(seed):
    rows = random_rows(seed)
    branches = shared_prefix.pack(rows, 0)["branches"]
    mask, start = shared_prefix.attention_mask(branches), shared_prefix.first_branching(branches)
    dense = shared_prefix.block_mask(branches).mask_mod
    for number, row in enumerate(rows):
        for query in range(len(row)):
            expected = [sees(row, query, key) for key in range(len(row))]
            assert mask[number, 0, query, : len(row)].tolist() == expected
            assert not mask[number, 0, query, len(row) :].any(), "padding is never seen"
            assert query >= start or expected == [key <= query for key in range(len(row))], (
                "causal before the branching"
            )
            at = [torch.tensor(value) for value in (number, 0, query)]
            assert [bool(dense(*at, torch.tensor(key))) for key in range(len(row))] == expected
    torch.testing.assert_close(shared_prefix.attention_mask(branches, start), mask[:, :, start:])
    assert mask.any(-1).all(), "no row of the softmax is empty"


def test_without_a_second_answer_there_is_no_branching():
    branches = shared_prefix.pack(ROWS[1:], 0)["branches"]
    assert shared_prefix.first_branching(branches) == branches.shape[1]
    assert shared_prefix.first_branching(shared_prefix.pack(ROWS, 0)["branches"]) == 5


@pytest.mark.parametrize("seed", range(3))
def test_attention_in_two_parts_is_the_softmax_over_what_is_seen(seed):
    rows = random_rows(seed)
    branches = shared_prefix.pack(rows, 0)["branches"]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), 4, branches.shape[1], 8)
    query = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(
            (len(rows), 2, *shape[2:]), generator=generator, dtype=torch.float64, requires_grad=True
        )
        for _ in range(2)
    )
    mask = shared_prefix.attention_mask(branches)
    scores = (query @ key.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
    module = types.SimpleNamespace(num_key_value_groups=2, is_causal=True)
    start = shared_prefix.first_branching(branches)
    assert 0 < start < branches.shape[1]
    real = torch.stack([torch.arange(shape[2]) < len(row) for row in rows])
    for part in (start, 0):
        found, _ = shared_prefix.prefix_attention(
            module, query, key, value, shared_prefix.attention_mask(branches, part), scaling=8**-0.5
        )
        torch.testing.assert_close(found[real], expected[real])
        gradients = [
            torch.autograd.grad(result[real].square().sum(), (query, key, value), retain_graph=True)
            for result in (found, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
    inputs = (
        query.detach(),
        key.detach(),
        value.detach(),
    )  # torch has no FlexAttention backward on a CPU
    flexible = flex_attention(
        *inputs, block_mask=shared_prefix.block_mask(branches), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(flexible[real], expected[real])
