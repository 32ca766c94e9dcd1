"""The compiled workers of the CPU backend: paged attention and stores over block tables.

A worker is a C function `void worker(Job *job)` that any number of threads may run at once on the
same job. Each thread takes the next task from the job's atomic counter until none is left, so the
work balances itself and the caller is free to bring its own threads (`cpu_attention.run`).

Attention takes one of two paths per sequence:

    few rows    at most FEW_ROWS query rows per K/V head (decode, speculation). One task is
                (sequence, K/V head, chunk of CHUNK tokens). It reads the pages in place, once for
                all query heads of the group. Where a context has several chunks, partial results
                (maximum, sum, accumulator) go to a buffer that `combine` folds (Flash-Decoding).
    many rows   prompt chunks. One task is (sequence, K/V head, tile of queries). It converts
                TILE_TOKENS of context to float32 at a time and runs the online softmax of
                FlashAttention-2 with register-blocked products. Scores are kept transposed,
                [token, row], so that softmax works on whole vectors.

Where queries and pages are bfloat16 and the CPU multiplies pairs of them, both paths have a twin in
`cpu_pair_attention`, which converts nothing.

Chunks start at fixed positions, so a result depends neither on the number of threads nor on the
rest of the batch.
"""

import numpy as np
from numba import carray, cfunc, types

from kernels.cpu_formats import FLOAT32, GROUP, INT4, load_row, store_row
from kernels.cpu_pages import (
    AHEAD,
    RECORD,
    address,
    fold_scales,
    gather,
    grid_at,
    grid_size,
    helper,
    load_grids,
    num_bytes,
    prefetch_tokens,
    scratch,
    store_tokens,
    tile_of,
)
from kernels.cpu_pair_attention import few_rows_of_pairs, many_rows_of_pairs
from kernels.cpu_queries import (
    CHUNK,
    FEW_ROWS,
    TILE_ROWS,
    TILE_TOKENS,
    chunk_of,
    first_chunk,
    first_seen,
    mask,
    store_rows,
)
from kernels.cpu_simd import (
    copy_bytes,
    dot_tile,
    float_pointer,
    multiply_tile,
    read_int32,
    row_exp2,
    row_max,
    softcap_row,
    softmax_columns,
    take,
    write_int32,
)
from kernels.cpu_vectors import LANES, LOG2E, LOWEST

_WORKER = types.void(types.CPointer(RECORD))


