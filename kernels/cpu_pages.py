"""Where a token lies in the pages, how it is read, and how it is written: Numba, for CPUs.

A `Job` is one call of an op as the compiled code sees it. Pages are addressed in bytes, whatever
their format:

    tile = pages + (block * kv_heads + head) * tile_bytes
    codes of a token at tile + offset * row_bytes, its scales at tile + scales_at + ...
"""

import numpy as np
from numba import from_dtype, njit

from kernels.cpu_formats import (
    FLOAT32,
    FP8,
    INT4,
    INT8,
    encode_groups,
    encode_row,
    load_grid,
    load_groups,
    load_row,
    read_bfloat16,
    scale_rows,
)
from kernels.cpu_simd import copy_bytes, prefetch, read_int32, take
from kernels.cpu_vectors import LANES

_INTEGERS = (
    *("address", "tasks", "rows", "work", "seqs", "heads", "kv_heads", "head_dim", "block_size"),
    *(
        *("pairs", "threads"),
        "max_blocks",
        "window",
        "query",
        "query_format",
        "query_stride",
        "out",
        "out_stride",
    ),
    # Pages: the distance from keys to values, of tiles, of tokens in a tile, and where scales
    # and zero points start in a tile, all in bytes; groups per token, 0 in plain pages.
    *("pages", "page_format", "values", "tile_bytes", "row_bytes"),
    *("scales_at", "zeros_at", "groups"),
    *("tables", "lens", "starts", "first_task", "first_row", "partial"),
    *("key", "key_stride", "value", "value_stride", "source_format", "slots", "tokens"),
)
# pairs: whether bfloat16 queries and pages are multiplied as pairs (`cpu_pairs`)
# threads: how many will probably work on it
JOB = np.dtype(
    [("next", np.int64), ("pad", np.int64, 7)]  # the counter has a cache line of its own
    + [(name, np.int64) for name in _INTEGERS]
    # unit: what codes with a scale per token must be multiplied with, besides that scale
    + [("scale", np.float64), ("softcap", np.float64), ("unit", np.float64)]
)
RECORD = from_dtype(JOB)
helper = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
GRIDS_AHEAD = 128
AHEAD = 32  # tokens between use and prefetch, which the hardware cannot guess across blocks
TOKENS_PER_STORE = 128


