"""Writes `kernels/decode_choices.json`: how the Triton decode kernel is launched, by shape.

    python -m benchmarks.tune_decode               # on a CUDA device; a few minutes, by default 9
    python -m benchmarks.tune_decode --derive 90   # without one: the rule, written out
    TRITON_INTERPRET=1 python -m benchmarks.tune_decode --device cpu --out table.json     # tiny

Every candidate is timed as `benchmarks.gpu_attention` does it. Another choice than the rule's is
taken only where it gains more than MARGIN. Other capabilities and shapes in the file are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import astuple
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.gpu_attention import (
    HEADS,
    Clock,
    Point,
    calls_per_graph,
    draw_batches,
    pool,
)
from kernels.decode_choices import BATCHES, CONTEXTS, TABLE, Choice, HeadShape, derive
from kernels.paged_decode import head_shape, paged_decode

MARGIN = 0.02
CANDIDATES = [
    Choice(*sizes) for sizes in itertools.product((32, 64), (4, 8), (3, 4, 5), (1, 2, 3, 4))
]
Entry = list[int]  # batch, context, and the fields of a Choice


def tune(
    shape: HeadShape,
    points: list[Point],
    candidates: list[Choice],
    pages: Tensor,
    clock: Clock,
    until: float,
) -> list[Entry]:
    """The best candidate of each point that the pool and the time are enough for."""
    entries = []
    for point in points:
        if point.blocks > pages.shape[1] or time.monotonic() > until:
            print(f"{point.name:9} {point.batch:4} {point.context:6} left out", flush=True)
            continue
        batches = draw_batches(point, pages, calls_per_graph(point, pages))

        def seconds(choice: Choice, batches: list = batches) -> float:  # type: ignore[type-arg]
            calls = [
                lambda batch=batch: paged_decode(
                    batch.query,
                    batch.pages,
                    batch.tables,
                    batch.lens,
                    scale=batch.scale,
                    choice=choice,
                )
                for batch in batches
            ]
            try:
                return clock(calls).median
            except triton.runtime.errors.OutOfResources:
                return float("inf")

        rule = derive(shape.head_dim, shape.row_bytes)
        base, times = seconds(rule), {choice: seconds(choice) for choice in candidates}
        best = min(times, key=lambda choice: times[choice])
        chosen = best if times[best] < (1 - MARGIN) * base else rule
        gain = base / min(times[best], base)
        print(f"{point.name:9} {point.batch:4} {point.context:6} {chosen} {gain:.2f}x", flush=True)
        entries.append([point.batch, point.context, *astuple(chosen)])
    return entries


def derived(names: list[str], capability: int) -> dict[str, list[Entry]]:
    """What the rule says, for 16-bit pages."""
    choices = {}
    for name in names:
        point = Point.named(name, BATCHES[-1], CONTEXTS[-1])
        row_bytes = 2 * point.head_dim
        shape = HeadShape(point.heads, point.kv_heads, point.head_dim, row_bytes, capability)
        choice = derive(point.head_dim, row_bytes)
        choices[shape.name] = [[point.batch, point.context, *astuple(choice)]]
    return choices


def write(path: Path, source: str, choices: dict[str, list[Entry]]) -> None:
    """Merges entries into the table, one line each."""
    table = json.loads(path.read_text()) if path.exists() else {"source": {}, "choices": {}}
    table["choices"].update(choices)
    table["source"].update(dict.fromkeys(choices, source))
    lines = [
        f"    {json.dumps(name)}: [\n      "
        + ",\n      ".join(json.dumps(entry) for entry in entries)
        + "\n    ]"
        for name, entries in sorted(table["choices"].items())
    ]
    sources = json.dumps(dict(sorted(table["source"].items())), indent=4)[:-1].rstrip() + "\n  }"
    body = ",\n".join(lines)
    path.write_text(f'{{\n  "source": {sources},\n  "choices": {{\n{body}\n  }}\n}}\n')


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--derive", type=int, metavar="CAPABILITY")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), metavar="32/8x128")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pool-gib", type=float, default=20)
    parser.add_argument("--minutes", type=float, default=9, help="start no point after so many")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    if options.derive:
        write(options.out, "derived, not tuned", derived(options.heads, options.derive))
        return 0
    device, until = torch.device(options.device), time.monotonic() + 60 * options.minutes
    batches, contexts, candidates, dtype = BATCHES, CONTEXTS, CANDIDATES, torch.bfloat16
    machine = f"torch {torch.__version__}, triton {triton.__version__}"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("no GPU can be used here", file=sys.stderr)
            return 2
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    else:
        batches, contexts, dtype = (1,), (20,), torch.float16
        candidates, options.heads, options.pool_gib, options.repeats = [], ["4/2x32"], 1e-3, 1
    clock = Clock(device, options.repeats)
    for name in options.heads:
        points = [Point.named(name, b, c) for b in batches for c in contexts]
        pages = pool(points, dtype, device, int(options.pool_gib * (1 << 30)))
        shape = head_shape(points[0].heads, pages)
        entries = tune(shape, points, candidates or CANDIDATES[:2], pages, clock, until)
        write(options.out, machine, {shape.name: entries})
        del pages
    return 0


if __name__ == "__main__":
    sys.exit(main())
