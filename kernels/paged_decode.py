"""Triton: split-KV decode over block tables (Flash-Decoding on PagedAttention's cache).

One program serves one (sequence, K/V head, split of the context). The query heads that share a
K/V head are the rows of one small matrix product, so every page is read once. A sequence with
several splits leaves (maximum, sum, accumulator) of each in float32 and a second kernel folds
them; one with a single split is written at once.

    context   |tile|tile|tile|tile|tile|tile|tile|tile|til          window: tiles behind it
    splits    |---- split 0 ----|---- split 1 ----|- 2 -|           are skipped

How many splits a sequence has is computed on the device, from the lengths of the whole batch: a
long context among short ones gets most of the programs. The grid is as large as the shapes allow,
and programs without a split end at once. So a launch depends on no length, the host waits for
nothing, and a CUDA graph of it stays valid for every step.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_choices import MAX_SEQS, Choice, HeadShape, SplitPlan, choose, plan_splits
from kernels.kv_tile import fold_scales, load_keys, load_values, tile_rows
from kernels.pages import Pages, memory, page_shape

LOG2E = tl.constexpr(1.4426950408889634)
TILE_REDUCE = 8  # splits that the reduce kernel folds per iteration
ONCE = tl.constexpr("evict_first")  # no other program reads the same page
SUMMED = tl.constexpr(MAX_SEQS)


@triton.jit
def base2_scores(dots, scale, SOFTCAP: tl.constexpr):
    """Scores in units of log2 e, so that exp2 gives the softmax weights."""
    if SOFTCAP > 0:
        capped = 1 - 2 / (1 + tl.exp2(dots * (scale * (2 * LOG2E / SOFTCAP))))  # tanh
        return capped * (SOFTCAP * LOG2E)
    else:
        return dots * (scale * LOG2E)


@triton.jit
def tile_range(context, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """(first tile, tile after the last one) that contexts of so many tokens still see."""
    first = context * 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // TILE
    return first, tl.cdiv(context, TILE)


@triton.jit
def tiles_per_split(
    lens, tiles, seqs, bound, wanted, least, TILE: tl.constexpr, WINDOW: tl.constexpr
):
    """Tiles that one split reads of a sequence with `tiles` of them.

    The tiles of the batch are dealt to `wanted` splits per K/V head, whichever sequence they
    belong to; but no sequence has more than `bound` splits, and none fewer than `least` tiles.
    """
    # All lengths in one load: behind a loop over them, Triton does not pipeline the one over tiles.
    rows = tl.arange(0, SUMMED)
    contexts = tl.load(lens + rows, mask=rows < seqs, other=0)
    first, end = tile_range(contexts, TILE, WINDOW)
    fair = tl.cdiv(tl.sum(end - first), wanted)
    return tl.maximum(tl.maximum(fair, tl.cdiv(tiles, bound)), least)


@triton.jit(do_not_specialize=["max_blocks", "bound", "wanted", "least"])
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
    bound,
    wanted,
    least,
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
    """Grid (seqs, kv_heads, bound): `bound`, `wanted` and `least` are a `SplitPlan`.

    Numbers that change from call to call are not specialized on, so that serving never compiles.
    partial [seqs, heads, bound, DIM] and stats [seqs, heads, bound, 2] (maximum, sum) are float32
    and unused when DIRECT, which means that `bound` is 1.
    """
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(lens + seq)
    begin, end = tile_range(context, TILE, WINDOW)
    alone = True
    if not DIRECT:
        seqs = tl.num_programs(0)
        per_split = tiles_per_split(lens, end - begin, seqs, bound, wanted, least, TILE, WINDOW)
        alone = end - begin <= per_split
        begin += split * per_split
        if split > 0 and begin >= end:
            return
        end = tl.minimum(begin + per_split, end)

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    mask = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    within = (head * GROUP + rows)[:, None] * DIM + dims[None, :]
    q = tl.load(query + seq * query_stride + within, mask=mask, other=0.0)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)

    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    table = tables + seq * max_blocks
    offsets = tl.arange(0, TILE)
    # Rows are looked up one tile ahead: a load whose address waits for another load of the same
    # iteration keeps Triton from loading keys and values more than one tile ahead.
    tokens = begin * TILE + offsets
    places = tile_rows(table, tokens, tokens < context, head, kv_heads, BLOCK_SIZE)
    for tile in range(begin, end):
        tokens = tile * TILE + offsets
        seen = tokens < context
        if WINDOW > 0:
            seen = seen & (tokens >= first)
        k = load_keys(keys, places, seen, FORMAT, BLOCK_SIZE, DIM, DIM_PAD, q.dtype, ONCE)
        dots = tl.dot(q, k, input_precision=PRECISION)
        factor = fold_scales(scale, keys, places, seen, FORMAT, BLOCK_SIZE, DIM)
        scores = base2_scores(dots, factor, SOFTCAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, axis=1)
        v = load_values(values, places, seen, FORMAT, BLOCK_SIZE, DIM, DIM_PAD, q.dtype, ONCE)
        weights = fold_scales(weights, values, places, seen, FORMAT, BLOCK_SIZE, DIM)
        acc = tl.dot(weights.to(q.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
        tokens += TILE
        places = tile_rows(table, tokens, tokens < context, head, kv_heads, BLOCK_SIZE)

    if alone:
        # A padded row has seen nothing: its sum is 0 and its output zeros.
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        target = out + seq * out_stride + within
        tl.store(target, acc.to(out.dtype.element_ty), mask=mask)
    else:
        part = ((seq * kv_heads + head) * GROUP + rows) * bound + split
        tl.store(partial + part[:, None] * DIM + dims[None, :], acc, mask=mask)
        tl.store(stats + part * 2, top, mask=rows < GROUP)
        tl.store(stats + part * 2 + 1, total, mask=rows < GROUP)


@triton.jit(do_not_specialize=["bound", "wanted", "least"])
def reduce_kernel(
    partial,
    stats,
    lens,
    out,
    out_stride,
    bound,
    wanted,
    least,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Folds the splits of one query head: grid (seqs, heads)."""
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, end = tile_range(tl.load(lens + seq), TILE, WINDOW)
    tiles, seqs = end - first, tl.num_programs(0)
    per_split = tiles_per_split(lens, tiles, seqs, bound, wanted, least, TILE, WINDOW)
    num_splits = tl.cdiv(tiles, per_split)
    if num_splits <= 1:
        return
    first = (seq * tl.num_programs(1) + head) * bound
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


