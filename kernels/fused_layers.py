"""Triton: what stands between the matrix products of a decoder layer, one kernel each.

A decode step of few sequences spends its time on launches and on trips to memory, not arithmetic.
Everything is computed in float32 and rounded where the unfused operations hand a result over.
Twins: `kernels.reference`. No size that changes from step to step is specialized on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_tile import store_rows
from kernels.pages import Pages, memory, page_shape

LOG2E = tl.constexpr(1.4426950408889634)
COLUMNS = 1024  # that one program of `gated_kernel` computes


@triton.jit
def add_norm_kernel(
    x,
    residual,
    weight,
    out,
    eps,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
):
    """One row per program."""
    at = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, SIZE_PAD)
    mask = columns < SIZE
    dtype = out.dtype.element_ty
    row = tl.load(x + at + columns, mask=mask, other=0.0).to(tl.float32)
    row += tl.load(residual + at + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual + at + columns, row.to(dtype), mask=mask)
    row = row.to(dtype).to(tl.float32)
    factor = tl.rsqrt(tl.sum(row * row) / SIZE + eps)
    scale = tl.load(weight + columns, mask=mask, other=0.0)
    tl.store(out + at + columns, (row * factor * scale).to(dtype), mask=mask)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to the residual stream, in place, and normalizes it (see `kernels.reference`)."""
    rows, size = x.shape
    out = torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        add_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            out,
            eps,
            SIZE=size,
            SIZE_PAD=padded,
            num_warps=norm_warps(padded),
        )
    return out


def norm_warps(padded: int) -> int:
    """Warps per row: 8 numbers, an access of 16 bytes, per thread if possible."""
    return min(max(padded // 256, 1), 16)


@triton.jit
def gated_kernel(
    gate_up,
    out,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Grid (rows, pieces of COLUMNS)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < INNER
    start = gate_up + row * (2 * INNER)
    gate = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + INNER + columns, mask=mask, other=0.0).to(tl.float32)
    x = gate
    if ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(y)) is the sigmoid of 2 y
        x = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    result = gate / (1.0 + tl.exp2(-x * LOG2E)) * up
    tl.store(out + row * INNER + columns, result.to(out.dtype.element_ty), mask=mask)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` of rows that hold both (see `kernels.reference`)."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    with torch.cuda.device_of(gate_up):
        gated_kernel[(rows, triton.cdiv(inner, COLUMNS))](
            gate_up, out, INNER=inner, COLUMNS=COLUMNS, ACTIVATION=activation, num_warps=4
        )
    return out


@triton.jit
def turned_heads(
    start,
    cos,
    sin,
    weight,
    heads,
    count,
    token,
    eps,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Heads of one token, normalized and rotated: float32 [heads, DIM_PAD], zeros elsewhere.

    start points to the token's row, `heads` are those below `count`. Each number is loaded a
    second time as the partner of another one, by then from the L1 cache.
    """
    dims = tl.arange(0, DIM_PAD)
    mask = (heads < count)[:, None] & (dims < DIM)[None, :]
    at = heads[:, None] * DIM + dims[None, :]
    numbers = tl.load(start + at, mask=mask, other=0.0).to(tl.float32)
    factor = tl.full([heads.shape[0]], 1.0, tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(numbers * numbers, axis=1) / DIM + eps)
        numbers *= factor[:, None] * tl.load(weight + at, mask=mask, other=0.0)
    if ROTATE:
        other = heads[:, None] * DIM + ((dims + DIM // 2) % DIM)[None, :]
        partners = tl.load(start + other, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            partners *= factor[:, None] * tl.load(weight + other, mask=mask, other=0.0)
        turn = token * DIM + dims
        c = tl.load(cos + turn, mask=dims < DIM, other=0.0)
        s = tl.load(sin + turn, mask=dims < DIM, other=0.0)
        numbers = numbers * c[None, :] + partners * s[None, :]
    return numbers


@triton.jit(do_not_specialize=["kv_heads"])
def turn_store_kernel(
    qkv,
    cos,
    sin,
    weight,
    keys,
    values,
    slots,
    out,
    eps,
    kv_heads,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Grid (tokens, kv_heads): a key, a value, and the query heads that they serve."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = kv_heads * GROUP
    start = qkv + token * ((heads + 2 * kv_heads) * DIM)
    dtype = out.dtype.element_ty

    group = head * GROUP + tl.arange(0, GROUP_PAD)
    last = (head + 1) * GROUP
    query = turned_heads(
        start, cos, sin, weight, group, last, token, eps, DIM, DIM_PAD, NORM, ROTATE
    )
    dims = tl.arange(0, DIM_PAD)
    mask = (group < last)[:, None] & (dims < DIM)[None, :]
    target = out + token * (heads * DIM) + group[:, None] * DIM + dims[None, :]
    tl.store(target, query.to(dtype), mask=mask)

    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        one = tl.arange(0, 1)
        index = heads + head + one
        rows = (slot // BLOCK_SIZE * kv_heads + head) * BLOCK_SIZE + slot % BLOCK_SIZE + one
        keep = one >= 0
        key = turned_heads(
            start, cos, sin, weight, index, heads + kv_heads, token, eps, DIM, DIM_PAD, NORM, ROTATE
        )
        key = key.to(dtype).to(tl.float32)
        store_rows(keys, rows, key, keep, FORMAT, BLOCK_SIZE, DIM, DIM_PAD)
        place = start + (index + kv_heads)[:, None] * DIM + dims[None, :]
        value = tl.load(place, mask=(dims < DIM)[None, :], other=0.0).to(tl.float32)
        store_rows(values, rows, value, keep, FORMAT, BLOCK_SIZE, DIM, DIM_PAD)


def turn_and_store(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    eps: float,
    pages: Pages,
    slot_mapping: Tensor,
) -> Tensor:
    """Norm and rotation of queries and keys, and keys and values into their slots.

    See `kernels.reference`.
    """
    kv_heads, block_size, head_dim = page_shape(pages)
    tokens, group = qkv.shape[0], qkv.shape[1] // kv_heads - 2
    blocks, format = memory(pages)
    out = qkv.new_empty(tokens, group * kv_heads, head_dim)
    cos, sin = rotation or (qkv, qkv)  # never read
    with torch.cuda.device_of(qkv):
        turn_store_kernel[(tokens, kv_heads)](
            qkv,
            cos,
            sin,
            qkv if weight is None else weight,
            blocks[0],
            blocks[1],
            slot_mapping,
            out,
            eps,
            kv_heads,
            FORMAT=format,
            GROUP=group,
            GROUP_PAD=triton.next_power_of_2(group),
            BLOCK_SIZE=block_size,
            DIM=head_dim,
            DIM_PAD=triton.next_power_of_2(head_dim),
            NORM=weight is not None,
            ROTATE=rotation is not None,
            num_warps=2,
        )
    return out
