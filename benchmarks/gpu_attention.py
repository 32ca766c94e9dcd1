"""How close to the memory's limit does the Triton decode kernel read the KV cache?

    python -m benchmarks.gpu_attention --json attention.json    # on a CUDA device, below 10 minutes
    TRITON_INTERPRET=1 python -m benchmarks.gpu_attention --device cpu       # tiny, proves it runs

Every point is one layer's decode attention: a batch whose block tables are drawn from a shuffled
pool of several GB. The calls of a measurement, each over tables of its own, are one CUDA graph; L2
is overwritten before each replay, and events stand around it. The ceiling is that of a kernel which
only reads, measured first. Other attention kernels take part where they can be imported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_choices import BATCHES, CONTEXTS
from kernels.paged_decode import count_processors, paged_decode

HEADS = ("32/8x128", "16/8x128", "32/8x64")
BLOCK = 16
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
PEER_BYTES = 4 << 30  # gathered copies of more are left out
COMPILED = ((8, 1024), (8, 8192))  # batch, context of what flex is compiled for
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Point:
    """One measurement: `batch` sequences of `context` tokens."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int

    @classmethod
    def named(cls, name: str, batch: int, context: int) -> Point:
        """name: heads/kv_headsxhead_dim"""
        heads, rest = name.split("/")
        return cls(int(heads), *map(int, rest.split("x")), batch, context)

    @property
    def name(self) -> str:
        return f"{self.heads}/{self.kv_heads}x{self.head_dim}"

    @property
    def blocks(self) -> int:
        return self.batch * -(-self.context // BLOCK)

    def cache_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values that have to be read."""
        return 2 * self.batch * self.context * self.kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class Times:
    """Of one call, in microseconds, over the repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:9.1f} [{self.low:.1f}, {self.high:.1f}]"


class Clock:
    """Times calls on a device: `repeats` rounds over all calls of a measurement."""

    def __init__(self, device: torch.device, repeats: int):
        self.device, self.repeats = device, repeats
        self.flush: Tensor | None = None
        if device.type == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, calls: list[Callable[[], object]], graph: bool = True) -> Times:
        """The time of one of `calls`. Each should read memory of its own.

        graph: replay them as one CUDA graph; without it, the host's launches are timed, too
        """
        run = self._captured(calls) if graph and self.flush is not None else _in_turn(calls)
        run()
        times = sorted(1e6 * self._seconds(run) / len(calls) for _ in range(self.repeats))
        return Times(statistics.median(times), times[0], times[-1])

    def _captured(self, calls: list[Callable[[], object]]) -> Callable[[], object]:
        torch.cuda.synchronize(self.device)
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            calls[0]()  # compiles
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        return graph.replay

    def _seconds(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    def run() -> None:
        for call in calls:
            call()

    return run


@triton.jit
def read_kernel(source, found, pieces, PIECE: tl.constexpr):
    """Folds 32-bit words and writes one number per program, so that no load is left out."""
    total = tl.zeros([PIECE], tl.int32)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        words = piece * PIECE + tl.arange(0, PIECE)  # fewer than 2**31
        total ^= tl.load(source + words, eviction_policy="evict_first")
    tl.store(found + tl.program_id(0), tl.max(total))


def measure_ceiling(memory: Tensor, clock: Clock) -> float:
    """Bytes per second that a kernel which only reads gets of `memory`, the best of a few sizes."""
    words = memory.view(-1).view(torch.int32)
    best, piece = 0.0, 4096 if clock.flush is not None else 64
    for programs in (2, 4, 8, 16):
        grid = programs * count_processors(memory.device)
        found = torch.empty(grid, dtype=torch.int32, device=memory.device)
        pieces = words.numel() // piece

        def call(grid: int = grid, found: Tensor = found, pieces: int = pieces) -> None:
            read_kernel[(grid,)](words, found, pieces, PIECE=piece, num_warps=8)

        best = max(best, 4 * pieces * piece / clock([call]).median * 1e6)
    return best


@dataclass
class Batch:
    """The inputs of one call."""

    query: Tensor  # [seqs, heads, head_dim]
    pages: Tensor  # [2, num_blocks, kv_heads, BLOCK, head_dim]
    tables: Tensor  # [seqs, blocks per sequence] int32
    lens: Tensor  # [seqs] int32
    context: int

    @property
    def scale(self) -> float:
        return float(self.query.shape[2] ** -0.5)


def draw_batches(point: Point, pages: Tensor, count: int) -> list[Batch]:
    """Batches over blocks of a shuffled pool, no block twice in a batch and, as long as the pool
    lasts, none in two."""
    device, num_blocks = pages.device, pages.shape[1]
    order = torch.randperm(num_blocks, device=device).int()
    lens = torch.full((point.batch,), point.context, dtype=torch.int32, device=device)
    batches = []
    for index in range(count):
        first = index * point.blocks % max(num_blocks - point.blocks, 1)
        tables = order[first : first + point.blocks].view(point.batch, -1).contiguous()
        query = torch.randn(point.batch, point.heads, point.head_dim, device=device)
        batches.append(Batch(query.to(pages.dtype), pages, tables, lens, point.context))
    return batches


def ours(batch: Batch) -> Callable[[], Tensor]:
    out = torch.empty_like(batch.query)

    def call() -> Tensor:
        return paged_decode(
            batch.query, batch.pages, batch.tables, batch.lens, scale=batch.scale, out=out
        )

    return call


def sdpa(batch: Batch) -> Callable[[], Tensor]:
    """torch's attention over a contiguous copy of the blocks."""

    def call() -> Tensor:
        keys, values = _gathered(batch)
        query = batch.query.unsqueeze(2)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True).squeeze(2)

    return call


