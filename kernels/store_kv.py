"""Triton: writes new keys and values into their slots."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_tile import store_rows
from kernels.pages import Pages, memory, page_shape


@triton.jit
def store_kernel(
    key,
    value,
    keys,
    values,
    slots,
    kv_heads,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HEADS_PAD: tl.constexpr,
):
    """One token per program: grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        heads, dims = tl.arange(0, HEADS_PAD), tl.arange(0, DIM_PAD)
        keep = heads < kv_heads
        mask = keep[:, None] & (dims < DIM)[None, :]
        rows = (slot // BLOCK_SIZE * kv_heads + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
        k = key + token * key_stride + heads[:, None] * key_head_stride + dims[None, :]
        numbers = tl.load(k, mask=mask, other=0.0)
        store_rows(keys, rows, numbers, keep, FORMAT, BLOCK_SIZE, DIM, DIM_PAD)
        v = value + token * value_stride + heads[:, None] * value_head_stride + dims[None, :]
        numbers = tl.load(v, mask=mask, other=0.0)
        store_rows(values, rows, numbers, keep, FORMAT, BLOCK_SIZE, DIM, DIM_PAD)


def store_kv(key: Tensor, value: Tensor, pages: Pages, slot_mapping: Tensor) -> None:
    """Writes new keys and values into their slots, in place (see `kernels.reference`)."""
    tokens, kv_heads, head_dim = key.shape
    if tokens == 0:
        return
    blocks, format = memory(pages)
    with torch.cuda.device_of(blocks):
        store_kernel[(tokens,)](
            key,
            value,
            blocks[0],
            blocks[1],
            slot_mapping,
            kv_heads,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            FORMAT=format,
            BLOCK_SIZE=page_shape(pages)[1],
            DIM=head_dim,
            DIM_PAD=triton.next_power_of_2(head_dim),
            HEADS_PAD=triton.next_power_of_2(kv_heads),
            num_warps=4,
        )
