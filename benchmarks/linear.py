"""Times a linear layer over a packed weight, plain and int8, against `F.linear` over a plain one.

`python -m benchmarks.linear` prints a table for this CPU. The three take turns within each round,
and the order changes from round to round, so that a busy machine slows all alike. Every call
reads the next of several equal weights, together larger than the caches, as the layers of a model
are. With `--cpu-time` waiting for a core is not counted (all threads are summed up then).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.layers import Linear

CPU = torch.device("cpu")
SHAPES = {  # inputs, outputs
    "Qwen3 0.6B qkv": (1024, 4096),
    "Qwen3 0.6B gate, up": (1024, 6144),
    "Qwen3 0.6B down": (3072, 1024),
    "Llama 8B output": (4096, 4096),
    "small head": (576, 49152),
}
ROWS = (1, 4, 16, 64, 512)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def layers(inputs: int, outputs: int, dtype: torch.dtype, num_bytes: int) -> list[list[Linear]]:
    """The lists to compare, of equal weights: plain ones, packed ones, int8 ones."""
    count = max(1, -(-num_bytes // (inputs * outputs * dtype.itemsize)))
    sides: list[list[Linear]] = [[], [], []]
    for _ in range(count):
        weight = torch.randn(outputs, inputs).mul_(inputs**-0.5)
        for made in sides:
            made.append(Linear(inputs, (outputs,), dtype=dtype, device=CPU))
            made[-1].weight.copy_(weight)
        sides[2][-1].quantize()
        for made in sides[1:]:
            made[-1].pack()
    return sides


def milliseconds(
    x: Tensor, turn: Iterator[Linear], calls: int, clock: Callable[[], float]
) -> float:
    """Of one call, the mean over `calls` of them."""
    start = clock()
    for _ in range(calls):
        next(turn)(x)
    return 1e3 * (clock() - start) / calls


def measure(
    sides: list[list[Linear]], x: Tensor, rounds: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Milliseconds in each round, of each side."""
    turns = [itertools.cycle(made) for made in sides]
    plain, packed, quantized = (next(turn)(x) for turn in turns)
    torch.testing.assert_close(plain, packed, atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(plain, quantized, atol=2e-1, rtol=5e-2)
    once = milliseconds(x, turns[0], 1, time.perf_counter)
    calls = max(1, min(len(sides[0]), int(20 / once)))  # about 20 ms, or every weight once
    results: list[list[float]] = [[] for _ in sides]
    for start in range(rounds):
        for side in range(start, start + len(sides)):
            index = side % len(sides)
            results[index].append(milliseconds(x, turns[index], calls, clock))
    return results


def show(values: list[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(name: str, rows: int, dtype: str, results: list[list[float]]) -> str:
    plain, packed, quantized = results
    times = " ".join(f"{show(found, 3):26}" for found in results)
    gains = (
        show([first / second for first, second in zip(*pair, strict=True)], 2)
        for pair in ((plain, packed), (packed, quantized))
    )
    return f"{name:34} {dtype} {rows:4}  {times} " + " ".join(f"{gain:18}" for gain in gains)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--megabytes", type=int, default=128, help="of weights to go through")
    parser.add_argument("--cpu-time", action="store_true", help="instead of wall-clock time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    kind = "CPU time" if options.cpu_time else "wall-clock time"
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__} on {capability}, {options.threads} threads, {kind}")
    print(f"ms per call, median [min, max] of {options.rounds} rounds\n")
    header = f"{'F.linear':26} {'packed':26} {'int8':26} {'F.linear / packed':18} packed / int8"
    print(f"{'':34} {'':4} rows  {header}")
    for (name, (inputs, outputs)), (label, dtype) in itertools.product(
        SHAPES.items(), DTYPES.items()
    ):
        sides = layers(inputs, outputs, dtype, options.megabytes << 20)
        if sides[1][0].packed is None:
            print(f"{name}: no packed layout for {label} on this CPU")
            continue
        for rows in ROWS:
            x = torch.randn(rows, inputs).to(dtype)
            results = measure(sides, x, options.rounds, clock)
            print(table(f"{name} {inputs} -> {outputs}", rows, label, results), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
