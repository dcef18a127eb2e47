"""Batches: masks out of lengths, predictors one before, scatter, groups of rows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from punster.data.batch import Example, PrefixTree, collate, epoch_order, prefix_batches, token_batches
from punster.model.load import load_model
from punster.model.role import Role

EXAMPLES = [Example((5, 6, 7), (8, 2)), Example((5,), (9, 9, 9, 2)), Example((4, 4), (2,))]


def test_masks_by_hand() -> None:
    batch = collate(EXAMPLES, pad_id=1)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 2], [5, 9, 9, 9, 2], [4, 4, 2, 1, 1]]
    assert batch.prompt_lengths.tolist() == [3, 1, 2]
    assert batch.lengths.tolist() == [5, 5, 3]
    assert batch.response_lengths.tolist() == [2, 4, 1]
    assert batch.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.response_span().int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]]
    assert batch.targets().tolist() == [8, 2, 9, 9, 9, 2, 2]  # EOS (2) belongs to every response


def test_predictors_are_the_states_one_before() -> None:
    batch = collate(EXAMPLES)
    assert batch.tree.nodes.tolist() == [
        [0, 1, 2, 3, 4],
        [0, 5, 6, 7, 8],
        [9, 10, 11, 0, 0],
    ]  # rows 0 and 1 begin with the same token
    assert batch.predictors().tolist() == [2, 3, 0, 5, 6, 7, 10]


def test_scatter_is_the_inverse_of_reading_by_the_mask() -> None:
    batch = collate(EXAMPLES)
    flat = torch.arange(1.0, 8.0, requires_grad=True)
    grid = batch.scatter(flat)
    assert grid.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]]
    assert torch.equal(grid[batch.mask], flat)
    (grid * torch.arange(12.0).view(3, 4)).sum().backward()
    assert flat.grad is not None and flat.grad.tolist() == [0, 1, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("pad", [0, 2, 8, 299])
def test_the_pad_id_is_irrelevant(pad: int, tiny_llama: Path) -> None:
    """Ids that occur in the texts, EOS among them, may be the pad: GPT-2 has none, SmolLM2 ships pad == eos."""
    first, second = collate(EXAMPLES), collate(EXAMPLES, pad_id=pad)
    for name in ("mask", "prompt_lengths", "lengths", "response_lengths"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(first.response_span(), second.response_span()) and torch.equal(first.targets(), second.targets())
    role = Role(load_model(str(tiny_llama)))
    with torch.no_grad():
        assert torch.equal(role.response_hidden(first), role.response_hidden(second))


def test_prefix_tree_by_hand() -> None:
    rows = [(1, 2, 3), (1, 2, 4, 5), (2, 3), (1, 2, 3)]
    tree = PrefixTree.of(rows)
    assert tree.nodes.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 6, 0, 0], [0, 1, 2, 0]]
    assert tree.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert tree.starts == [0, 2, 0, 3]
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 4, 5], [2, 3, 0, 0], [1, 2, 3, 0]])
    assert tree.gather(ids).tolist() == [[1, 2, 3, 4, 5, 2, 3]]
    left = PrefixTree.of(rows, left=True)
    assert left.nodes.tolist() == [[0, 0, 1, 2], [0, 1, 3, 4], [0, 0, 5, 6], [0, 0, 1, 2]]
    assert left.gather(torch.tensor([[0, 1, 2, 3], [1, 2, 4, 5], [0, 0, 2, 3], [0, 1, 2, 3]])).tolist() == [[1, 2, 3, 4, 5, 2, 3]]


SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=9), min_size=1, max_size=12)


@given(rows=SEQUENCES, left=st.booleans())
@settings(deadline=None, max_examples=200, derandomize=True)
def test_a_prefix_tree_holds_every_distinct_prefix_once(rows: list[list[int]], left: bool) -> None:
    tree, longest = PrefixTree.of(rows, left=left), max(map(len, rows))
    distinct = {tuple(row[: k + 1]) for row in rows for k in range(len(row))}
    assert tree.first.numel() == len(distinct)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        at = longest - len(row) if left else 0
        ids[place, at : at + len(row)] = torch.tensor(row)
    spread = tree.spread(tree.gather(ids)[..., None])[..., 0]
    for place, row in enumerate(rows):
        at = longest - len(row) if left else 0
        assert spread[place, at : at + len(row)].tolist() == row
        assert tree.positions[0, tree.nodes[place, at : at + len(row)]].tolist() == list(range(len(row)))


@given(rows=SEQUENCES, limit=st.integers(1, 30))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_prefix_batches_cover_all_rows_once_within_the_limit(rows: list[list[int]], limit: int) -> None:
    some = [Example(tuple(row[:1]), tuple(row[1:])) for row in rows]
    groups = prefix_batches(some, limit)
    assert sorted(row for group in groups for row in group) == list(range(len(rows)))
    for group in groups:
        some_rows = [rows[row] for row in group]
        assert len(group) == 1 or PrefixTree.of(some_rows).first.numel() <= limit
        assert len(group) == 1 or len(group) * max(map(len, some_rows)) <= 4 * limit


def test_empty_prompt_or_response_is_refused() -> None:
    for example in (Example((), (2,)), Example((5,), ())):
        with pytest.raises(ValueError, match="at least one prompt token and one response token"):
            collate([EXAMPLES[0], example])


@given(lengths=st.lists(st.integers(1, 60), max_size=40), limit=st.integers(1, 200))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_token_batches_cover_all_rows_once_within_the_limit(lengths: list[int], limit: int) -> None:
    groups = token_batches(lengths, limit)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert len(group) == 1 or max(lengths[row] for row in group) * len(group) <= limit
    ends = [(min(lengths[row] for row in group), max(lengths[row] for row in group)) for group in groups]
    assert all(before[1] <= after[0] for before, after in pairwise(ends))  # similar lengths together
    assert groups == token_batches(lengths, limit)


def test_token_batches_fill_up_to_the_limit() -> None:
    assert token_batches([10, 10, 10, 10], 20) == [[0, 1], [2, 3]]
    assert token_batches([10, 10, 10, 10], 40) == [[0, 1, 2, 3]]
    assert token_batches([50, 3, 9], 1) == [[1], [2], [0]]
    assert token_batches([], 10) == []


def test_epoch_order_is_a_seeded_permutation() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = epoch_order(50, generator), epoch_order(50, generator)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert first == epoch_order(50, torch.Generator().manual_seed(3))
