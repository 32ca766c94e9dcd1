"""Triton: one tile of cached keys or values. The only place where cache formats differ.

A tile is any run of token positions of one sequence and one K/V head; it may span many small
blocks or lie inside a large one. The attention kernels see numbers in their compute dtype and
never learn how a page encodes them. A quantized format would add its scale pointers here.

    keys = pages[0], values = pages[1]:  [num_blocks, kv_heads, block_size, head_dim]
                                         |---------------- rows --------------|
    row = (block * kv_heads + head) * block_size + offset
"""

import triton
import triton.language as tl


@triton.jit
def tile_rows(table, tokens, seen, head, kv_heads, BLOCK_SIZE: tl.constexpr):
    """Row index in the pages of each token position of one sequence: [tile] int64."""
    block = tl.load(table + tokens // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
    return (block * kv_heads + head) * BLOCK_SIZE + tokens % BLOCK_SIZE


@triton.jit
def load_keys(keys, rows, seen, DIM: tl.constexpr, DIM_PAD: tl.constexpr, DTYPE: tl.constexpr):
    """The tile's keys, transposed for the score product: [DIM_PAD, tile], zeros where unseen."""
    dims = tl.arange(0, DIM_PAD)
    if DIM == DIM_PAD:
        mask = seen[None, :]
    else:
        mask = seen[None, :] & (dims < DIM)[:, None]
    return tl.load(keys + rows[None, :] * DIM + dims[:, None], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_values(values, rows, seen, DIM: tl.constexpr, DIM_PAD: tl.constexpr, DTYPE: tl.constexpr):
    """The tile's values: [tile, DIM_PAD], zeros where unseen."""
    dims = tl.arange(0, DIM_PAD)
    if DIM == DIM_PAD:
        mask = seen[:, None]
    else:
        mask = seen[:, None] & (dims < DIM)[None, :]
    return tl.load(values + rows[:, None] * DIM + dims[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def store_rows(pages, rows, numbers, keep, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Encodes numbers [rows, DIM_PAD] into the keys or the values of the pages at `rows`."""
    dims = tl.arange(0, DIM_PAD)
    place = pages + rows[:, None] * DIM + dims[None, :]
    mask = keep[:, None] & (dims < DIM)[None, :]
    tl.store(place, numbers.to(pages.dtype.element_ty), mask=mask)
