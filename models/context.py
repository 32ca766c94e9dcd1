"""What one forward pass knows about its batch: passed as an argument, never a global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.dispatch import Backend
    from kernels.pages import Pages


@dataclass(frozen=True, slots=True)
class GroupTables:
    """Where the tokens of one KV group (layers that share a block table) live.

    Attributes:
        block_tables: int32 [seqs, max_blocks]
        slot_mapping: int32 or int64 [tokens]; block * block_size + offset; -1 stores nothing
    """

    block_tables: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One ragged batch. Sequences with exactly one token come first (`num_decodes` of them), then
    longer chunks.

        tokens   d0 d1 d2 | p3 p3 p3 p3 | p4 p4      num_decodes = 3
                 rows 0..2   query_start[1] = 4 ...  (query_start counts from the first chunk row)

    Attributes:
        positions: int64 [tokens]; position of each token in its own sequence
        context_lens: int32 [seqs]; tokens of the sequence after this pass
        query_start: int32 [seqs - num_decodes + 1]; row offsets of the chunks, relative to row
            num_decodes
        num_decodes: sequences (and rows) of exactly one token
        max_query_len: longest chunk (1 if there are none)
        max_context_len: largest of context_lens
        groups: one per KV group; `layer_groups[layer]` says which one a layer uses
        pages: per layer [2, num_blocks, kv_heads, block_size, head_dim], or quantized ones
        backend: the attention kernels of this device
        wanted: int64 [rows]; the rows whose results are asked for, None for all
    """

    positions: Tensor
    context_lens: Tensor
    query_start: Tensor
    num_decodes: int
    max_query_len: int
    max_context_len: int
    groups: tuple[GroupTables, ...]
    layer_groups: tuple[int, ...]
    pages: tuple[Pages, ...]
    backend: Backend
    wanted: Tensor | None = None

    def pick(self, rows: Tensor) -> Tensor:
        """Those of all rows [tokens, ...] that are asked for."""
        return rows if self.wanted is None else rows[self.wanted]

    def starts(self) -> Tensor | None:
        """int32 [seqs + 1], the first row of every sequence; None where each has one row."""
        if self.num_decodes == len(self.positions):
            return None
        decodes = torch.arange(self.num_decodes, dtype=torch.int32, device=self.positions.device)
        return torch.cat((decodes, self.query_start + self.num_decodes))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """Stores the new keys and values of `layer`, then attends over everything cached.

        Args:
            query: [tokens, heads, head_dim]
            key, value: [tokens, kv_heads, head_dim]
            window: 0 attends to everything; otherwise position p sees (p - window, p].

        Returns:
            [tokens, heads, head_dim]
        """
        slots = self.groups[self.layer_groups[layer]].slot_mapping
        self.backend.store_kv(key, value, self.pages[layer], slots)
        return self.attend_stored(layer, query, scale=scale, window=window, softcap=softcap)

    def attend_stored(
        self, layer: int, query: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0
    ) -> Tensor:
        """`attend` where the new keys and values are in the pages already."""
        group = self.groups[self.layer_groups[layer]]
        pages, tables, lens = self.pages[layer], group.block_tables, self.context_lens
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        options = {"scale": scale, "window": window, "softcap": softcap}
        d, rows = self.num_decodes, query.shape[0]
        if d == rows:  # every step of plain generation: nothing to slice
            self._decode(query, pages, tables, lens, out, options)
            return out
        if d:
            self._decode(query[:d], pages, tables[:d], lens[:d], out[:d], options)
        self.backend.paged_prefill(
            query[d:],
            pages,
            tables[d:],
            lens[d:],
            self.query_start,
            max_query_len=self.max_query_len,
            out=out[d:],
            **options,
        )
        return out

    def _decode(
        self,
        query: Tensor,
        pages: Pages,
        tables: Tensor,
        lens: Tensor,
        out: Tensor,
        options: dict[str, float],
    ) -> None:
        self.backend.paged_decode(
            query, pages, tables, lens, max_context_len=self.max_context_len, out=out, **options
        )
