"""Times paged attention against gathering the blocks and calling torch's SDPA.

`python -m benchmarks.attention` prints a table for this machine: Numba on a CPU, Triton on a CUDA
device. The two take turns within each round, so that a busy machine slows both alike; the table
gives the median over the rounds and the range in brackets.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import Backend, backend


@dataclass(frozen=True)
class Shape:
    """One measurement: `queries` new tokens of each of `seqs` sequences of `context` tokens."""

    seqs: int
    context: int
    queries: int
    dtype: torch.dtype
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values in all contexts."""
        numbers = 2 * self.seqs * self.context * self.kv_heads * self.head_dim
        return numbers * self.dtype.itemsize

    def __str__(self) -> str:
        kind = "decode " if self.queries == 1 else "prefill"
        name = str(self.dtype).removeprefix("torch.")
        return f"{kind} {self.seqs:3} x {self.queries:4} of {self.context:5} {name:8}"


def prepare(
    shape: Shape, device: torch.device, chosen: Backend
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The two calls to compare, over the same shuffled blocks: (paged, gather and SDPA)."""
    per_seq = -(-shape.context // shape.block_size)
    blocks = shape.seqs * per_seq + 1
    size = (2, blocks, shape.kv_heads, shape.block_size, shape.head_dim)
    pages = torch.randn(size, device=device).to(shape.dtype)
    tables = torch.randperm(blocks, device=device)[: shape.seqs * per_seq]
    tables = tables.view(shape.seqs, per_seq).int()
    lens = torch.full((shape.seqs,), shape.context, dtype=torch.int32, device=device)
    tokens = shape.seqs * shape.queries
    query = torch.randn(tokens, shape.heads, shape.head_dim, device=device).to(shape.dtype)
    starts = torch.arange(0, tokens + 1, shape.queries, dtype=torch.int32, device=device)
    scale = shape.head_dim**-0.5
    causal = torch.ones(shape.queries, shape.context, dtype=torch.bool, device=device)
    causal = causal.tril(shape.context - shape.queries)

    def paged() -> Tensor:
        if shape.queries == 1:
            return chosen.paged_decode(
                query, pages, tables, lens, scale=scale, max_context_len=shape.context
            )
        longest = shape.queries
        return chosen.paged_prefill(
            query, pages, tables, lens, starts, max_query_len=longest, scale=scale
        )

    def gathered() -> Tensor:
        rows = pages[:, tables.long()].transpose(
            2, 3
        )  # [2, seqs, kv_heads, blocks, block_size, head_dim]
        rows = rows.reshape(2, shape.seqs, shape.kv_heads, -1, shape.head_dim)
        dense = query.view(shape.seqs, shape.queries, shape.heads, -1).transpose(1, 2)
        whole = shape.queries == shape.context
        mask = None if whole or shape.queries == 1 else causal
        return F.scaled_dot_product_attention(
            dense, rows[0], rows[1], attn_mask=mask, is_causal=whole, enable_gqa=True
        )

    return paged, gathered


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def show(times: list[float]) -> str:
    low, middle, high = (1e3 * f(times) for f in (min, statistics.median, max))
    return f"{middle:9.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    chosen = backend(device)
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    sizes = [(16, 1024, 1), (1, 1024, 1), (1, 8192, 1), (16, 64, 1)]
    sizes += [(1, 1024, 1024), (1, 2048, 256), (4, 256, 256)]
    if device.type == "cuda":
        sizes += [(64, 4096, 1), (256, 2048, 1), (1, 65536, 1), (4, 8192, 8192)]
    threads = torch.get_num_threads()
    print(f"{chosen.name} on {device.type}, torch {torch.__version__}, {threads} CPU threads")
    print(f"ms, median [min, max] of {options.rounds} rounds; GB/s of keys and values\n")
    header = f"{'paged':28} {'gather + SDPA':28} {'ratio':>6} {'GB/s':>7}"
    print(f"{'(16/8 heads of 128, block 16)':38} {header}")
    for dtype in dtypes:
        for size in sizes:
            shape = Shape(*size, dtype)
            calls = prepare(shape, device, chosen)
            torch.testing.assert_close(
                calls[0]().view(-1), calls[1]().transpose(1, 2).reshape(-1), atol=2e-2, rtol=2e-2
            )
            rounds = [[seconds(call, device) for call in calls] for _ in range(options.rounds)]
            paged, gathered = (list(times) for times in zip(*rounds, strict=True))
            middle = statistics.median(paged)
            ratio = statistics.median(gathered) / middle
            speed = shape.cache_bytes / middle / 1e9
            print(f"{shape!s:38} {show(paged):28} {show(gathered):28} {ratio:6.2f} {speed:7.1f}")


if __name__ == "__main__":
    main()
