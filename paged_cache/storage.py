"""The tensors behind the blocks."""

from __future__ import annotations

import torch

from paged_cache.layout import KVLayout


class KVStorage:
    """One page tensor per layer, [2, num_blocks, kv_heads, block_size, head_dim]."""

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        shape = (2, layout.num_blocks, layout.kv_heads, layout.block_size, layout.head_dim)
        dtype: torch.dtype = getattr(torch, layout.format.dtype)
        # Zeros, not garbage: a tile is loaded whole and its unused rows are masked by a product
        # with 0, which a stray NaN would survive. On CPUs the system hands zero pages out lazily.
        self.pages = tuple(
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(layout.num_layers)
        )

    @property
    def num_bytes(self) -> int:
        return sum(page.nbytes for page in self.pages)
