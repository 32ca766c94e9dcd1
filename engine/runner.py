"""Runs plans: the one place where plan values become tensors and tensors become tokens."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from engine.grammar_masks import GrammarMasks, Masks, forbid
from engine.inputs import InputBuilder, StepInputs
from engine.logit_rules import apply_rules
from engine.logprobs import prompt_rows, score, score_prompt
from engine.sampler import sample
from engine.state import SlotState, Traits
from kernels.dispatch import Backend
from kernels.pages import Pages, QuantizedPages
from models.decoder import CausalLM
from paged_cache.block_copy import BlockCopy, DiskCopy
from paged_cache.disk_tier import DiskTier
from paged_cache.host_pages import host_pages
from paged_cache.layout import KVLayout
from paged_cache.storage import KVStorage
from scheduler.plan import Scores, StepPlan, StepResult


class Runner:
    """A model, its KV pages, and the per-slot state.

    Attributes:
        host: KV pages in host memory, where there are any; disk: the tier below them.
    """

    def __init__(
        self,
        model: CausalLM,
        layout: KVLayout,
        backend: Backend,
        *,
        max_num_seqs: int,
        max_model_len: int,
        grammars: GrammarMasks,
        device: torch.device,
        num_host_blocks: int = 0,
        disk: DiskTier | None = None,
    ) -> None:
        self.model = model
        self.grammars = grammars
        self.storage = KVStorage(layout, device)
        self.host = host_pages(self.storage, num_host_blocks, backend) if num_host_blocks else None
        self.disk = disk
        self.state = SlotState(
            max_num_seqs,
            max_model_len,
            layout.block_size,
            device,
            len(layout.groups),
            tuple(model.config.eos_token_ids),
        )
        layer_groups = tuple(group for group, _ in layout.places)
        self.inputs = InputBuilder(
            self.state, _pages(self.storage, layout), layer_groups, layout.block_size, backend
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Computes one plan and reads its sampled tokens back."""
        self.state.apply(plan)
        self.grammars.admit(plan)
        filling = self.grammars.begin(plan)
        if plan.disk_copies:
            self._copy_with_disk(plan.disk_copies)
        if plan.copies:
            self._copy(plan.copies)
        if not plan.scheduled:
            return StepResult(plan.id, [])
        inputs = self.inputs.build(plan)
        hidden = self.model(inputs.token_ids, inputs.context)
        prompt_scores = self._score_prompts(plan, hidden)
        if not inputs.sampled_rows.shape[0]:
            return StepResult(plan.id, [], prompt_scores=prompt_scores)
        masks = filling.result() if filling else None
        tokens, scores = self._sample(inputs, hidden, masks)
        self.grammars.take(plan, tokens)
        return StepResult(
            plan.id, tokens, scores, prompt_scores, broken=masks.broken if masks else {}
        )

    def _copy_with_disk(self, copies: list[DiskCopy]) -> None:
        """What leaves a slot before what comes into one; `copies` are in that order."""
        assert self.host is not None and self.disk is not None
        for copy in copies:
            if copy.kind == "to_disk":
                self.disk.save(copy.key, self.host.read(copy.slot))
            else:
                self.host.write(copy.slot, self.disk.take(copy.key))

    def _copy(self, copies: list[BlockCopy]) -> None:
        """All copies of a kind at once, in the order of the kinds (`StepPlan`)."""
        if self.host is not None:
            self.host.to_host([copy for copy in copies if copy.kind == "to_host"])
            self.host.to_device([copy for copy in copies if copy.kind == "to_device"])
        cow = [copy for copy in copies if copy.kind == "cow"]
        if cow:
            source = self.state.to_device([copy.src for copy in cow], torch.int64)
            target = self.state.to_device([copy.dst for copy in cow], torch.int64)
            self.inputs.backend.copy_blocks(self.storage.blocks, source, target)

    def _sample(
        self, inputs: StepInputs, hidden: Tensor, masks: Masks | None
    ) -> tuple[list[int], list[Scores | None]]:
        if inputs.sampled_rows.shape[0] != hidden.shape[0]:
            hidden = hidden[inputs.sampled_rows]
        logits = self.model.logits(hidden)
        state, slots, at = self.state, inputs.sampled_slots, inputs.sampled_at
        ruled = apply_rules(logits, state, slots, at, inputs.traits)
        if masks is not None:
            rows = state.to_device(masks.rows, torch.int64)
            ruled = forbid(ruled, rows, state.move(torch.from_numpy(masks.bits)))
        tokens = sample(ruled, state, slots, inputs.traits, inputs.uniforms)
        state.tokens[slots, at] = tokens.int()
        return tokens.tolist(), self._score(logits, tokens, inputs.traits)

    def _score(self, logits: Tensor, tokens: Tensor, traits: Traits) -> list[Scores | None]:
        """The log-probabilities of each row that asked for them; [] where none did."""
        asked = traits["logprobs"]
        rows = np.flatnonzero(asked >= 0).tolist()
        if not rows:
            return []
        chosen = self.state.to_device(rows, torch.int64)
        told = score(logits[chosen], tokens[chosen], int(asked.max()))
        scores: list[Scores | None] = [None] * len(asked)
        for place, row in enumerate(rows):
            scores[row] = told.cut(place, 1, int(asked[row]))
        return scores

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> list[Scores]:
        """The log-probabilities of prompt tokens, for each sequence of the plan that tells some."""
        items = [item for item in plan.scheduled if item.num_scored]
        if not items:
            return []
        state = self.state
        where = state.to_device(prompt_rows(plan).ravel().tolist(), torch.int64)
        rows, slots, positions = where.view(3, -1)
        following = state.tokens[slots, positions + 1].long()
        counts = [item.num_scored for item in items]
        most = state.traits([item.slot for item in items], counts)["prompt_logprobs"].tolist()
        told = score_prompt(hidden[rows], self.model.logits, following, max(most))
        firsts = itertools.accumulate(counts, initial=0)
        return [told.cut(f, n, k) for f, n, k in zip(firsts, counts, most, strict=False)]


def _pages(storage: KVStorage, layout: KVLayout) -> tuple[Pages, ...]:
    """Per layer, what the kernels take."""
    if not layout.format.quantized:
        return storage.pages
    name, size = layout.format.dtype, layout.block_size
    return tuple(QuantizedPages(tiles, name, size, layout.head_dim) for tiles in storage.pages)
