"""Ragged batches over a paged cache, and a driver that walks sequences through a decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.dispatch import Backend
from models.context import ForwardContext, GroupTables
from models.decoder import CausalLM


@dataclass
class Cache:
    """Pages of one pool, handed out in shuffled order; block 0 is never used."""

    model: CausalLM
    backend: Backend
    block_size: int
    dtype: torch.dtype
    num_blocks: int = 128
    seed: int = 0
    tables: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.model
        shape = (2, self.num_blocks, model.kv_heads, self.block_size, model.head_dim)
        # Unused slots hold garbage on purpose: nothing may read them.
        self.pages = tuple(
            torch.full(shape, 1e3, dtype=self.dtype) for _ in range(model.num_layers)
        )
        order = torch.randperm(
            self.num_blocks - 1, generator=torch.Generator().manual_seed(self.seed)
        )
        self.free = (order + 1).tolist()

    def context(self, chunks: list[tuple[int, int, int]]) -> ForwardContext:
        """The batch of (sequence, start, count); sequences of one token must come first."""
        counts = [count for _, _, count in chunks]
        decodes = sum(count == 1 for count in counts)
        assert all(count > 1 for count in counts[decodes:])
        positions, slots = [], []
        for sequence, start, count in chunks:
            table = self.tables.setdefault(sequence, [])
            while len(table) * self.block_size < start + count:
                table.append(self.free.pop())
            for position in range(start, start + count):
                positions.append(position)
                block, offset = divmod(position, self.block_size)
                slots.append(table[block] * self.block_size + offset)
        lengths = [start + count for _, start, count in chunks]
        width = max(len(self.tables[sequence]) for sequence, _, _ in chunks)
        rows = [self.tables[s] + [0] * (width - len(self.tables[s])) for s, _, _ in chunks]
        starts = torch.tensor([0, *counts[decodes:]]).cumsum(0)
        return ForwardContext(
            positions=torch.tensor(positions),
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            query_start=starts.to(torch.int32),
            num_decodes=decodes,
            max_query_len=max([1, *counts[decodes:]]),
            max_context_len=max(lengths),
            groups=(GroupTables(torch.tensor(rows, dtype=torch.int32), torch.tensor(slots)),),
            layer_groups=(0,) * self.model.num_layers,
            pages=self.pages,
            backend=self.backend,
        )


def run(
    model: CausalLM,
    cache: Cache,
    prompts: list[Tensor],
    steps: list[list[tuple[int, int, int]]],
) -> list[Tensor]:
    """Walks through the steps, each a batch of (sequence, start, count).

    Returns the logits of all positions, float32 [len(prompt), vocab_size] per prompt; positions
    that no step computed are zero.
    """
    logits = [torch.zeros(len(prompt), model.config.vocab_size) for prompt in prompts]
    for chunks in steps:
        tokens = torch.cat([prompts[s][start : start + count] for s, start, count in chunks])
        rows = model.logits(model.forward(tokens, cache.context(chunks)))
        for (sequence, start, count), part in zip(
            chunks, rows.split([count for _, _, count in chunks]), strict=True
        ):
            logits[sequence][start : start + count] = part
    return logits
