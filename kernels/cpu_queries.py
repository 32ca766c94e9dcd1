"""Which rows of queries a task of paged attention has, what they see, and where results go.

A row is one query head of one token. Those of a K/V head lie together: row r is query r // group,
head r % group of the group.
"""

import numpy as np

from kernels.cpu_formats import store_row
from kernels.cpu_pages import address, helper, num_bytes
from kernels.cpu_simd import read_int32

CHUNK = 512
"""Tokens of context per task of few rows."""
FEW_ROWS = 16
TILE_ROWS = 64
TILE_TOKENS = 64


@helper
def chunk_of(job, seq):
    """(first query row, queries, context length) of one sequence."""
    context = read_int32(job.lens, seq)
    if job.starts == 0:
        return seq, min(context, 1), context
    start = read_int32(job.starts, seq)
    return start, read_int32(job.starts, seq + 1) - start, context


@helper
def first_seen(job, position):
    return max(0, position - job.window + 1) if job.window > 0 else 0


@helper
def first_chunk(job, queries, context):
    return first_seen(job, context - queries) // CHUNK


@helper
def store_rows(job, start, head, rows, acc, stride, totals, step):
    """Writes acc[r] / total[r] to the output."""
    group, dim = job.heads // job.kv_heads, job.head_dim
    size = num_bytes(job.query_format, 1)
    for r in range(rows):
        index = (start + r // group) * job.out_stride + (head * group + r % group) * dim
        factor = np.float32(1) / totals[r * step]
        target = job.out + index * size
        store_row(job.query_format, address(acc, r * stride), target, dim, factor)


@helper
def mask(job, scores, padded, token, count, position, group):
    """Hides from every query what it does not see: whole prefixes and suffixes of columns."""
    for t in range(count):
        ahead = min(max(0, (token + t - position) * group), padded)
        scores[t * padded : t * padded + ahead] = -np.inf
        if job.window > 0:
            left = min(max(0, (token + t + job.window - position) * group), padded)
            scores[t * padded + left : (t + 1) * padded] = -np.inf
