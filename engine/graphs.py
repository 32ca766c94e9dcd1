"""Decode steps as CUDA graphs: launching one takes as long as launching a single kernel.

A graph is a recording of kernels and of the addresses that they work on, without the Python between
them. So everything that differs from step to step is read from tensors that stay where they are:
the rows of `SlotState`, and here the slots of a step.

    rows      | slot 5 | slot 0 | slot 2 | none | none | ...    up to the next of the sizes
    starts    |     41 |      7 |    900 |   -1 |   -1 |        that were captured

A row without a sequence has a slot of its own in the state that belongs to nobody; it attends to
nothing and stores no keys and values.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.inputs import InputBuilder, SampledRows
from engine.sampler import sample
from engine.state import KINDS, TRAITS, Kind, Traits
from models.decoder import CausalLM
from scheduler.plan import ScheduledSeq, StepPlan


class Capture(Protocol):
    """Records what a function launches."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Calls `run` and returns what launches the same again, on the same tensors, without
        running its Python."""


class CudaCapture:
    """CUDA graphs, all in one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            run()  # what is compiled or allocated at first use must not be in the recording
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        return graph.replay  # type: ignore[no-any-return]


def batch_sizes(most: int) -> list[int]:
    """Sizes that steps of up to `most` sequences are padded to; denser where a row costs more."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, most, 16)]
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """The forward pass of every size, and the sampling of every size and kind.

    All of them are captured at once, the largest first, whose memory the others then share;
    nothing is ever captured later.
    """

    def __init__(
        self, model: CausalLM, inputs: InputBuilder, capture: Capture, sizes: list[int]
    ) -> None:
        self._model, self._inputs, self._state = model, inputs, inputs.state
        self._sizes = sizes
        device, most = self._state.device, sizes[-1]
        self._rows = torch.zeros(3 * most, dtype=torch.int64, device=device)
        embedding = model.embed.weight
        self._hidden = torch.zeros(most, embedding.shape[1], dtype=embedding.dtype, device=device)
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self._forward: dict[int, Callable[[], None]] = {}
        self._sample: dict[tuple[int, Kind], Callable[[], None]] = {}
        for size in reversed(sizes):
            self._load(size, [])
            self._forward[size] = capture(lambda size=size: self._run_model(size))
            for kind in KINDS:
                traits = self._traits(size, kind)
                self._sample[size, kind] = capture(
                    lambda size=size, traits=traits: self._run_sampler(size, traits)
                )

    def serves(self, plan: StepPlan) -> bool:
        """Whether the step computes one token of each sequence, and samples the next."""
        items = plan.scheduled
        return len(items) <= self._sizes[-1] and all(
            item.count == 1 and item.wants_token for item in items
        )

    def forward(self, plan: StepPlan) -> tuple[Tensor, SampledRows]:
        """Hidden states [sequences, hidden_size], valid until the next step, and their rows."""
        items = plan.scheduled
        count, size = len(items), self._size(len(items))
        self._load(size, items)
        self._forward[size]()
        slots, starts, bits = self._rows[: 3 * size].view(3, size)[:, :count]
        return self._hidden[:count], SampledRows(
            slots,
            starts + 1,
            bits.view(torch.float64),
            [item.slot for item in items],
            [item.start + 1 for item in items],
        )

    def sample(self, count: int, kind: Kind) -> Tensor:
        """The tokens of the `count` rows of the last `forward`: int64 [count]."""
        self._sample[self._size(count), kind]()
        return self._tokens[:count].clone()  # the next step writes there while this is read

    def _size(self, count: int) -> int:
        return self._sizes[bisect.bisect_left(self._sizes, count)]

    def _load(self, size: int, items: list[ScheduledSeq]) -> None:
        """Slots, positions and random numbers of a step, in one copy."""
        host = torch.empty(3 * size, dtype=torch.int64)
        slots, starts, bits = host.numpy().reshape(3, size)
        count = len(items)
        slots[:count] = [item.slot for item in items]
        starts[:count] = [item.start for item in items]
        bits.view(np.float64)[:count] = [item.uniform for item in items]
        slots[count:], starts[count:], bits[count:] = self._state.nobody, -1, 0
        self._rows[: 3 * size].copy_(self._state.pin(host), non_blocking=True)

    # ------------------------------------------------------------------ what is captured

    def _run_model(self, size: int) -> None:
        slots, starts, _ = self._rows[: 3 * size].view(3, size)
        token_ids, context = self._inputs.decodes(slots, starts)
        self._hidden[:size].copy_(self._model(token_ids, context))

    def _run_sampler(self, size: int, traits: Traits) -> None:
        slots, starts, bits = self._rows[: 3 * size].view(3, size)
        logits = self._model.logits(self._hidden[:size])
        tokens = sample(logits, self._state, slots, traits, bits.view(torch.float64))
        self._state.tokens[slots, starts + 1] = tokens.int()
        self._tokens[:size].copy_(tokens)

    def _traits(self, size: int, kind: Kind) -> Traits:
        """Of rows of which nothing is known but the kind."""
        traits = np.zeros(size, TRAITS)
        traits["greedy"] = kind == "greedy"
        traits["filtered"] = kind == "filtered"
        traits["top_k"] = self._model.config.vocab_size
        return traits
