"""Is this GPU computing the right thing? One command, one short table.

    python -m benchmarks.gpu_check               # kernels in bf16, then parity with transformers
    python -m benchmarks.gpu_check --device cpu  # the same checks of the CPU's kernels

Kernels are compared with the torch reference in float64 on the same inputs; the parity test of
the suite (greedy float32 answers against transformers, with preemption) then runs on the device.
Exit code 0 where everything agrees. Needs pytest and transformers beside the run-time packages.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels import dispatch, reference

CONTEXTS = (1, 15, 16, 17, 333, 2048, 8191)
HEADS = ((1, 1), (8, 8), (8, 2), (14, 2), (32, 8))
DIMS = (64, 80, 128)
BLOCK_SIZES = (16, 64)
WINDOWS = (0, 100)
TOLERANCE = 1e-2  # largest difference over the largest value, bf16 against float64


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    window: int


def cases() -> Iterator[Case]:
    for (heads, kv_heads), *rest in itertools.product(HEADS, DIMS, BLOCK_SIZES, WINDOWS):
        yield Case(heads, kv_heads, *rest)


@dataclass
class Batch:
    """Sequences of every length in CONTEXTS in a shuffled pool, and the queries of their last
    `query_lens` tokens."""

    pages: Tensor
    tables: Tensor
    lens: Tensor
    query: Tensor
    starts: Tensor
    query_lens: list[int]

    def double(self) -> Batch:
        return Batch(
            self.pages.double(),
            self.tables,
            self.lens,
            self.query.double(),
            self.starts,
            self.query_lens,
        )


def make_batch(case: Case, query_lens: list[int], device: torch.device) -> Batch:
    """bf16 keys and values, written through the backend's own store kernel."""
    generator = torch.Generator().manual_seed(0)
    per_seq = [-(-context // case.block_size) for context in CONTEXTS]
    num_blocks = sum(per_seq) + 3
    order = torch.randperm(num_blocks, generator=generator).int()
    tables = torch.zeros(len(CONTEXTS), max(per_seq), dtype=torch.int32)
    for row, (start, count) in enumerate(
        zip(itertools.accumulate(per_seq, initial=0), per_seq, strict=False)
    ):
        tables[row, :count] = order[start : start + count]
    shape = (2, num_blocks, case.kv_heads, case.block_size, case.head_dim)
    pages = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    store = dispatch.backend(device).store_kv
    for row, context in enumerate(CONTEXTS):
        at = torch.arange(context)
        slots = tables[row, at // case.block_size] * case.block_size + at % case.block_size
        kv = torch.randn(2, context, case.kv_heads, case.head_dim, generator=generator)
        key, value = kv.to(device, torch.bfloat16)
        store(key, value, pages, slots.long().to(device))
    rows = sum(query_lens)
    query = torch.randn(rows, case.heads, case.head_dim, generator=generator)
    return Batch(
        pages,
        tables.to(device),
        torch.tensor(CONTEXTS, dtype=torch.int32, device=device),
        query.to(device, torch.bfloat16),
        torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device=device),
        query_lens,
    )


def decode(op: object, batch: Batch, case: Case) -> Tensor:
    return op(  # type: ignore[operator,no-any-return]
        batch.query,
        batch.pages,
        batch.tables,
        batch.lens,
        scale=case.head_dim**-0.5,
        window=case.window,
    )


def prefill(op: object, batch: Batch, case: Case) -> Tensor:
    return op(  # type: ignore[operator,no-any-return]
        batch.query,
        batch.pages,
        batch.tables,
        batch.lens,
        batch.starts,
        max_query_len=max(batch.query_lens),
        scale=case.head_dim**-0.5,
        window=case.window,
    )


def error(got: Tensor, want: Tensor) -> float:
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.double() - want).abs().max() / want.abs().max())


