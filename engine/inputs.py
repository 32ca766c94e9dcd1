"""From a plan and the device state to the tensors of one forward pass."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.state import SlotState
from kernels.dispatch import Backend
from kernels.pages import Pages
from kernels.slots import StepShape
from models.context import ForwardContext, GroupTables
from scheduler.plan import StepPlan


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows of a step whose next token is sampled, in the plan's order.

    Attributes:
        slots: int64 [rows]
        at: int64 [rows]; the position that the sampled token will have
        uniforms: float64 [rows]
        host_slots, host_at: the same two on the host
    """

    slots: Tensor
    at: Tensor
    uniforms: Tensor
    host_slots: list[int]
    host_at: list[int]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, gathered.

    Attributes:
        token_ids: int64 [tokens]
        wanted: int64 [rows]; which tokens are the `sampled` ones
    """

    token_ids: Tensor
    context: ForwardContext
    wanted: Tensor
    sampled: SampledRows


class InputBuilder:
    """Turns plans into `StepInputs`. Holds what never changes between steps."""

    def __init__(
        self,
        state: SlotState,
        pages: tuple[Pages, ...],
        layer_groups: tuple[int, ...],
        block_size: int,
        backend: Backend,
    ) -> None:
        self.state = state
        self.pages = pages
        self.layer_groups = layer_groups
        self.block_size = block_size
        self.backend = backend
        self.rows = backend.slots(state.tokens, state.block_tables, block_size)
        self._no_chunks = torch.zeros(1, dtype=torch.int32, device=state.device)

    def build(self, plan: StepPlan) -> StepInputs:
        """Gathers the inputs of `plan`, whose admissions and blocks `state` already took in. They
        are valid until the next plan's."""
        items = plan.scheduled
        slots = [item.slot for item in items]
        counts = [item.count for item in items]
        ends = [item.start + item.count for item in items]
        wanted = [row for row, item in enumerate(items) if item.wants_token]
        numbers = array("q", [*slots, *[item.start for item in items], *counts, *wanted])
        numbers.frombytes(array("d", [items[row].uniform for row in wanted]).tobytes())
        decodes, longest = counts.count(1), max(ends)
        # Who tells of a prompt needs the results of its rows, too.
        all_rows = len(wanted) == sum(counts) or any(item.num_scored for item in items)
        rows = self.rows.gather(
            numbers, StepShape(len(items), decodes, sum(counts), len(wanted), longest)
        )
        return StepInputs(
            token_ids=rows.token_ids,
            context=ForwardContext(
                positions=rows.positions,
                context_lens=rows.context_lens,
                query_start=rows.query_start,
                num_decodes=decodes,
                max_query_len=max(counts),
                max_context_len=longest,
                groups=tuple(map(GroupTables, rows.block_tables, rows.slot_mapping)),
                layer_groups=self.layer_groups,
                pages=self.pages,
                backend=self.backend,
                wanted=None if all_rows else rows.wanted,
            ),
            wanted=rows.wanted,
            sampled=SampledRows(
                rows.slots,
                rows.at,
                rows.uniforms,
                [slots[row] for row in wanted],
                [ends[row] for row in wanted],
            ),
        )

    def decodes(self, slots: Tensor, starts: Tensor) -> tuple[Tensor, ForwardContext]:
        """Token ids and context of one token of each slot, from device tensors alone.

        Args:
            slots: int64 [seqs]
            starts: int64 [seqs]; the position of the token, -1 where nothing is to be attended to
                and stored
        """
        state, count = self.state, len(slots)
        positions = starts.clamp_min(0)
        places, offsets = positions // self.block_size, positions % self.block_size
        return state.tokens[slots, positions].long(), ForwardContext(
            positions=positions,
            context_lens=(starts + 1).int(),
            query_start=self._no_chunks,
            num_decodes=count,
            max_query_len=1,
            max_context_len=state.max_blocks * self.block_size,
            groups=tuple(
                GroupTables(
                    block_tables=table[slots],
                    slot_mapping=torch.where(
                        starts >= 0, table[slots, places] * self.block_size + offsets, -1
                    ),
                )
                for table in state.block_tables
            ),
            layer_groups=self.layer_groups,
            pages=self.pages,
            backend=self.backend,
        )
