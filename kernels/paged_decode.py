"""Triton: split-KV decode over block tables (Flash-Decoding on PagedAttention's cache).

One program serves one (sequence, K/V head, split of the context). The query heads that share a
K/V head are the rows of one small matrix product, so every page is read once. With several splits
each program leaves (maximum, sum, accumulator) in float32 and a second kernel folds them.

    context   |tile|tile|tile|tile|tile|tile|tile|tile|til          window: tiles behind it
    splits    |---- split 0 ----|---- split 1 ----|- 2 -|           are skipped
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_tile import fold_scales, load_keys, load_values, tile_rows
from kernels.pages import Pages, memory, page_shape

LOG2E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = 64
MIN_TILES_PER_SPLIT = 4
TILE_REDUCE = 8  # splits that the reduce kernel folds per iteration


@triton.jit
def base2_scores(dots, scale, SOFTCAP: tl.constexpr):
    """Scores in units of log2 e, so that exp2 gives the softmax weights."""
    if SOFTCAP > 0:
        capped = 1 - 2 / (1 + tl.exp2(dots * (scale * (2 * LOG2E / SOFTCAP))))  # tanh
        return capped * (SOFTCAP * LOG2E)
    else:
        return dots * (scale * LOG2E)


@triton.jit(do_not_specialize=["max_blocks", "num_splits"])
def decode_kernel(
    query,
    keys,
    values,
    tables,
    lens,
    out,
    partial,
    stats,
    scale,
    kv_heads,
    max_blocks,
    query_stride,
    out_stride,
    num_splits,
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
    DIRECT: tl.constexpr,
):
    """Grid (seqs, kv_heads, num_splits).

    Numbers that change from call to call are not specialized on, so that serving never compiles.
    partial [seqs, heads, num_splits, DIM] and stats [seqs, heads, num_splits, 2] (maximum, sum)
    are float32 and unused when DIRECT, which means one split that writes `out` itself.
    """
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.program_id(2)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    mask = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    within = (head * GROUP + rows)[:, None] * DIM + dims[None, :]
    q = tl.load(query + seq * query_stride + within, mask=mask, other=0.0)

    context = tl.load(lens + seq)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    first_tile, last_tile = first // TILE, tl.cdiv(context, TILE)
    per_split = tl.cdiv(last_tile - first_tile, num_splits)
    begin = first_tile + split * per_split
    end = tl.minimum(begin + per_split, last_tile)

    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    table = tables + seq * max_blocks
    for tile in range(begin, end):
        tokens = tile * TILE + tl.arange(0, TILE)
        seen = tokens < context
        if WINDOW > 0:
            seen = seen & (tokens >= first)
        places = tile_rows(table, tokens, seen, head, kv_heads, BLOCK_SIZE)
        k = load_keys(keys, places, seen, FORMAT, BLOCK_SIZE, DIM, DIM_PAD, q.dtype)
        dots = tl.dot(q, k, input_precision=PRECISION)
        factor = fold_scales(scale, keys, places, seen, FORMAT, BLOCK_SIZE, DIM)
        scores = base2_scores(dots, factor, SOFTCAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, axis=1)
        v = load_values(values, places, seen, FORMAT, BLOCK_SIZE, DIM, DIM_PAD, q.dtype)
        weights = fold_scales(weights, values, places, seen, FORMAT, BLOCK_SIZE, DIM)
        acc = tl.dot(weights.to(q.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top

    if DIRECT:
        # A padded row has seen nothing: its sum is 0 and its output zeros.
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        target = out + seq * out_stride + within
        tl.store(target, acc.to(out.dtype.element_ty), mask=mask)
    else:
        part = ((seq * kv_heads + head) * GROUP + rows) * num_splits + split
        tl.store(partial + part[:, None] * DIM + dims[None, :], acc, mask=mask)
        tl.store(stats + part * 2, top, mask=rows < GROUP)
        tl.store(stats + part * 2 + 1, total, mask=rows < GROUP)


@triton.jit(do_not_specialize=["num_splits"])
def reduce_kernel(
    partial,
    stats,
    out,
    out_stride,
    num_splits,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Folds the splits of one query head: grid (seqs, heads)."""
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = (seq * tl.num_programs(1) + head) * num_splits
    dims = tl.arange(0, DIM_PAD)
    top = tl.full([], -1e30, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([DIM_PAD], tl.float32)
    for base in range(0, num_splits, SPLITS):
        splits = base + tl.arange(0, SPLITS)
        live = splits < num_splits
        tops = tl.load(stats + (first + splits) * 2, mask=live, other=-1e30)
        totals = tl.load(stats + (first + splits) * 2 + 1, mask=live, other=0.0)
        place = partial + (first + splits)[:, None] * DIM + dims[None, :]
        parts = tl.load(place, mask=live[:, None] & (dims < DIM)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp2(tops - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(totals * weights, axis=0)
        acc = acc * decay + tl.sum(parts * weights[:, None], axis=0)
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)
    target = out + seq * out_stride + head * DIM + dims
    tl.store(target, acc.to(out.dtype.element_ty), mask=dims < DIM)


def choose_splits(
    seqs: int, kv_heads: int, max_context_len: int, processors: int, tile: int = 64
) -> int:
    """How many programs share one sequence's context.

    Enough that (sequence, head, split) programs fill every processor twice, but never so many
    that a split of the longest context has fewer than MIN_TILES_PER_SPLIT tiles: the reduce pass
    would then cost more than it gains.
    """
    wanted = 2 * processors // max(seqs * kv_heads, 1)
    useful = max_context_len // (tile * MIN_TILES_PER_SPLIT)
    return max(1, min(wanted, useful, MAX_SPLITS))


def decode_shape(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """The compile-time sizes of the decode kernel for a model shape."""
    group = heads // kv_heads
    return {
        "GROUP": group,
        "ROWS": max(16, triton.next_power_of_2(group)),  # tl.dot needs 16 rows
        "DIM": head_dim,
        "DIM_PAD": triton.next_power_of_2(head_dim),
        "TILE": 64 if head_dim <= 128 else 32,
    }


def paged_decode(
    query: Tensor,
    pages: Pages,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
    max_context_len: int | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """One new token per sequence over its paged context (see `kernels.reference`).

    max_context_len  the longest context of the batch if the caller knows it on the host; without
                     it the width of block_tables bounds it, so that nothing waits for the device
    num_splits       overrides the choice of `choose_splits`
    """
    seqs, heads, head_dim = query.shape
    out = torch.empty_like(query) if out is None else out
    kv_heads, block_size, _ = page_shape(pages)
    blocks, format = memory(pages)
    shape = decode_shape(heads, kv_heads, head_dim)
    if num_splits is None:
        longest = max_context_len or block_tables.shape[1] * block_size
        longest = min(longest, window) if window else longest
        processors = count_processors(query.device)
        num_splits = choose_splits(seqs, kv_heads, longest, processors, shape["TILE"])
    direct = num_splits == 1
    partial = stats = out
    if not direct:
        options = {"dtype": torch.float32, "device": query.device}
        partial = torch.empty(seqs, heads, num_splits, head_dim, **options)
        stats = torch.empty(seqs, heads, num_splits, 2, **options)
    with torch.cuda.device_of(query):
        decode_kernel[(seqs, kv_heads, num_splits)](
            query,
            blocks[0],
            blocks[1],
            block_tables,
            context_lens,
            out,
            partial,
            stats,
            scale,
            kv_heads,
            block_tables.stride(0),
            query.stride(0),
            out.stride(0),
            num_splits,
            FORMAT=format,
            BLOCK_SIZE=block_size,
            WINDOW=window,
            SOFTCAP=softcap,
            PRECISION=dot_precision(query.dtype),
            DIRECT=direct,
            num_warps=4,
            num_stages=2,
            **shape,
        )
        if not direct:
            reduce_kernel[(seqs, heads)](
                partial,
                stats,
                out,
                out.stride(0),
                num_splits,
                DIM=head_dim,
                DIM_PAD=shape["DIM_PAD"],
                SPLITS=TILE_REDUCE,
                num_warps=4,
            )
    return out


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot rounds float32 inputs to TF32 unless told not to."""
    return "ieee" if dtype == torch.float32 else "tf32"


@cache
def count_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 elsewhere (the interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def compute_capability(device: torch.device) -> int:
    """The major compute capability of a CUDA device; 9 elsewhere (the interpreter)."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
