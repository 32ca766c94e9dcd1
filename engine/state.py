"""What the device remembers of every running sequence, one row per slot."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from scheduler.plan import StepPlan
from scheduler.request import SamplingParams


class SlotState:
    """Rows of device tensors that steps gather from, so that no step moves a sequence's data.

    A preempted sequence simply loses its row: coming back means filling one again.

    Attributes:
        tokens: int32 [slots, max_model_len]; ids so far. The sampler writes the newest one here,
            where the next step finds it without a round trip to the host.
        block_tables: int32 [groups, slots, max_blocks]
        temperature, top_p, min_p: float32 [slots]; top_k: int64 [slots], 0 where off
        sampling: the same on the host, to choose the sampler's path without reading the device.
    """

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        num_groups: int = 1,
    ) -> None:
        self.device = device
        self.max_blocks = -(-max_model_len // block_size)
        self.tokens = torch.zeros(num_slots, max_model_len, dtype=torch.int32, device=device)
        shape = (num_groups, num_slots, self.max_blocks)
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(num_slots, device=device)
        self.top_p = torch.ones(num_slots, device=device)
        self.min_p = torch.zeros(num_slots, device=device)
        self.top_k = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.sampling = [SamplingParams()] * num_slots

    def to_device(self, values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        """A host list as a device tensor, without waiting for the device."""
        return self._move(torch.tensor(values, dtype=dtype))

    def _move(self, host: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def apply(self, plan: StepPlan) -> None:
        """Fills the rows of newly admitted sequences and the table entries that changed."""
        if plan.admitted:
            self._admit(plan)
        if plan.new_blocks:
            _, slots, width = self.block_tables.shape
            starts = [(n.group * slots + n.slot) * width + n.first for n in plan.new_blocks]
            self._scatter(self.block_tables, starts, [new.blocks for new in plan.new_blocks])

    def _admit(self, plan: StepPlan) -> None:
        width = self.tokens.shape[1]
        starts = [new.slot * width for new in plan.admitted]
        self._scatter(self.tokens, starts, [new.tokens for new in plan.admitted])
        slots = self.to_device([new.slot for new in plan.admitted], torch.int64)
        params = [new.sampling for new in plan.admitted]
        self.temperature[slots] = self.to_device([p.temperature for p in params], torch.float32)
        self.top_p[slots] = self.to_device([p.top_p for p in params], torch.float32)
        self.min_p[slots] = self.to_device([p.min_p for p in params], torch.float32)
        self.top_k[slots] = self.to_device([max(p.top_k, 0) for p in params], torch.int64)
        for new in plan.admitted:
            self.sampling[new.slot] = new.sampling

    def _scatter(self, rows: Tensor, starts: list[int], pieces: list[list[int]]) -> None:
        """Writes each piece into the flattened `rows` from its start on, in one operation."""
        where = np.concatenate(
            [np.arange(s, s + len(p)) for s, p in zip(starts, pieces, strict=True)]
        )
        values = self.to_device(list(chain.from_iterable(pieces)), torch.int32)
        rows.view(-1)[self._move(torch.from_numpy(where))] = values
