"""The tensors behind the blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from paged_cache.layout import KVLayout


class KVStorage:
    """All pages in one allocation.

    Attributes:
        blocks: [pages_per_block, 2, num_blocks, kv_heads, block_size, head_dim]; quantized ones
            are bytes, [pages_per_block, 2, num_blocks, kv_heads, bytes_per_tile]
        pages: per layer, its view of `blocks`; layers of different groups share one, because no
            block belongs to both
    """

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        tile: tuple[int, ...] = (layout.block_size, layout.head_dim)
        dtype: torch.dtype = torch.uint8
        if layout.format.quantized:
            tile = (layout.bytes_per_tile,)
        else:
            dtype = getattr(torch, layout.format.dtype)
        shape = (layout.pages_per_block, 2, layout.num_blocks, layout.kv_heads, *tile)
        # On CPUs the system hands zero pages out lazily. No kernel lets what nobody stored into a
        # result: the tests put NaN there.
        self.blocks: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.pages = tuple(self.blocks[place] for _, place in layout.places)

    @property
    def num_bytes(self) -> int:
        return self.blocks.nbytes
