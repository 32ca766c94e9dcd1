"""Runs plans: the one place where plan values become tensors and tensors become tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from engine.grammar_masks import GrammarMasks, Masks, forbid
from engine.graphs import Capture, DecodeGraphs
from engine.inputs import InputBuilder, SampledRows
from engine.launched import LaunchedStep
from engine.logit_rules import apply_rules
from engine.logprobs import prompt_rows, score, score_prompt
from engine.readback import Reader
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
from scheduler.plan import StepPlan, StepResult


class Runner:
    """A model, its KV pages, and the per-slot state.

    Attributes:
        host: KV pages in host memory, where there are any; disk: the tier below them.
        graphs: captured decode steps, where there are any.
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
        self.graphs: DecodeGraphs | None = None
        self._reader = Reader(device)
        self._no_tokens = torch.zeros(0, dtype=torch.int64, device=device)

    def run(self, plan: StepPlan) -> StepResult:
        """Computes one plan and reads its sampled tokens back."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Hands one plan to the device. On a GPU nothing here waits for it, except that where a
        grammar holds somebody, the tokens of the step before are awaited ahead of sampling."""
        self.state.apply(plan)
        self.grammars.admit(plan)
        filling = self.grammars.begin(plan)
        if plan.disk_copies:
            self._copy_with_disk(plan.disk_copies)
        if plan.copies:
            self._copy(plan.copies)
        if not plan.scheduled:
            return LaunchedStep(plan.id, self._reader.send([self._no_tokens]))
        graphs = self.graphs if self.graphs is not None and self.graphs.serves(plan) else None
        hidden, sampled, prompts, told = self._forward(plan, graphs)
        if not sampled.host_slots:
            sent = self._reader.send([self._no_tokens, *told])
            return LaunchedStep(plan.id, sent, prompts=prompts)
        masks = filling.result() if filling else None
        kind = self.state.kind(sampled.host_slots) if masks is None else None
        asked: dict[int, int] = {}
        scores: Iterable[Tensor] = ()
        if graphs is not None and kind is not None:
            tokens = graphs.sample(len(sampled.host_slots), kind)
        elif kind == "greedy":
            tokens = self._remember(self.model.likeliest(hidden), sampled)
        else:
            traits = self.state.traits(sampled.host_slots, sampled.host_at)
            tokens, logits = self._sample(hidden, sampled, traits, masks)
            asked, scores = self._score(logits, tokens, traits)
        sent = self._reader.send([tokens, *scores, *told])
        self.grammars.take(plan, sent)
        return LaunchedStep(plan.id, sent, asked, prompts, masks.broken if masks else {})

    @torch.inference_mode()
    def capture_decodes(self, capture: Capture, sizes: list[int]) -> None:
        """From now on, steps of decodes alone are replayed, padded to one of `sizes`."""
        self.graphs = DecodeGraphs(self.model, self.inputs, capture, sizes)

    def _forward(
        self, plan: StepPlan, graphs: DecodeGraphs | None
    ) -> tuple[Tensor, SampledRows, list[tuple[int, int]], Iterable[Tensor]]:
        """Hidden states [rows, hidden_size] of the rows to sample, and what `_score_prompts` has
        to say of the others."""
        if graphs is not None:
            return *graphs.forward(plan), [], ()
        inputs = self.inputs.build(plan)
        hidden = self.model(inputs.token_ids, inputs.context)
        told = self._score_prompts(plan, hidden)
        if inputs.wanted.shape[0] != hidden.shape[0]:
            hidden = hidden[inputs.wanted]
        return hidden, inputs.sampled, *told

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
        self, hidden: Tensor, rows: SampledRows, traits: Traits, masks: Masks | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens int64 [rows], and the model's own logits [rows, vocab]."""
        logits = self.model.logits(hidden)
        state, slots = self.state, rows.slots
        ruled = apply_rules(logits, state, slots, rows.at, traits)
        if masks is not None:
            held = state.to_device(masks.rows, torch.int64)
            ruled = forbid(ruled, held, state.move(torch.from_numpy(masks.bits)))
        tokens = sample(ruled, state, slots, traits, rows.uniforms)
        return self._remember(tokens, rows), logits

    def _remember(self, tokens: Tensor, rows: SampledRows) -> Tensor:
        """Puts tokens where the next step finds them; returns them."""
        self.inputs.rows.put(rows.slots, rows.at, tokens)
        return tokens

    def _score(
        self, logits: Tensor, tokens: Tensor, traits: Traits
    ) -> tuple[dict[int, int], Iterable[Tensor]]:
        """The rows that ask for log-probabilities, and of how many tokens; what they are told."""
        asked = traits["logprobs"]
        rows = np.flatnonzero(asked >= 0).tolist()
        if not rows:
            return {}, ()
        chosen = self.state.to_device(rows, torch.int64)
        told = score(logits[chosen], tokens[chosen], int(asked.max()))
        return dict(zip(rows, asked[rows].tolist(), strict=True)), told

    def _score_prompts(
        self, plan: StepPlan, hidden: Tensor
    ) -> tuple[list[tuple[int, int]], Iterable[Tensor]]:
        """The sequences that tell of their prompts, as in `LaunchedStep`, and what they tell."""
        items = [item for item in plan.scheduled if item.num_scored]
        if not items:
            return [], ()
        state = self.state
        where = state.to_device(prompt_rows(plan).ravel().tolist(), torch.int64)
        rows, slots, positions = where.view(3, -1)
        following = state.tokens[slots, positions + 1].long()
        counts = [item.num_scored for item in items]
        most = state.traits([item.slot for item in items], counts)["prompt_logprobs"].tolist()
        told = score_prompt(hidden[rows], self.model.logits, following, max(most))
        return list(zip(counts, most, strict=True)), told


def _pages(storage: KVStorage, layout: KVLayout) -> tuple[Pages, ...]:
    """Per layer, what the kernels take."""
    if not layout.format.quantized:
        return storage.pages
    name, size = layout.format.dtype, layout.block_size
    return tuple(QuantizedPages(tiles, name, size, layout.head_dim) for tiles in storage.pages)
