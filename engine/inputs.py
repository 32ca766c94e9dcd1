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
class StepInputs:
    """One step, gathered.

    Attributes:
        token_ids: int64 [tokens]
        sampled_rows: int64 [wanted]; rows whose next token is sampled, in the plan's order
        sampled_slots: int64 [wanted]
        sampled_at: int64 [wanted]; the position that the sampled token will have
        uniforms: float64 [wanted]
        traits: of the sampled rows
    """

    token_ids: Tensor
    context: ForwardContext
    sampled_rows: Tensor
    sampled_slots: Tensor
    sampled_at: Tensor
    uniforms: Tensor
    traits: Traits


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
            sampled_rows=(ends - 1)[chosen],
            sampled_slots=slots[chosen],
            sampled_at=(starts + counts)[chosen],
            uniforms=state.to_device(
                [item.uniform for item in items if item.wants_token], torch.float64
            ),
            traits=traits,
        )