def flex(batch: Batch) -> Callable[[], Tensor]:
    """torch's compiled flex_attention over a contiguous copy of the blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)  # anew for each shape: seconds

    def call() -> Tensor:
        keys, values = _gathered(batch)
        query = batch.query.unsqueeze(2)
        return compiled(query, keys, values, enable_gqa=True).squeeze(2)

    return call


def _gathered(batch: Batch) -> Iterator[Tensor]:
    rows = batch.pages[:, batch.tables.long()].transpose(2, 3)
    seqs, kv_heads, head_dim = len(batch.lens), batch.pages.shape[2], batch.pages.shape[4]
    return iter(rows.reshape(2, seqs, kv_heads, -1, head_dim)[:, :, :, : batch.context])


def flash_attention_3(batch: Batch) -> Callable[[], Tensor]:
    from flash_attn_interface import flash_attn_with_kvcache

    keys, values = batch.pages.transpose(2, 3)  # views: [num_blocks, BLOCK, kv_heads, head_dim]

    def call() -> Tensor:
        return flash_attn_with_kvcache(
            batch.query.unsqueeze(1),
            keys,
            values,
            cache_seqlens=batch.lens,
            page_table=batch.tables,
            softmax_scale=batch.scale,
        ).squeeze(1)

    return call


def flashinfer(batch: Batch) -> Callable[[], Tensor]:
    import flashinfer as package

    seqs, per_seq = batch.tables.shape
    work = torch.empty(128 << 20, dtype=torch.uint8, device=batch.query.device)
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(work, "HND", use_tensor_cores=True)
    starts = torch.arange(0, seqs * per_seq + 1, per_seq, dtype=torch.int32)
    last = torch.full((seqs,), (batch.context - 1) % BLOCK + 1, dtype=torch.int32)
    wrapper.plan(
        starts.to(batch.query.device),
        batch.tables.view(-1),
        last.to(batch.query.device),
        batch.query.shape[1],
        batch.pages.shape[2],
        batch.query.shape[2],
        BLOCK,
        q_data_type=batch.query.dtype,
        kv_data_type=batch.pages.dtype,
    )
    return lambda: wrapper.run(batch.query, (batch.pages[0], batch.pages[1]))


PEERS: dict[str, Callable[[Batch], Callable[[], Tensor]]] = {
    "flash-attention 3": flash_attention_3,
    "flashinfer": flashinfer,
    "gather + sdpa": sdpa,
    "gather + flex": flex,
}


class Field:
    """The peers that take part: one that fails once is left out and its error kept."""

    def __init__(self, names: list[str]):
        self.names = names
        self.absent: dict[str, str] = {}

    def measure(self, batches: list[Batch], clock: Clock) -> dict[str, Times]:
        """Times of those that work and agree with us."""
        want, found = ours(batches[0])(), {}
        few = len(batches[0].lens), batches[0].context
        for name in self.names:
            if name in self.absent or (name == "gather + flex" and few not in COMPILED):
                continue
            try:
                calls = [PEERS[name](batch) for batch in batches]
                torch.testing.assert_close(calls[0](), want, atol=TOLERANCE, rtol=TOLERANCE)
                found[name] = clock(calls)
            except Exception as error:  # of packages that we know nothing of
                self.absent[name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        return found


@dataclass(frozen=True)
class Row:
    """What a point gave."""

    heads: str
    batch: int
    context: int
    cache_bytes: int
    ours: Times
    of_ceiling: float
    peers: dict[str, Times]

    def __str__(self) -> str:
        rates = "  ".join(
            f"{name} {t.median / self.ours.median:.2f}" for name, t in self.peers.items()
        )
        size = f"{self.heads:9} {self.batch:4} {self.context:6} {self.cache_bytes / 1e6:9.1f}"
        speed = f"{self.cache_bytes / self.ours.median / 1e3:8.1f} {self.of_ceiling:6.1%}"
        return f"{size} {self.ours!s:30} {speed}  {rates}"


def pool(points: list[Point], dtype: torch.dtype, device: torch.device, limit: int) -> Tensor:
    """Random pages large enough for the largest of the points that stays below `limit` bytes, and
    at least an eighth of that limit."""
    first = points[0]
    block = first.cache_bytes(dtype.itemsize) // (first.batch * first.context) * BLOCK
    sizes = [point.blocks * block for point in points]
    size = max([limit // 8, *(size for size in sizes if size <= limit)])
    shape = (2, size // block + 1, first.kv_heads, BLOCK, first.head_dim)
    return torch.empty(shape, dtype=dtype, device=device).normal_()


def calls_per_graph(point: Point, pages: Tensor) -> int:
    """Enough to hide the start of a graph, few where one call is long or interpreted."""
    most = 16 if pages.is_cuda else 1
    return max(1, min(most, (4 << 30) // point.cache_bytes(pages.itemsize)))


def measure(
    points: list[Point], pages: Tensor, clock: Clock, field: Field, ceiling: float, until: float
) -> Iterator[Row]:
    for point in points:
        size = point.cache_bytes(pages.itemsize)
        if point.blocks > pages.shape[1] or time.monotonic() > until:
            print(f"{point.name:9} {point.batch:4} {point.context:6} left out", flush=True)
            continue
        batches = draw_batches(point, pages, calls_per_graph(point, pages))
        times = clock([ours(batch) for batch in batches])
        peers = field.measure(batches, clock) if size <= PEER_BYTES else {}
        share = size / times.median * 1e6 / ceiling
        row = Row(point.name, point.batch, point.context, size, times, share, peers)
        print(row, flush=True)
        yield row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--heads", nargs="+", default=list(HEADS), metavar="32/8x128")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--pool-gib", type=float, default=40)
    parser.add_argument("--minutes", type=float, default=9, help="start no point after so many")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device, until = torch.device(options.device), time.monotonic() + 60 * options.minutes
    batches, contexts, dtype = BATCHES, CONTEXTS, torch.bfloat16
    machine = f"torch {torch.__version__}, triton {triton.__version__}"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("no GPU can be used here", file=sys.stderr)
            return 2
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    else:  # the interpreter: small, and in a type in which it computes correctly
        batches, contexts, dtype = (1, 2), (20, 130), torch.float16
        options.heads, options.pool_gib, options.repeats = ["4/2x32"], 1e-3, 1
    print(machine)
    clock, field, rows, ceiling = Clock(device, options.repeats), Field(options.peers), [], 0.0
    for name in options.heads:
        points = [Point.named(name, b, c) for b in batches for c in contexts]
        pages = pool(points, dtype, device, int(options.pool_gib * (1 << 30)))
        if not rows:
            ceiling = measure_ceiling(pages[0].view(-1)[: 1 << 31], clock)
            print(f"reading alone: {ceiling / 1e9:.1f} GB/s; us per call, median [min, max]")
            print(
                "heads     batch context  KV in MB  us"
                + " " * 29
                + "GB/s   share  peers: x our time"
            )
        rows += measure(points, pages, clock, field, ceiling, until)
        del pages
    for name, reason in field.absent.items():
        print(f"{name} left out: {reason}")
    if options.json:
        found: dict[str, object] = {"machine": machine, "ceiling": ceiling, "absent": field.absent}
        options.json.write_text(
            json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