@helper
def scratch(floats):
    """Uninitialized float32 scratch that starts on a cache line."""
    raw = np.empty(floats + LANES, np.float32)
    skip = (-(raw.ctypes.data // 4)) % LANES
    return raw[skip : skip + floats]


@helper
def address(array, at):
    return array.ctypes.data + at * 4


@helper
def num_bytes(fmt, count):
    """Bytes of `count` numbers of a format, without scales."""
    if fmt == FLOAT32:
        return count * 4
    if fmt == INT4:
        return count // 2
    return count if fmt in (INT8, FP8) else count * 2


@helper
def tile_of(job, base, table, head, token):
    """(tile of the block that holds `token`, offset of the token in it)."""
    block = read_int32(table, token // job.block_size)
    tile = base + (block * job.kv_heads + head) * job.tile_bytes
    return tile, token % job.block_size


@helper
def has_token_scales(job):
    return job.page_format in (INT8, FP8)


@helper
def grid_size(job):
    """Numbers in a grid (`cpu_formats`) of LANES tokens; at least 1."""
    return 2 * LANES * job.groups if job.page_format == INT4 else 1


@helper
def grid_at(job, grid, token):
    """Address of a token's entries among grids that follow each other."""
    if job.page_format != INT4:
        return address(grid, 0)
    return address(grid, token // LANES * grid_size(job) + token % LANES * job.groups)


@helper
def load_grids(job, base, table, head, origin, end, grid, wanted):
    """The grids of the tokens [origin, end), if this is INT4 and they are `wanted`.

    All at once: read right after they were written, they took as long as all other work.
    """
    if job.page_format == INT4 and wanted:
        for token in range(origin, end, LANES):
            tile, offset = tile_of(job, base, table, head, token)
            if base == job.pages:
                _prefetch_grid(job, tile + job.values, offset)  # the values' turn comes next
                if token + GRIDS_AHEAD < end:
                    ahead, place = tile_of(job, base, table, head, token + GRIDS_AHEAD)
                    _prefetch_grid(job, ahead, place)
            _load_grid(job, tile, offset, LANES, grid_at(job, grid, token - origin))


@helper
def _prefetch_grid(job, tile, offset):
    prefetch(tile + job.scales_at + offset * job.groups * 2, 64 * job.groups)
    prefetch(tile + job.zeros_at + offset * job.groups, 64)


@helper
def _load_grid(job, tile, offset, count, grid):
    scales = tile + job.scales_at + offset * job.groups * 2
    zeros = tile + job.zeros_at + offset * job.groups
    load_grid(scales, zeros, grid, count * job.groups, LANES * job.groups)


@helper
def fold_scales(job, tile, offset, rows, stride, count):
    """Multiplies rows of LANES scores or weights with the scales of LANES tokens of one tile."""
    if has_token_scales(job):
        scale_rows(rows, stride, count, tile + job.scales_at + offset * 2, np.float32(job.unit))


@helper
def prefetch_tokens(job, base, table, head, token, end):
    """Brings the LANES tokens that `token` falls among into the cache, scales too."""
    if token < end:
        tile, offset = tile_of(job, base, table, head, token // LANES * LANES)
        # Quantized tiles start anywhere in a line.
        prefetch(tile + offset * job.row_bytes, LANES * job.row_bytes + 32 * min(job.groups, 1))
        if has_token_scales(job):
            prefetch(tile + job.scales_at + offset * job.groups * 2, 64)


@helper
def gather(job, base, table, head, token, count, target, width, grid):
    """Converts `count` tokens of one head to float32 rows of `width`, whatever their blocks."""
    for t in range(count):
        tile, offset = tile_of(job, base, table, head, token + t)
        source, to = tile + offset * job.row_bytes, address(target, t * width)
        if job.page_format == INT4:
            _load_grid(job, tile, offset, 1, address(grid, 0))
            load_groups(source, address(grid, 0), to, job.groups, LANES * job.groups)
        else:
            factor = np.float32(1)
            if has_token_scales(job):
                factor = read_bfloat16(tile + job.scales_at + offset * 2) * np.float32(job.unit)
            load_row(job.page_format, source, to, job.head_dim, factor)


@helper
def encode(job, source, tile, offset, line):
    """Writes one row of a head into a tile; `line` is scratch of whole vectors."""
    codes = tile + offset * job.row_bytes
    if job.groups == 0:
        copy_bytes(codes, source, job.row_bytes)
        return
    numbers, padded = address(line, 0), len(line)
    load_row(job.source_format, source, numbers, job.head_dim, np.float32(1))
    scales = tile + job.scales_at + offset * job.groups * 2
    if job.page_format == INT4:
        zeros = tile + job.zeros_at + offset * job.groups
        encode_groups(numbers, codes, scales, zeros, job.groups)
    else:
        encode_row(job.page_format, numbers, codes, scales, job.head_dim, padded)


@helper
def store_tokens(job):
    """Writes new keys and values into their slots, TOKENS_PER_STORE tokens per task."""
    size = num_bytes(job.source_format, 1)
    line = scratch((job.head_dim + LANES - 1) // LANES * LANES)
    while True:
        first = take(job.address) * TOKENS_PER_STORE
        if first >= job.tokens:
            return
        for token in range(first, min(first + TOKENS_PER_STORE, job.tokens)):
            slot = read_int32(job.slots, token)
            if slot < 0:
                continue
            block, offset = slot // job.block_size, slot % job.block_size
            for head in range(job.kv_heads):
                tile = job.pages + (block * job.kv_heads + head) * job.tile_bytes
                key = job.key + (token * job.key_stride + head * job.head_dim) * size
                value = job.value + (token * job.value_stride + head * job.head_dim) * size
                encode(job, key, tile, offset, line)
                encode(job, value, tile + job.values, offset, line)
