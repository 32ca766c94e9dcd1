"""Random paged-attention problems, and the answer computed without any paging.

Every slot that no token owns holds NaN, and with a window every slot that no query sees any more,
so a kernel that lets stale memory into a result fails.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import reference
from kernels.pages import Codes, Pages, QuantizedPages, decode, page_shape, tile_bytes


@dataclass
class Problem:
    """One call of an attention op, with each sequence's dense keys and values beside it."""

    query: Tensor  # [tokens, heads, head_dim]
    pages: Pages  # [2, num_blocks, kv_heads, block_size, head_dim]
    tables: Tensor  # [seqs, max_blocks] int32
    lens: Tensor  # [seqs] int32
    starts: Tensor  # [seqs + 1] int32
    dense: list[Tensor]  # per sequence [2, context_len, kv_heads, head_dim]

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5

    def to(self, device: torch.device) -> "Problem":
        pages = self.pages
        if isinstance(pages, QuantizedPages):
            pages = replace(pages, tiles=pages.tiles.to(device))
        else:
            pages = pages.to(device)
        tensors = (self.tables, self.lens, self.starts)
        rest = (tensor.to(device) for tensor in tensors)
        return Problem(self.query.to(device), pages, *rest, self.dense)


def make(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    lens: list[int],
    chunks: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """A problem with shuffled blocks. Without `chunks` every sequence has one query (decode)."""
    rng = torch.Generator().manual_seed(seed)
    per_seq = [-(-n // block_size) for n in lens]
    num_blocks = sum(per_seq) + 3
    order = torch.randperm(num_blocks, generator=rng).int()
    pages = torch.full((2, num_blocks, kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    tables = torch.zeros(len(lens), max(1, *per_seq) + 1, dtype=torch.int32)
    dense, used = [], 0
    for i, (context, blocks) in enumerate(zip(lens, per_seq, strict=True)):
        tables[i, :blocks] = order[used : used + blocks]
        used += blocks
        rows = torch.randn(2, context, kv_heads, head_dim, generator=rng).to(dtype)
        for t in range(context):
            pages[:, tables[i, t // block_size], :, t % block_size] = rows[:, t]
        dense.append(rows)
    counts = [1] * len(lens) if chunks is None else chunks
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    query = torch.randn(int(starts[-1]), heads, head_dim, generator=rng).to(dtype)
    return Problem(query, pages, tables, torch.tensor(lens, dtype=torch.int32), starts, dense)


def empty_pages(
    name: str, num_blocks: int, kv_heads: int, block_size: int, head_dim: int
) -> QuantizedPages:
    """Pages whose every byte is 0xff: scales are NaN, and so are the codes of fp8."""
    size = tile_bytes(name, block_size, head_dim)
    tiles = torch.full((2, num_blocks, kv_heads, size), 255, dtype=torch.uint8)
    return QuantizedPages(tiles, name, block_size, head_dim)


def quantized(problem: Problem, name: str) -> Problem:
    """The same problem on quantized pages. `dense` holds what the pages stand for, so that the
    attention kernels are compared without the loss of the codec."""
    _, num_blocks, kv_heads, block_size, head_dim = problem.pages.shape
    pages = empty_pages(name, num_blocks, kv_heads, block_size, head_dim)
    dense = []
    for table, rows in zip(problem.tables, problem.dense, strict=True):
        at = torch.arange(rows.shape[1])
        blocks, offsets = table[at // block_size].long(), at % block_size
        reference.store_kv(rows[0], rows[1], pages, blocks * block_size + offsets)
        parts = (
            None if part is None else part.transpose(2, 3)[:, blocks, offsets]
            for part in pages.parts
        )
        dense.append(decode(Codes(*parts), name))
    return replace(problem, pages=pages, dense=dense)


def naive(problem: Problem, window: int = 0, softcap: float = 0.0) -> Tensor:
    """The answer in float64, from the dense tensors."""
    tokens, heads, head_dim = problem.query.shape
    group = heads // page_shape(problem.pages)[0]
    answer = torch.zeros(tokens, heads, head_dim, dtype=torch.float64)
    bounds = problem.starts.tolist()
    for i, rows in enumerate(problem.dense):
        chunk, context = slice(bounds[i], bounds[i + 1]), rows.shape[1]
        if context == 0 or chunk.start == chunk.stop:
            continue
        keys, values = rows.double().repeat_interleave(group, dim=2)
        scores = torch.einsum("qhd,thd->hqt", problem.query[chunk].double(), keys) * problem.scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        age = torch.arange(chunk.stop - chunk.start)[:, None] - torch.arange(context)[None, :]
        age += context - (chunk.stop - chunk.start)  # position of the query minus that of the key
        hidden = (age < 0) | (age >= (window or context))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        answer[chunk] = torch.einsum("hqt,thd->qhd", weights, values)
    return answer


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest number of the answer; NaN counts as infinite."""
    difference = (got.double().cpu() - want).abs().max() / want.abs().max().clamp_min(1e-9)
    return float(difference.nan_to_num(nan=float("inf")))


def seen_pages(problem: Problem, window: int) -> Pages:
    """The pages as they are when the tokens behind the window of each first query are gone."""
    pages = problem.pages
    block_size = page_shape(pages)[1]
    counts = problem.starts.diff().tolist()
    gone = [
        (table[at // block_size], at % block_size)
        for table, context, count in zip(problem.tables, problem.lens.tolist(), counts, strict=True)
        for at in range(context - count - window + 1 if window else 0)
    ]
    if not gone:
        return pages
    blocks, offsets = (torch.tensor(list(places)) for places in zip(*gone, strict=True))
    if isinstance(pages, QuantizedPages):
        pages = replace(pages, tiles=pages.tiles.clone())
        for part in pages.parts:
            if part is not None:
                part.view(torch.uint8)[:, blocks, :, offsets] = 255
        return pages
    pages = pages.clone()
    pages[:, blocks, :, offsets] = float("nan")
    return pages


def run_decode(op, problem: Problem, **options) -> Tensor:
    return op(
        problem.query,
        seen_pages(problem, options.get("window", 0)),
        problem.tables,
        problem.lens,
        scale=problem.scale,
        **options,
    )


def run_prefill(op, problem: Problem, **options) -> Tensor:
    return op(
        problem.query,
        seen_pages(problem, options.get("window", 0)),
        problem.tables,
        problem.lens,
        problem.starts,
        max_query_len=int(problem.starts.diff().max()),
        scale=problem.scale,
        **options,
    )


def fused_store(kv_heads: int, head_dim: int, tokens: int, dtype: torch.dtype, seed: int = 0):
    """Keys and values as strided views of one projection's output, [tokens, kv_heads, dim]."""
    rng = torch.Generator().manual_seed(seed)
    width = 4 * kv_heads
    fused = torch.randn(tokens, width * head_dim, generator=rng).to(dtype)
    fused = fused.view(tokens, width, head_dim)
    return fused[:, 2 * kv_heads : 3 * kv_heads], fused[:, 3 * kv_heads :]