def decode_shape(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """The compile-time sizes of the decode kernel for a model shape."""
    group = heads // kv_heads
    return {
        "GROUP": group,
        "ROWS": max(16, triton.next_power_of_2(group)),  # tl.dot needs 16 rows
        "DIM": head_dim,
        "DIM_PAD": triton.next_power_of_2(head_dim),
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
    choice: Choice | None = None,
    splits: SplitPlan | None = None,
) -> Tensor:
    """One new token per sequence over its paged context (see `kernels.reference`).

    max_context_len  unused: a launch depends on the shapes of its tensors alone
    choice, splits   override what `kernels.decode_choices` says of these shapes
    """
    seqs, heads, head_dim = query.shape
    out = torch.empty_like(query) if out is None else out
    kv_heads, block_size, _ = page_shape(pages)
    blocks, format = memory(pages)
    longest = block_tables.shape[1] * block_size
    longest = min(longest, window) if window else longest
    if choice is None:
        choice = choose(head_shape(heads, pages), seqs, longest)
    if splits is None:
        processors = count_processors(query.device)
        splits = plan_splits(choice, seqs, kv_heads, longest, processors)
    bounds = splits.bound, splits.wanted, splits.least
    direct = splits.bound == 1
    partial = stats = out
    if not direct:
        options = {"dtype": torch.float32, "device": query.device}
        partial = torch.empty(seqs, heads, splits.bound, head_dim, **options)
        stats = torch.empty(seqs, heads, splits.bound, 2, **options)
    shape = decode_shape(heads, kv_heads, head_dim)
    with torch.cuda.device_of(query):
        decode_kernel[(seqs, kv_heads, splits.bound)](
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
            *bounds,
            FORMAT=format,
            BLOCK_SIZE=block_size,
            TILE=choice.tile,
            WINDOW=window,
            SOFTCAP=softcap,
            PRECISION=dot_precision(query.dtype),
            DIRECT=direct,
            num_warps=choice.warps,
            num_stages=choice.stages,
            **shape,
        )
        if not direct:
            reduce_kernel[(seqs, heads)](
                partial,
                stats,
                context_lens,
                out,
                out.stride(0),
                *bounds,
                DIM=head_dim,
                DIM_PAD=shape["DIM_PAD"],
                TILE=choice.tile,
                WINDOW=window,
                SPLITS=TILE_REDUCE,
                num_warps=4,
            )
    return out


def head_shape(heads: int, pages: Pages) -> HeadShape:
    kv_heads, block_size, head_dim = page_shape(pages)
    blocks, _ = memory(pages)
    row_bytes = blocks.stride(2) * blocks.itemsize // block_size
    return HeadShape(heads, kv_heads, head_dim, row_bytes, compute_capability(blocks.device))


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
    """The compute capability of a CUDA device, 90 for 9.0; 0 elsewhere (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
