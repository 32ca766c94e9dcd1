"""The compiled gathering of a step's inputs, beside the one of torch."""

from __future__ import annotations

from array import array

import pytest
import torch
from torch import Tensor

from kernels import cpu_slots, slots
from kernels.slots import StepRows, StepShape

SLOTS, LENGTH = 9, 300


@pytest.fixture(params=[(1, 16), (1, 1), (3, 16), (2, 7)], ids=str)
def state(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, int]:
    """Tokens, block tables and block size; every entry of them is another number."""
    torch.manual_seed(0)
    groups, block_size = request.param
    tokens = torch.randperm(SLOTS * LENGTH, dtype=torch.int32).view(SLOTS, LENGTH)
    blocks = -(-LENGTH // block_size)
    tables = torch.randperm(groups * SLOTS * blocks, dtype=torch.int32)
    return tokens, tables.view(groups, SLOTS, blocks), block_size


def step(counts: list[int], share_sampled: float) -> tuple[array[int], StepShape]:
    """A random step of sequences with so many new tokens, decodes first."""
    seqs = len(counts)
    places = torch.randperm(SLOTS)[:seqs].tolist()
    starts = [int(torch.randint(LENGTH - count + 1, ())) for count in counts]
    sampled = torch.where(torch.rand(seqs) < share_sampled)[0].tolist()
    plan = array("q", [*places, *starts, *counts, *sampled])
    plan.frombytes(array("d", torch.rand(len(sampled)).tolist()).tobytes())
    longest = max(start + count for start, count in zip(starts, counts, strict=True))
    return plan, StepShape(seqs, counts.count(1), sum(counts), len(sampled), longest)


def assert_same(found: StepRows, wanted: StepRows) -> None:
    for name in ("token_ids", "positions", "context_lens", "query_start", "wanted", "slots", "at"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        assert getattr(found, name).dtype == getattr(wanted, name).dtype, name
    assert torch.equal(found.uniforms, wanted.uniforms)
    for table, right in zip(found.block_tables, wanted.block_tables, strict=True):
        assert table.dtype == right.dtype and torch.equal(table[:, : right.shape[1]], right)
    for mapping, right in zip(found.slot_mapping, wanted.slot_mapping, strict=True):
        assert torch.equal(mapping.long(), right)


@pytest.mark.parametrize("share_sampled", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "kind", ["one decode", "decodes", "one prompt", "prompts", "decodes and prompts"]
)
def test_a_gathered_step_is_that_of_torch(
    state: tuple[Tensor, Tensor, int], kind: str, share_sampled: float
) -> None:
    compiled, plain = cpu_slots.SlotRows(*state), slots.SlotRows(*state)
    for _ in range(8):
        decodes, prompts = torch.randint(1, 5, (2,)).tolist()
        chunks = torch.randint(2, 130, (prompts,)).tolist()
        counts = {
            "one decode": [1],
            "decodes": [1] * decodes,
            "one prompt": chunks[:1],
            "prompts": chunks,
            "decodes and prompts": [1] * decodes + chunks,
        }[kind]
        gathered = step(counts, share_sampled)
        assert_same(compiled.gather(*gathered), plain.gather(*gathered))


def test_steps_of_one_shape_follow_each_other(state: tuple[Tensor, Tensor, int]) -> None:
    compiled, plain = cpu_slots.SlotRows(*state), slots.SlotRows(*state)
    for counts in ([1], [1], [1, 40], [1, 1], [1, 40], [1], [2], [1, 1]):
        state[0].random_(1000)  # what the steps before wrote
        state[1].random_(1000)
        gathered = step(counts, 1.0)
        assert_same(compiled.gather(*gathered), plain.gather(*gathered))


def test_tokens_are_put_where_the_next_step_finds_them(state: tuple[Tensor, Tensor, int]) -> None:
    tokens, tables, block_size = state
    wanted = tokens.clone()
    places, at = torch.tensor([3, 0, 8]), torch.tensor([0, LENGTH - 1, 17])
    values = torch.tensor([5, 131071, 0])
    slots.SlotRows(wanted, tables, block_size).put(places, at, values)
    cpu_slots.SlotRows(*state).put(places, at, values)
    assert torch.equal(tokens, wanted) and tokens[0, -1] == 131071