@helper
def _dots(fmt, queries, rows, keys, grid, dim, out, stride):
    """out[r, :16] = queries[r] . keys[0..15]; queries are float32, `dim` a multiple of LANES."""
    r = 0
    while r < rows:
        height = 4 if rows - r >= 4 else (2 if rows - r >= 2 else 1)
        tokens = LANES // height
        for t in range(0, LANES, tokens):
            dot_tile(
                height,
                fmt,
                queries + r * dim * 4,
                dim,
                keys + num_bytes(fmt, t * dim),
                dim,
                grid + t * (dim // GROUP) * 4,
                dim // LANES,
                out + (r * stride + t) * 4,
                stride,
            )
        r += height


@helper
def _multiply(c, ldc, a, a_row, a_col, fmt, b, ldb, grid, rows, columns, depth, keep):
    """C [rows, columns] (+)= A [rows, depth] @ B [depth, columns]; `columns` in whole vectors."""
    narrow = 2 if fmt == INT4 else 1
    j = 0
    while j < columns:
        vecs = 4 if columns - j >= 4 * LANES else narrow
        i = 0
        while i < rows:
            height = 4 if rows - i >= 4 else (2 if rows - i >= 2 else 1)
            multiply_tile(
                height,
                vecs,
                fmt,
                c + (i * ldc + j) * 4,
                ldc,
                a + i * a_row * 4,
                a_row,
                a_col,
                b + num_bytes(fmt, j),
                ldb,
                grid + j // GROUP * 4,
                depth,
                keep,
            )
            i += height
        j += vecs * LANES


@helper
def plan_tasks(job):
    """Counts tasks, rows of partial results and work, and zeros the output of padded decode rows.

    Work is in numbers of K/V read, plus half of that for each further query row that uses them.
    first_task and first_row get one entry per sequence and a last one with the totals.
    """
    group = job.heads // job.kv_heads
    tasks = rows = work = 0
    for seq in range(job.seqs):
        write_int32(job.first_task, seq, tasks)
        write_int32(job.first_row, seq, rows)
        _, queries, context = chunk_of(job, seq)
        if queries == 0:
            if job.starts == 0:
                _store_zeros(job, seq)
            continue
        seen = context - first_seen(job, context - queries)
        work += seen * job.kv_heads * job.head_dim * (2 + queries * group // 2)
        if queries * group <= FEW_ROWS:
            chunks = (context - 1) // CHUNK + 1 - first_chunk(job, queries, context)
            tasks += chunks * job.kv_heads
            rows += chunks * job.heads * queries if chunks > 1 else 0
        else:
            tile = max(1, TILE_ROWS // group)
            tasks += (queries + tile - 1) // tile * job.kv_heads
    write_int32(job.first_task, job.seqs, tasks)
    write_int32(job.first_row, job.seqs, rows)
    job.tasks, job.rows, job.work = tasks, rows, work


@helper
def _store_zeros(job, row):
    count = job.heads * job.head_dim
    zeros = np.zeros(count, np.float32)
    size = num_bytes(job.query_format, 1)
    target = job.out + row * job.out_stride * size
    store_row(job.query_format, address(zeros, 0), target, count, np.float32(1))


@helper
def _owner(job, task):
    """The sequence that a task belongs to: the last whose first task is not after it."""
    low, high = 0, job.seqs
    while high - low > 1:
        middle = (low + high) // 2
        if read_int32(job.first_task, middle) <= task:
            low = middle
        else:
            high = middle
    return low


@helper
def _few_rows(job, seq, head, chunk, queries, scores, acc, tile, grid):
    """One chunk of context for all query rows of one K/V head.

    Leaves in acc [rows, width + LANES] the weighted sum of values, the maximum score and the sum
    of weights. Row r is query r // group, head r % group of the group; the others are scratch.
    """
    start, count, context = chunk_of(job, seq)
    group, dim = job.heads // job.kv_heads, job.head_dim
    rows, width = count * group, (dim + LANES - 1) // LANES * LANES
    table = job.tables + seq * job.max_blocks * 4
    first = max(chunk * CHUNK, first_seen(job, context - count))
    origin, end = first // LANES * LANES, min((chunk + 1) * CHUNK, context)

    _load_queries(job, start, head, rows, queries, width)
    _score_keys(job, table, head, origin, end, context, rows, width, queries, scores, tile, grid)

    span = (end - origin + LANES - 1) // LANES
    for r in range(rows):
        line = scores[r * CHUNK : r * CHUNK + span * LANES]
        if job.softcap > 0:
            softcap_row(address(line, 0), span, np.float32(job.softcap), np.float32(LOG2E))
        position = context - count + r // group
        line[: max(0, min(end, first_seen(job, position)) - origin)] = -np.inf
        line[max(0, min(end, position + 1) - origin) :] = -np.inf
        top = row_max(address(line, 0), span)
        acc[r * (width + LANES) + width] = top
        acc[r * (width + LANES) + width + 1] = row_exp2(address(line, 0), span, top)

    _mix_values(job, table, head, first, end, origin, rows, width, scores, acc, tile, grid)


@helper
def _in_place(job, width):
    """Whether LANES tokens always lie in one block, in rows of whole vectors."""
    return job.head_dim == width and job.block_size % LANES == 0


@helper
def _score_keys(job, table, head, origin, end, context, rows, width, queries, scores, tile, grid):
    """scores[r, token - origin] of the tokens [origin, end), in whole vectors."""
    q = address(queries, 0)
    load_grids(job, job.pages, table, head, origin, end, grid, _in_place(job, width))
    for token in range(origin, end, LANES):
        out, g = address(scores, token - origin), grid_at(job, grid, token - origin)
        if _in_place(job, width):
            place, offset = tile_of(job, job.pages, table, head, token)
            prefetch_tokens(job, job.pages, table, head, token + AHEAD, end)
            keys = place + offset * job.row_bytes
            _dots(job.page_format, q, rows, keys, g, width, out, CHUNK)
            fold_scales(job, place, offset, out, CHUNK, rows)
        else:
            n = min(LANES, context - token)
            gather(job, job.pages, table, head, token, n, tile, width, grid)
            _dots(FLOAT32, q, rows, address(tile, 0), g, width, out, CHUNK)


@helper
def _mix_values(job, table, head, first, end, origin, rows, width, scores, acc, tile, grid):
    """acc[r, :width] = sum over tokens [first, end) of scores[r, token - origin] * value."""
    base, stride = job.pages + job.values, width + LANES
    c = address(acc, 0)
    load_grids(job, base, table, head, origin, end, grid, _in_place(job, width))
    token = first
    while token < end:
        g = grid_at(job, grid, token - origin)
        a, keep = address(scores, token - origin), int(token > first)
        if _in_place(job, width):
            run = min(end - token, LANES - token % LANES)
            place, offset = tile_of(job, base, table, head, token)
            prefetch_tokens(job, base, table, head, token + AHEAD, end)
            values, early = place + offset * job.row_bytes, token % LANES
            # Whole vectors: what is scaled beside the run is not used.
            fold_scales(job, place, offset - early, a - early * 4, CHUNK, rows)
            fmt = job.page_format
            _multiply(c, stride, a, CHUNK, 1, fmt, values, width, g, rows, width, run, keep)
        else:
            run = min(end - token, LANES)
            gather(job, base, table, head, token, run, tile, width, grid)
            b = address(tile, 0)
            _multiply(c, stride, a, CHUNK, 1, FLOAT32, b, width, g, rows, width, run, keep)
        token += run


@helper
def _load_queries(job, start, head, rows, queries, width):
    """Rows of one K/V head's queries as float32, scaled for base-2 softmax (or for softcap)."""
    group, dim = job.heads // job.kv_heads, job.head_dim
    factor = np.float32(job.scale * (1.0 if job.softcap > 0 else LOG2E))
    size = num_bytes(job.query_format, 1)
    for r in range(rows):
        index = (start + r // group) * job.query_stride + (head * group + r % group) * dim
        to = address(queries, r * width)
        load_row(job.query_format, job.query + index * size, to, dim, factor)


@helper
def _many_rows(job, seq, head, tile_index, tops, totals, decays, queries, keys, scores, acc, grid):
    """One tile of queries of one K/V head against everything it sees."""
    start, count, context = chunk_of(job, seq)
    group, dim = job.heads // job.kv_heads, job.head_dim
    width = (dim + LANES - 1) // LANES * LANES
    tile = max(1, TILE_ROWS // group)
    begin = tile_index * tile
    rows = min(tile, count - begin) * group
    padded = (rows + LANES - 1) // LANES * LANES
    position = context - count + begin  # of the first query
    table = job.tables + seq * job.max_blocks * 4

    tops[:padded], totals[:padded], acc[: padded * width] = LOWEST, 0, 0
    _transpose_queries(job, start + begin, head, rows, padded, queries, keys, width)
    end = position + rows // group
    values = job.pages + job.values
    for token in range(first_seen(job, position), end, TILE_TOKENS):
        n = min(TILE_TOKENS, end - token)
        gather(job, job.pages, table, head, token, n, keys, width, grid)
        k, q, s = address(keys, 0), address(queries, 0), address(scores, 0)
        _multiply(s, padded, k, width, 1, FLOAT32, q, padded, s, n, padded, width, 0)
        if job.softcap > 0:
            softcap_row(s, n * padded // LANES, np.float32(job.softcap), np.float32(LOG2E))
        mask(job, scores, padded, token, n, position, group)
        softmax_columns(
            s,
            padded,
            n,
            padded // LANES,
            address(tops, 0),
            address(totals, 0),
            address(decays, 0),
        )
        for r in range(rows):
            if decays[r] != 1:
                a = address(acc, r * width)
                load_row(FLOAT32, a, a, width, decays[r])
        gather(job, values, table, head, token, n, keys, width, grid)
        _multiply(address(acc, 0), width, s, 1, padded, FLOAT32, k, width, s, rows, width, n, 1)
    store_rows(job, start + begin, head, rows, acc, width, totals, 1)


@helper
def _transpose_queries(job, start, head, rows, padded, transposed, line, width):
    """transposed[d, r] = the scaled query rows; columns beyond `rows` are zeros."""
    group = job.heads // job.kv_heads
    transposed[: width * padded] = 0
    for first in range(0, rows, group):
        _load_queries(job, start + first // group, head, group, line, width)
        for g in range(group):
            for d in range(width):
                transposed[d * padded + first + g] = line[g * width + d]


@helper
def attend_tasks(job):
    """Takes tasks until none is left; how many this thread took."""
    group = job.heads // job.kv_heads
    width = (job.head_dim + LANES - 1) // LANES * LANES
    tile = max(FEW_ROWS, (max(TILE_ROWS, group) + LANES - 1) // LANES * LANES)
    tops, totals, decays = scratch(tile), scratch(tile), scratch(tile)
    queries, keys = scratch(tile * width), scratch(max(TILE_TOKENS, tile) * width)
    scores, acc = scratch(tile * CHUNK), scratch(tile * (width + LANES))
    grid = scratch(grid_size(job) * (CHUNK // LANES))
    taken = 0
    while True:
        task = take(job.address)
        if task >= job.tasks:
            return taken
        taken += 1
        seq = _owner(job, task)
        task -= read_int32(job.first_task, seq)
        part, head = task // job.kv_heads, task % job.kv_heads
        start, count, context = chunk_of(job, seq)
        rows, stride = count * group, width + LANES
        if rows > FEW_ROWS:
            online = tops, totals, decays
            if job.pairs:
                many_rows_of_pairs(job, seq, head, part, online, queries, keys, scores, acc)
            else:
                _many_rows(job, seq, head, part, *online, queries, keys, scores, acc, grid)
            continue
        chunk = part + first_chunk(job, count, context)
        if job.pairs:
            few_rows_of_pairs(job, seq, head, chunk, queries, scores, acc, keys)
        else:
            _few_rows(job, seq, head, chunk, queries, scores, acc, keys, grid)
        row = read_int32(job.first_row, seq)
        if read_int32(job.first_row, seq + 1) == row:
            store_rows(job, start, head, rows, acc, stride, acc[width + 1 :], stride)
        else:
            target = job.partial + (row + task * rows) * stride * 4
            copy_bytes(target, address(acc, 0), rows * stride * 4)


@helper
def combine_tasks(job):
    """Folds the partial results of contexts that span several chunks, in the order of chunks; how
    many tasks this thread took."""
    group = job.heads // job.kv_heads
    width = (job.head_dim + LANES - 1) // LANES * LANES
    stride = width + LANES
    acc, totals = scratch(FEW_ROWS * stride), scratch(FEW_ROWS)
    taken = 0
    while True:
        task = take(job.address)
        if task >= job.seqs * job.kv_heads:
            return taken
        taken += 1
        seq, head = task // job.kv_heads, task % job.kv_heads
        start, count, _ = chunk_of(job, seq)
        rows = count * group
        first, last = read_int32(job.first_row, seq), read_int32(job.first_row, seq + 1)
        if first == last:
            continue
        chunks = (last - first) // (rows * job.kv_heads)
        partial = carray(float_pointer(job.partial), (job.rows, stride))
        for r in range(rows):
            own = partial[first + head * rows + r : last : rows * job.kv_heads]
            top = np.float32(LOWEST)
            for i in range(chunks):
                top = max(top, own[i, width])
            line = acc[r * stride : r * stride + width]
            line[:], total = 0, np.float32(0)
            for i in range(chunks):
                weight = np.float32(2.0 ** (own[i, width] - top))
                total += weight * own[i, width + 1]
                for d in range(width):
                    line[d] += weight * own[i, d]
            totals[r] = total
        store_rows(job, start, head, rows, acc, stride, totals, 1)


def build(primitives):
    """Compiles the C functions, or loads them from disk: (plan, attend, combine, store).

    `primitives` names the state of the modules whose code is inlined here. It takes part only in
    the key of Numba's on-disk cache, which by itself sees changes of this file alone.
    """
    options = {"cache": True, "error_model": "numpy", "nopython": True}

    @cfunc(_WORKER, **options)
    def plan(pointer):
        len(primitives)
        plan_tasks(carray(pointer, 1)[0])

    @cfunc(_WORKER, **options)
    def attend(pointer):
        len(primitives)
        attend_tasks(carray(pointer, 1)[0])

    @cfunc(_WORKER, **options)
    def combine(pointer):
        len(primitives)
        combine_tasks(carray(pointer, 1)[0])

    @cfunc(_WORKER, **options)
    def store(pointer):
        len(primitives)
        store_tokens(carray(pointer, 1)[0])

    return plan, attend, combine, store
