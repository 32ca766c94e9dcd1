"""From a plan and the device state to the tensors of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.state import SlotState, Traits
from kernels.dispatch import Backend
from kernels.pages import Pages
from models.context import ForwardContext, GroupTables
from scheduler.plan import StepPlan


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows of a step whose next token is sampled, in the plan's order.

    Attributes:
        slots: int64 [rows]
        at: int64 [rows]; the position that the sampled token will have
        uniforms: float64 [rows]
        traits: [rows], on the host
    """

    slots: Tensor
    at: Tensor
    uniforms: Tensor
    traits: Traits


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
        self._no_chunks = torch.zeros(1, dtype=torch.int32, device=state.device)

    def build(self, plan: StepPlan) -> StepInputs:
        """Gathers the inputs of `plan`, whose admissions and blocks `state` already took in."""
        state, items = self.state, plan.scheduled
        counts_host = [item.count for item in items]
        ends_host = [item.start + item.count for item in items]
        num_decodes = sum(count == 1 for count in counts_host)
        packed = state.to_device(
            [item.slot for item in items] + [item.start for item in items] + counts_host,
            torch.int64,
        )
        slots, starts, counts = packed.view(3, len(items))
        ends = torch.cumsum(counts, 0)  # row after each sequence's last
        if num_decodes == len(items):
            row_slots, positions = slots, starts
        else:
            row_slots = torch.repeat_interleave(slots, counts, output_size=plan.num_tokens)
            # position = row - first row of the sequence + its start
            shift = torch.repeat_interleave(
                starts - (ends - counts), counts, output_size=plan.num_tokens
            )
            positions = torch.arange(plan.num_tokens, device=state.device) + shift
        places, offsets = positions // self.block_size, positions % self.block_size
        max_context_len = max(ends_host)
        width = -(-max_context_len // self.block_size)
        wanted = [row for row, item in enumerate(items) if item.wants_token]
        traits = state.traits([items[row].slot for row in wanted], [ends_host[r] for r in wanted])
        chosen = slice(None) if len(wanted) == len(items) else state.to_device(wanted, torch.int64)
        query_start = torch.nn.functional.pad(ends[num_decodes:] - num_decodes, (1, 0))
        return StepInputs(
            token_ids=state.tokens[row_slots, positions].long(),
            context=ForwardContext(
                positions=positions,
                context_lens=(starts + counts).int(),
                query_start=query_start.int(),
                num_decodes=num_decodes,
                max_query_len=max(counts_host),
                max_context_len=max_context_len,
                groups=tuple(
                    GroupTables(
                        block_tables=table[slots, :width],
                        slot_mapping=table[row_slots, places] * self.block_size + offsets,
                    )
                    for table in state.block_tables
                ),
                layer_groups=self.layer_groups,
                pages=self.pages,
                backend=self.backend,
            ),
            wanted=(ends - 1)[chosen],
            sampled=SampledRows(
                slots[chosen],
                (starts + counts)[chosen],
                state.to_device(
                    [item.uniform for item in items if item.wants_token], torch.float64
                ),
                traits,
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
