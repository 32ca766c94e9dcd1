"""Paged attention on CPUs: the contract of `kernels.reference`, compiled by Numba.

This half turns tensors into a `Job` record; `cpu_kernels` does the work on a `cpu_team`.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from kernels import (
    cpu_formats,
    cpu_pages,
    cpu_pair_attention,
    cpu_pairs,
    cpu_queries,
    cpu_simd,
    cpu_vectors,
)
from kernels.cpu_kernels import build
from kernels.cpu_pages import JOB, TOKENS_PER_STORE
from kernels.cpu_team import WORKER, fingerprint, run
from kernels.pages import Pages, QuantizedPages, row_bytes

_FORMATS = {
    torch.float32: cpu_formats.FLOAT32,
    torch.bfloat16: cpu_formats.BFLOAT16,
    torch.float16: cpu_formats.FLOAT16,
}
_CODES = {
    "int8": cpu_formats.INT8,
    "fp8_e4m3": cpu_formats.FP8,
    "int4": cpu_formats.INT4,
}
WORK_PER_THREAD = 1 << 19  # numbers of K/V that are worth waking another thread: 0.1 to 0.2 ms


def store_kv(key: Tensor, value: Tensor, pages: Pages, slot_mapping: Tensor) -> None:
    """Writes new keys and values into their slots, in place (see `kernels.reference`)."""
    dtype = key.dtype if isinstance(pages, QuantizedPages) else pages.dtype
    key, value = _rows(key.to(dtype)), _rows(value.to(dtype))
    slots = slot_mapping.to(torch.int32).contiguous()
    job = _job(
        pages,
        key=key.data_ptr(),
        key_stride=key.stride(0),
        value=value.data_ptr(),
        value_stride=value.stride(0),
        source_format=_FORMATS[dtype],
        slots=slots.data_ptr(),
        tokens=len(key),
    )
    run(_workers()[3], job, -(-len(key) // TOKENS_PER_STORE))


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
) -> Tensor:
    """One new token per sequence over its paged context (see `kernels.reference`)."""
    return _attend(query, pages, block_tables, context_lens, None, scale, window, softcap, out)


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
    return _attend(
        query, pages, block_tables, context_lens, query_start, scale, window, softcap, out
    )


def _attend(query, pages, tables, lens, starts, scale, window, softcap, out):
    query = _rows(query)
    out = torch.empty(query.shape, dtype=query.dtype) if out is None else out
    seqs = len(lens)
    marks = torch.empty(2, seqs + 1, dtype=torch.int32)  # first task and first partial row
    job = _job(
        pages,
        seqs=seqs,
        heads=query.shape[1],
        max_blocks=tables.stride(0),
        window=window,
        query=query.data_ptr(),
        query_format=_FORMATS[query.dtype],
        query_stride=query.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        tables=tables.data_ptr(),
        lens=lens.data_ptr(),
        starts=0 if starts is None else starts.data_ptr(),
        first_task=marks.data_ptr(),
        first_row=marks.data_ptr() + 4 * (seqs + 1),
        scale=scale,
        softcap=softcap,
        pairs=not softcap and pairs_fit(pages, query.dtype),
    )
    plan, attend, combine, _ = _workers()
    plan(job.ctypes.data)
    rows = int(job["rows"])
    if rows:
        width = partial_width(query.shape[2])
        partial = torch.empty(rows, width, dtype=torch.float32)
        job["partial"] = partial.data_ptr()
    shares = -(-int(job["work"]) // WORK_PER_THREAD)
    job["threads"] = min(torch.get_num_threads(), shares)
    run(attend, job, min(int(job["tasks"]), shares))
    if rows:
        job["next"] = 0
        run(combine, job, rows * width // WORK_PER_THREAD)
    return out


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with each token's [heads, head_dim] contiguous, copied only if it is not."""
    if tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]:
        return tensor
    return tensor.contiguous()


def _job(pages: Pages, **fields) -> np.ndarray:
    job = np.zeros((), JOB)
    fields |= page_fields(pages)
    fields["address"] = job.ctypes.data
    for name, value in fields.items():
        job[name] = value
    return job


def pairs_fit(pages: Pages, query: torch.dtype) -> bool:
    """Whether pages and queries can be multiplied as pairs of bfloat16 (`cpu_pair_attention`)."""
    if isinstance(pages, QuantizedPages) or not query == pages.dtype == torch.bfloat16:
        return False
    _, _, _, block_size, head_dim = pages.shape
    return cpu_pairs.has_bfloat16() and head_dim % 32 == 0 and block_size % cpu_vectors.LANES == 0


def partial_width(head_dim: int) -> int:
    """Numbers in a partial result: the sum of values, and a vector of maximum and weights."""
    return -(-head_dim // cpu_vectors.LANES) * cpu_vectors.LANES + cpu_vectors.LANES


def page_fields(pages: Pages) -> dict[str, float]:
    """What a job must know of the pages."""
    return _quantized(pages) if isinstance(pages, QuantizedPages) else _plain(pages)


def _plain(pages: Tensor) -> dict[str, float]:
    _, _, kv_heads, block_size, head_dim = pages.shape
    row = head_dim * pages.itemsize
    return {
        "kv_heads": kv_heads,
        "block_size": block_size,
        "head_dim": head_dim,
        "pages": pages.data_ptr(),
        "page_format": _FORMATS[pages.dtype],
        "values": pages.stride(0) * pages.itemsize,
        "tile_bytes": block_size * row,
        "row_bytes": row,
    }


def _quantized(pages: QuantizedPages) -> dict[str, float]:
    row, groups = row_bytes(pages.format, pages.head_dim)
    return {
        "kv_heads": pages.tiles.shape[2],
        "block_size": pages.block_size,
        "head_dim": pages.head_dim,
        "pages": pages.tiles.data_ptr(),
        "page_format": _CODES[pages.format],
        "values": pages.tiles.stride(0),
        "tile_bytes": pages.tiles.shape[3],
        "row_bytes": row,
        "scales_at": pages.block_size * row,
        "zeros_at": pages.block_size * (row + 2 * groups),
        "groups": groups,
        "unit": cpu_formats.FP8_UNIT if pages.format == "fp8_e4m3" else 1.0,
    }


@cache
def _workers():
    """The compiled C functions: plan, attend, combine, store."""
    numbers = cpu_vectors, cpu_formats, cpu_simd, cpu_pairs
    primitives = fingerprint(*numbers, cpu_pages, cpu_queries, cpu_pair_attention)
    return tuple(WORKER(function.address) for function in build(primitives))
