"""Runs plans: the one place where plan values become tensors and tensors become tokens."""

from __future__ import annotations

import torch

from engine.inputs import InputBuilder, StepInputs
from engine.sampler import sample
from engine.state import SlotState
from kernels.dispatch import Backend
from kernels.pages import Pages, QuantizedPages
from models.decoder import CausalLM
from paged_cache.layout import KVLayout
from paged_cache.manager import BlockCopy
from paged_cache.storage import KVStorage
from scheduler.plan import StepPlan, StepResult


class Runner:
    """A model, its KV pages, and the per-slot state."""

    def __init__(
        self,
        model: CausalLM,
        layout: KVLayout,
        backend: Backend,
        *,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.storage = KVStorage(layout, device)
        self.state = SlotState(
            max_num_seqs, max_model_len, layout.block_size, device, len(layout.groups)
        )
        layer_groups = tuple(group for group, _ in layout.places)
        self.inputs = InputBuilder(
            self.state, _pages(self.storage, layout), layer_groups, layout.block_size, backend
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Computes one plan and reads its sampled tokens back."""
        self.state.apply(plan)
        if plan.copies:
            self._copy(plan.copies)
        inputs = self.inputs.build(plan)
        hidden = self.model(inputs.token_ids, inputs.context)
        if not inputs.sampled_rows.shape[0]:
            return StepResult(plan.id, [])
        return StepResult(plan.id, self._sample(plan, inputs, hidden))

    def _copy(self, copies: list[BlockCopy]) -> None:
        """All copies of a step at once; no block is both read and written."""
        source = self.state.to_device([copy.src for copy in copies], torch.int64)
        target = self.state.to_device([copy.dst for copy in copies], torch.int64)
        self.inputs.backend.copy_blocks(self.storage.blocks, source, target)

    def _sample(self, plan: StepPlan, inputs: StepInputs, hidden: torch.Tensor) -> list[int]:
        if inputs.sampled_rows.shape[0] != hidden.shape[0]:
            hidden = hidden[inputs.sampled_rows]
        logits = self.model.logits(hidden)
        state = self.state
        host = [state.sampling[item.slot] for item in plan.scheduled if item.wants_token]
        tokens = sample(logits, state, inputs.sampled_slots, host, inputs.uniforms)
        state.tokens[inputs.sampled_slots, inputs.sampled_at] = tokens.int()
        return tokens.tolist()  # type: ignore[no-any-return]


def _pages(storage: KVStorage, layout: KVLayout) -> tuple[Pages, ...]:
    """Per layer, what the kernels take."""
    if not layout.format.quantized:
        return storage.pages
    name, size = layout.format.dtype, layout.block_size
    return tuple(QuantizedPages(tiles, name, size, layout.head_dim) for tiles in storage.pages)