def check_kernels(device: torch.device) -> bool:
    backend = dispatch.backend(device)
    ones = [1] * len(CONTEXTS)
    chunks = [min(context, 40 + 7 * i) for i, context in enumerate(CONTEXTS)]
    worst: dict[tuple[str, str], float] = {}
    count = 0
    for case in cases():
        for name, run, lens in (("decode", decode, ones), ("prefill", prefill, chunks)):
            batch = make_batch(case, lens, device)
            want = run(getattr(reference, f"paged_{name}"), batch.double(), case)
            got = run(getattr(backend, f"paged_{name}"), batch, case)
            row = name, f"{case.heads}/{case.kv_heads} x {case.head_dim}"
            worst[row] = max(worst.get(row, 0.0), error(got, want))
            count += 1
    print(f"\n{count} cases in bf16 against float64, worst relative error (limit {TOLERANCE}):\n")
    print("| op | heads | error | |\n|---|---|---|---|")
    for (name, shape), value in sorted(worst.items()):
        print(f"| {name} | {shape} | {value:.1e} | {'ok' if value < TOLERANCE else 'WRONG'} |")
    return all(value < TOLERANCE for value in worst.values())


def check_layers(device: torch.device) -> bool:
    """The fused operations of the backend in bf16 against their twins in float32, if it has any."""
    ops = dispatch.backend(device).layers
    if ops is None:
        print("\nno fused layers on this device")
        return True
    tokens, heads, kv_heads, head_dim, size = 37, 16, 8, 128, 1024

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    x, stream, scale = draw(tokens, size), draw(tokens, size), draw(size).float()
    gate_up, qkv = draw(tokens, 2 * 3072), draw(tokens, heads + 2 * kv_heads, head_dim)
    weight, angles = (
        draw(heads + kv_heads, head_dim).float(),
        draw(tokens, 1, head_dim // 2).float(),
    )
    rotation = angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
    pages, wide = (
        torch.zeros(2, 5, kv_heads, 16, head_dim, dtype=dtype, device=device)
        for dtype in (torch.bfloat16, torch.float32)
    )
    slots = torch.randperm(80, device=device)[:tokens]
    rest = rotation, weight, 1e-6
    # The stream is rounded before it is normalized; the twin gets the rounded one.
    summed = (x + stream).float()
    pairs = {
        "add + norm": (
            ops.add_rms_norm(x, stream, scale, 1e-6),
            reference.add_rms_norm(torch.zeros_like(summed), summed, scale, 1e-6),
        ),
        "gated": (ops.gated(gate_up, "silu"), reference.gated(gate_up.float(), "silu")),
        "turn": (
            ops.turn_and_store(qkv, *rest, pages, slots),
            reference.turn_and_store(qkv.float(), *rest, wide, slots),
        ),
        "store": (pages, wide),
    }
    worst = {name: error(got, want.double()) for name, (got, want) in pairs.items()}
    print("\n| fused | error | |\n|---|---|---|")
    for name, value in worst.items():
        print(f"| {name} | {value:.1e} | {'ok' if value < TOLERANCE else 'WRONG'} |")
    return all(value < TOLERANCE for value in worst.values())


def check_parity(device: torch.device) -> bool:
    """Runs the suite's parity and crowd tests with the engine on `device`."""
    print("\ngreedy float32 against transformers, through preemption:\n", flush=True)
    tests = ["tests/engine/test_parity.py", "tests/engine/test_crowd.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *tests]
    environ = {**os.environ, "TEST_DEVICE": device.type}
    root = Path(__file__).parent.parent
    return subprocess.run(command, cwd=root, env=environ, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="check kernels and parity on a device")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("no GPU can be used here", file=sys.stderr)
            return 2
        print(torch.cuda.get_device_name(device), "torch", torch.__version__)
    kernels = check_kernels(device) & check_layers(device)
    return 0 if kernels & check_parity(device) else 1


if __name__ == "__main__":
    sys.exit(main())
