"""Triton: causal attention of ragged chunks over block tables (FlashAttention-2, paged).

One program serves one (tile of queries, K/V head, sequence). The rows of its matrix products are
the tile's queries times the query heads of the group:

    row         0    1    2    3    4    5  ...            GROUP = 2
    query       0    0    1    1    2    2
    head        0    1    0    1    0    1

Context tiles beyond the tile's last query or behind its first query's window are never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_tile import fold_scales, load_keys, load_values, tile_rows
from kernels.paged_decode import base2_scores, compute_capability, dot_precision
from kernels.pages import Pages, memory, page_shape


@triton.jit(do_not_specialize=["max_blocks"])
def prefill_kernel(
    query,
    keys,
    values,
    tables,
    lens,
    starts,
    out,
    scale,
    kv_heads,
    max_blocks,
    query_stride,
    out_stride,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles of the longest chunk, kv_heads, seqs)."""
    QUERIES: tl.constexpr = ROWS // GROUP
    head, seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.load(starts + seq)
    count = tl.load(starts + seq + 1) - start
    context = tl.load(lens + seq)
    first_query = tl.program_id(0) * QUERIES
    if first_query < count:
        rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
        index = first_query + rows // GROUP
        live = (rows < QUERIES * GROUP) & (index < count)
        mask = live[:, None] & (dims < DIM)[None, :]
        token = (start + index).to(tl.int64)
        within = (head * GROUP + rows % GROUP)[:, None] * DIM + dims[None, :]
        q = tl.load(query + token[:, None] * query_stride + within, mask=mask, other=0.0)

        before = context - count  # tokens of this sequence that are older than the chunk
        positions = before + index
        last_query = tl.minimum(first_query + QUERIES, count) - 1
        first, end = 0, tl.cdiv(before + last_query + 1, TILE)
        if WINDOW > 0:
            first = tl.maximum(before + first_query - WINDOW + 1, 0)

        table = tables + seq * max_blocks
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        # One masked loop. A second one without the mask for tiles that every row sees made the
        # code twice as long and spilled registers on sm_80 and sm_100.
        for tile in range(first // TILE, end):
            tokens = tile * TILE + tl.arange(0, TILE)
            seen = tokens < context
            if WINDOW > 0:  # what lies behind it may be another sequence's by now, or NaN
                seen = seen & (tokens >= first)
            places = tile_rows(table, tokens, seen, head, kv_heads, BLOCK_SIZE)
            k = load_keys(keys, places, seen, FORMAT, BLOCK_SIZE, DIM, DIM_PAD, q.dtype)
            dots = tl.dot(q, k, input_precision=PRECISION)
            factor = fold_scales(scale, keys, places, seen, FORMAT, BLOCK_SIZE, DIM)
            scores = base2_scores(dots, factor, SOFTCAP)
            visible = tokens[None, :] <= positions[:, None]
            if WINDOW > 0:
                visible = visible & (tokens[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_top[:, None])
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(weights, axis=1)
            v = load_values(values, places, seen, FORMAT, BLOCK_SIZE, DIM, DIM_PAD, q.dtype)
            weights = fold_scales(weights, values, places, seen, FORMAT, BLOCK_SIZE, DIM)
            acc = acc * decay[:, None]
            acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
            top = new_top
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        target = out + token[:, None] * out_stride + within
        tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


def prefill_shape(
    heads: int, kv_heads: int, head_dim: int, max_query_len: int, major: int = 9
) -> dict[str, int]:
    """The compile-time sizes and launch options of the prefill kernel.

    Short chunks (decode steps, speculation) take the smallest tile that tl.dot allows, others one
    that reuses each K/V tile as often as registers allow: `major` is the compute capability's,
    and tiles of 64 tokens spill on sm_80 and sm_100 but not on sm_90. On sm_100 short chunks of
    one query head per K/V head spill with 4 warps, too.
    """
    group = heads // kv_heads
    dim_pad = triton.next_power_of_2(head_dim)
    short = group * max_query_len <= 16
    rows = 16 if short else (128 if dim_pad <= 128 else 64)
    wide = dim_pad <= 128 and (short or major == 9)
    return {
        "GROUP": group,
        "ROWS": max(rows, triton.next_power_of_2(group)),
        "DIM": head_dim,
        "DIM_PAD": dim_pad,
        "TILE": 64 if wide else 32,
        "num_warps": 4 if short and major < 10 else 8,
        "num_stages": 2,
    }


def paged_prefill(
    query: Tensor,
    pages: Pages,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Ragged chunks of new tokens over their paged contexts (see `kernels.reference`)."""
    out = torch.empty_like(query) if out is None else out
    kv_heads, block_size, head_dim = page_shape(pages)
    blocks, format = memory(pages)
    major = compute_capability(query.device) // 10 or 9
    shape = prefill_shape(query.shape[1], kv_heads, head_dim, max_query_len, major)
    tiles = triton.cdiv(max_query_len, shape["ROWS"] // shape["GROUP"])
    with torch.cuda.device_of(query):
        prefill_kernel[(tiles, kv_heads, len(context_lens))](
            query,
            blocks[0],
            blocks[1],
            block_tables,
            context_lens,
            query_start,
            out,
            scale,
            kv_heads,
            block_tables.stride(0),
            query.stride(0),
            out.stride(0),
            FORMAT=format,
            BLOCK_SIZE=block_size,
            WINDOW=window,
            SOFTCAP=softcap,
            PRECISION=dot_precision(query.dtype),
            **shape,
        )
    return out
