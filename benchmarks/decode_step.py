"""Times a decode step of a random Llama on this CPU: compiled as one call, the same with int8
weights, as separate operations, and as separate operations on oneDNN's own products.

`python -m benchmarks.decode_step` prints a table. The four take turns within each round. With
`--cpu-time` the CPU time of one thread is counted and not the wait for a core: for busy machines.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from benchmarks.shapes import LLAMA_56M
from kernels import dispatch
from models import loader, registry
from models.context import ForwardContext, GroupTables
from models.decoder import Decoder

CPU = torch.device("cpu")
BLOCK_SIZE = 16
INT8 = "compiled, int8"
VARIANTS = ("compiled", INT8, "separate", "separate, oneDNN")


def batch(decoder: Decoder, rows: int, context: int) -> ForwardContext:
    """A decode of `rows` sequences of `context` tokens each."""
    width = -(-context // BLOCK_SIZE)
    tables = torch.randperm(rows * width).view(rows, width).int()
    shape = (2, rows * width, decoder.kv_heads, BLOCK_SIZE, decoder.head_dim)
    place = tables[:, (context - 1) // BLOCK_SIZE].long()
    return ForwardContext(
        positions=torch.full((rows,), context - 1),
        context_lens=torch.full((rows,), context, dtype=torch.int32),
        query_start=torch.zeros(1, dtype=torch.int32),
        num_decodes=rows,
        max_query_len=1,
        max_context_len=context,
        groups=(GroupTables(tables, place * BLOCK_SIZE + (context - 1) % BLOCK_SIZE),),
        layer_groups=(0,) * decoder.num_layers,
        pages=tuple(torch.randn(shape).bfloat16() for _ in range(decoder.num_layers)),
        backend=dispatch.backend(CPU),
    )


@torch.inference_mode()
def measure(
    decoder: Decoder,
    quantized: Decoder,
    ids: Tensor,
    ctx: ForwardContext,
    rounds: int,
    cpu_time: bool,
) -> dict[str, list[float]]:
    """Milliseconds of a step by variant, one number per round."""
    clock = time.thread_time if cpu_time else time.perf_counter
    few_rows = decoder.layers[0].attention.qkv.most_few
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds + 1):
        for name in VARIANTS:
            decoder.compiled = name == "compiled"
            for linear in decoder.linears():
                linear.most_few = 0 if name == "separate, oneDNN" else few_rows
            model = quantized if name == INT8 else decoder
            start = clock()
            for _ in range(5):
                model.forward(ids, ctx)
            times[name].append(1e3 * (clock() - start) / 5)
    decoder.compiled = True
    return {name: found[1:] for name, found in times.items()}  # the first was the warm-up


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--context", type=int, default=100, help="tokens of every sequence")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its CPU time")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    config = registry.parse_config(LLAMA_56M)
    decoder, quantized = (
        loader.random_init(config, torch.bfloat16, CPU, quantization=name)
        for name in ("none", "int8")
    )
    assert isinstance(decoder, Decoder) and isinstance(quantized, Decoder)
    if not decoder.compiled or not quantized.compiled:
        raise SystemExit("this CPU has no AVX512-BF16, or oneDNN packs weights in another way")
    print(
        f"ms per step, median [range] of {args.rounds} rounds, {torch.get_num_threads()} threads\n"
    )
    print("| rows | " + " | ".join(VARIANTS) + " |\n|--:|" + "--:|" * len(VARIANTS))
    for rows in (1, 4, 16, 64):
        ctx, ids = batch(decoder, rows, args.context), torch.zeros(rows, dtype=torch.int64)
        times = measure(decoder, quantized, ids, ctx, args.rounds, args.cpu_time)
        cells = [
            f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]"
            for found in times.values()
        ]
        print(f"| {rows} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
