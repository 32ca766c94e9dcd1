"""Paged attention over bfloat16 pages without converting them (`cpu_pairs`).

The two paths are those of `cpu_kernels`, and so are chunks and tiles. Scores and their softmax are
float32; weights are rounded to bfloat16 before they meet the values, as FlashAttention-2 does on
GPUs, while their sum is not.

    few rows    scores [row, token] are dots of query and key. Values of two tokens are interleaved
                as they are read, once for all rows.
    many rows   queries lie as pairs [head_dim / 2, row], so keys are read in place:
                    scores [token, row] = keys @ queries
                    acc [head_dim, row] += values of two tokens @ weights of two tokens
"""

import numpy as np
from numba import carray

from kernels.cpu_formats import BFLOAT16, store_row
from kernels.cpu_pages import address, helper, prefetch_tokens, tile_of
from kernels.cpu_pairs import (
    MOST_HEIGHT,
    dot_pairs,
    interleave_tokens,
    mix_pairs,
    multiply_pairs,
    softmax_pairs,
)
from kernels.cpu_queries import (
    CHUNK,
    TILE_ROWS,
    TILE_TOKENS,
    chunk_of,
    first_seen,
    mask,
    store_rows,
)
from kernels.cpu_simd import copy_bytes, float_pointer, row_exp2, row_max
from kernels.cpu_vectors import LANES, LOG2E, LOWEST

AHEAD = 32
"""Tokens between use and prefetch, which the hardware cannot guess across blocks."""


