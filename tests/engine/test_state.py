"""Rows of the slots as plans change them."""

from __future__ import annotations

import torch

from engine.state import SlotState
from scheduler.plan import Admitted, SlotBlocks, StepPlan
from scheduler.request import SamplingParams


def test_rows_are_filled_the_same_in_one_operation_of_a_device() -> None:
    sampling = SamplingParams()
    plan = StepPlan(
        0,
        admitted=[Admitted(3, list(range(100, 140)), 40, sampling), Admitted(0, [7], 1, sampling)],
        new_blocks=[
            SlotBlocks(3, 0, 0, [5, 9, 2]),
            SlotBlocks(3, 1, 2, [4]),
            SlotBlocks(0, 1, 0, [1, 8]),
        ],
    )
    one_by_one, at_once = (SlotState(4, 64, 16, torch.device("cpu"), 2) for _ in range(2))
    at_once._scatter = at_once._scatter_at_once  # type: ignore[method-assign]
    for state in (one_by_one, at_once):
        state.apply(plan)
        assert state.tokens[3, :40].tolist() == list(range(100, 140)) and state.tokens[0, 0] == 7
        assert state.tokens.count_nonzero() == 41
    expected = torch.zeros(2, 5, 4, dtype=torch.int32)
    expected[0, 3, :3] = torch.tensor([5, 9, 2])
    expected[1, 3, 2] = 4
    expected[1, 0, :2] = torch.tensor([1, 8])
    assert one_by_one.block_tables.equal(expected) and at_once.block_tables.equal(expected)