@helper
def few_rows_of_pairs(job, seq, head, chunk, queries, scores, acc, tile):
    """One chunk of context for all query rows of one K/V head: see `cpu_kernels._few_rows`."""
    start, count, context = chunk_of(job, seq)
    group, dim = job.heads // job.kv_heads, job.head_dim
    rows = count * group
    table = job.tables + seq * job.max_blocks * 4
    first = max(chunk * CHUNK, first_seen(job, context - count))
    origin, end = first // LANES * LANES, min((chunk + 1) * CHUNK, context)
    factor = np.float32(job.scale * LOG2E)

    for query in range(count):
        place = (start + query) * job.query_stride + head * group * dim
        target = address(queries, 0) + query * group * dim * 2
        copy_bytes(target, job.query + place * 2, group * dim * 2)
    for token in range(origin, end, LANES):
        place, offset = tile_of(job, job.pages, table, head, token)
        if token + AHEAD < end:
            prefetch_tokens(job, job.pages, table, head, token + AHEAD, end)
        else:  # the values' turn comes next
            later = origin + token + AHEAD - end
            prefetch_tokens(job, job.pages + job.values, table, head, later, end)
        keys, out = place + offset * job.row_bytes, address(scores, token - origin)
        _dots(address(queries, 0), rows, keys, dim, out)

    span = (end - origin + LANES - 1) // LANES
    for r in range(rows):
        line = scores[r * CHUNK : r * CHUNK + span * LANES]
        position = context - count + r // group
        left = max(0, min(end, first_seen(job, position)) - origin)
        right = max(0, min(end, position + 1) - origin)
        line *= factor
        line[:left], line[right:] = -np.inf, -np.inf
        top = row_max(address(line, 0), span)
        total = row_exp2(address(line, 0), span, top)
        acc[r * (dim + LANES) + dim], acc[r * (dim + LANES) + dim + 1] = top, total
        # In place: what is written lies before what is still to be read.
        weights = address(scores, r * CHUNK)
        store_row(BFLOAT16, weights, weights, span * LANES, np.float32(1))

    next_table, next_head, next_origin, next_end = _next_task(job, seq, head, origin, end)
    for token in range(origin, end, LANES):
        place, offset = tile_of(job, job.pages + job.values, table, head, token)
        if token + AHEAD < end:
            prefetch_tokens(job, job.pages + job.values, table, head, token + AHEAD, end)
        else:
            later = next_origin + token + AHEAD - end
            prefetch_tokens(job, job.pages, next_table, next_head, later, next_end)
        values, held = place + offset * job.row_bytes, min(LANES, end - token)
        if token < first or held % 2:
            values = _only(values, max(0, first - token), held, dim, tile)
        weights = address(scores, 0) + (token - origin) * 2
        _mix(weights, rows, values, (held + 1) // 2, dim, address(acc, 0), int(token > origin))


@helper
def _next_task(job, seq, head, origin, end):
    """(table, head, first token, end) of the keys that this thread will probably read next, where
    each of them takes every `threads`-th task."""
    head += job.threads
    if head >= job.kv_heads:
        head %= job.kv_heads
        seq = min(seq + 1, job.seqs - 1)
        _, count, end = chunk_of(job, seq)
        origin = first_seen(job, end - count) // LANES * LANES
    return job.tables + seq * job.max_blocks * 4, head, origin, end


@helper
def _dots(queries, rows, keys, dim, out):
    """out[r, :16] = queries[r] . keys[0..15], of row stride CHUNK."""
    r = 0
    while r < rows:
        height = 4 if rows - r >= 4 else (2 if rows - r >= 2 else 1)
        for t in range(0, LANES, LANES // height):
            dot_pairs(
                height,
                queries + r * dim * 2,
                dim * 2,
                keys + t * dim * 2,
                dim * 2,
                dim // 32,
                out + (r * CHUNK + t) * 4,
                CHUNK * 4,
            )
        r += height


@helper
def _only(values, first, end, dim, tile):
    """A copy of 16 tokens' values that has zeros before `first` and from `end` on: what lies there
    is not the sequence's, and a weight of 0 does not make it harmless."""
    tile[: LANES * dim // 2] = 0
    target = address(tile, 0)
    copy_bytes(target + first * dim * 2, values + first * dim * 2, (end - first) * dim * 2)
    return target


@helper
def _mix(weights, rows, values, pairs, dim, out, keep):
    """out[r, :dim] (+)= weights[r, :2 pairs] @ values, of row strides CHUNK, dim and dim + 16."""
    r = 0
    while r < rows:
        height = 4 if rows - r >= 4 else (2 if rows - r >= 2 else 1)
        for column in range(0, dim, 64):
            mix_pairs(
                height if dim - column >= 64 else -height,
                weights + r * CHUNK * 4,
                CHUNK * 4,
                values + column * 2,
                dim * 2,
                pairs,
                out + (r * (dim + LANES) + column) * 4,
                (dim + LANES) * 4,
                keep,
            )
        r += height


@helper
def many_rows_of_pairs(job, seq, head, tile_index, online, queries, pairs, scores, acc):
    """One tile of queries of one K/V head against everything it sees: `cpu_kernels._many_rows`."""
    tops, totals, decays = online
    start, count, context = chunk_of(job, seq)
    group, dim = job.heads // job.kv_heads, job.head_dim
    tile = max(1, TILE_ROWS // group)
    begin = tile_index * tile
    rows = min(tile, count - begin) * group
    padded = (rows + LANES - 1) // LANES * LANES
    position = context - count + begin  # of the first query
    table = job.tables + seq * job.max_blocks * 4
    first, end = first_seen(job, position), position + rows // group
    weights = scores[TILE_TOKENS * padded :]
    factor = np.float32(job.scale * LOG2E)

    tops[:padded], totals[:padded], acc[: dim * padded] = LOWEST, 0, 0
    _pair_queries(job, start + begin, head, rows, padded, queries)
    for token in range(first // LANES * LANES, end, TILE_TOKENS):
        n = min(TILE_TOKENS, end - token)
        for t in range(0, n, LANES):
            place, offset = tile_of(job, job.pages, table, head, token + t)
            keys, height = place + offset * job.row_bytes, min(LANES, n - t)
            target = address(scores, t * padded)
            _product(height, keys, dim * 2, 4, address(queries, 0), padded, dim // 2, target, 0)
        mask(job, scores, padded, token, n, position, group)
        scores[n * padded : (n + n % 2) * padded] = -np.inf
        pairs_of_tokens = (n + 1) // 2
        softmax_pairs(
            address(scores, 0),
            padded * 4,
            pairs_of_tokens,
            padded // LANES,
            factor,
            address(tops, 0),
            address(totals, 0),
            address(decays, 0),
            address(weights, 0),
        )
        _decay(acc, decays, dim, padded)
        _pair_values(job, table, head, token, n, first, dim, pairs)
        a, b, c = address(pairs, 0), address(weights, 0), address(acc, 0)
        _product(dim, a, 4, dim * 4, b, padded, pairs_of_tokens, c, 1)
    for d in range(dim):
        for r in range(rows):
            scores[r * dim + d] = acc[d * padded + r]
    store_rows(job, start + begin, head, rows, scores, dim, totals, 1)


@helper
def _product(rows, a, a_row, a_pair, b, columns, pairs, c, keep):
    """c [rows, columns] (+)= a @ b, rows of b and c following each other closely."""
    for column in range(0, columns, 4 * LANES):
        whole = columns - column >= 4 * LANES
        step = 4 * LANES if whole else LANES
        for j in range(column, min(column + 4 * LANES, columns), step):
            r = 0
            while r < rows:
                height = min(MOST_HEIGHT, rows - r)
                multiply_pairs(
                    height,
                    4 if whole else 1,
                    a + r * a_row,
                    a_row,
                    a_pair,
                    b + j * 4,
                    columns * 4,
                    pairs,
                    c + (r * columns + j) * 4,
                    columns * 4,
                    keep,
                )
                r += height


@helper
def _decay(acc, decays, dim, padded):
    """Multiplies acc [dim, padded] with a factor per column, unless all are 1."""
    changed = False
    for r in range(padded):
        changed |= decays[r] != 1
    if changed:
        for d in range(dim):
            for r in range(padded):
                acc[d * padded + r] *= decays[r]


@helper
def _pair_queries(job, start, head, rows, padded, queries):
    """Rows of one K/V head's queries as pairs [head_dim / 2, padded]; columns beyond are zeros."""
    group, count = job.heads // job.kv_heads, job.head_dim // 2
    queries[: count * padded] = 0
    for r in range(rows):
        index = (start + r // group) * job.query_stride + (head * group + r % group) * 2 * count
        line = carray(float_pointer(job.query + index * 2), count)
        for p in range(count):
            queries[p * padded + r] = line[p]


@helper
def _pair_values(job, table, head, token, n, first, dim, pairs):
    """Values of the tokens [token, token + n) as pairs [n / 2, dim]: of two tokens each, zeros
    where there is none before `first` or behind the last."""
    zeros = np.zeros(dim // 2, np.float32)
    for t in range(0, n, 2):
        place, offset = tile_of(job, job.pages + job.values, table, head, token + t)
        even = place + offset * job.row_bytes
        odd = even + job.row_bytes
        if token + t < first:
            even = address(zeros, 0)
        if t + 1 == n or token + t + 1 < first:
            odd = address(zeros, 0)
        interleave_tokens(even, odd, address(pairs, t // 2 * dim), dim // 32)
    zeros[0] = 0  # Numba frees an array after the last use of its name
