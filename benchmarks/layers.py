"""Times the fused layers of `kernels.cpu_layers` against torch: alone, and within a decode step.

`python -m benchmarks.layers` prints microseconds of CPU time on one thread, which other programs
disturb less than wall-clock time. The two take turns within each round, and the order changes from
round to round; the table gives the median over the rounds and the range in brackets.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import cpu_layers, dispatch
from models.context import ForwardContext, GroupTables
from models.decoder import Decoder
from models.loader import random_init
from models.registry import parse_config

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONTEXT = 256
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LARGER = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def switch(model: Decoder, module: object) -> None:
    """Makes every norm and rotation use `module`, or torch if it is None."""
    model.norm.fused = module
    for layer in model.layers:
        for part in (layer.attention_norm, layer.mlp_norm, layer.attention):
            part.fused = module


def decode_context(model: Decoder, rows: int, dtype: torch.dtype) -> ForwardContext:
    """`rows` sequences of CONTEXT tokens, each in the blocks of its own."""
    config, size = model.config, 16
    per_row = CONTEXT // size
    shape = (2, rows * per_row, config.num_kv_heads, size, config.head_dim)
    tables = torch.arange(rows * per_row, dtype=torch.int32).view(rows, per_row)
    slots = tables[:, -1].long() * size + size - 1
    return ForwardContext(
        positions=torch.full((rows,), CONTEXT - 1),
        context_lens=torch.full((rows,), CONTEXT, dtype=torch.int32),
        query_start=torch.zeros(1, dtype=torch.int32),
        num_decodes=rows,
        max_query_len=1,
        max_context_len=CONTEXT,
        groups=(GroupTables(tables, slots),),
        layer_groups=(0,) * config.num_layers,
        pages=tuple(torch.randn(shape).to(dtype) for _ in range(config.num_layers)),
        backend=dispatch.backend(CPU),
    )


def alternate(model: Decoder, call: Callable[[], object], rounds: int, calls: int) -> str:
    """Microseconds of the call with torch and with the fused layers, and their ratio."""

    def once(module: object) -> float:
        switch(model, module)
        call()
        start = time.process_time()
        for _ in range(calls):
            call()
        return 1e6 * (time.process_time() - start) / calls

    results = []
    for turn in range(rounds):
        order = (None, cpu_layers) if turn % 2 else (cpu_layers, None)
        times = {module: once(module) for module in order}
        results.append((times[None], times[cpu_layers]))
    before, after = (list(times) for times in zip(*results, strict=True))
    ratios = [first / second for first, second in results]
    return f"{show(before, 1):28} {show(after, 1):28} {show(ratios, 2)}"


def show(values: list[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def measure(model: Decoder, rows: int, dtype: torch.dtype, rounds: int) -> None:
    """Prints the lines of one norm, of one layer's rotation, and of a decode step with logits."""
    config, attention = model.config, model.layers[0].attention
    x = torch.randn(rows, config.hidden_size).to(dtype)
    heads = config.num_heads + config.num_kv_heads
    qkv = torch.randn(rows, heads + config.num_kv_heads, config.head_dim).to(dtype)[:, :heads]
    rotation = model.rotary(torch.arange(rows))
    tokens, context = torch.arange(rows), decode_context(model, rows, dtype)
    turn = "head norm, rotation" if config.qk_norm else "rotation"
    calls: dict[str, tuple[Callable[[], Tensor], int]] = {
        "RMSNorm": (lambda: model.norm(x), 1000),
        turn: (lambda: attention.turn(qkv, rotation), 1000),
        "decode step": (lambda: model.logits(model.forward(tokens, context)), 40),
    }
    for name, (call, count) in calls.items():
        line = alternate(model, call, rounds, max(5, count // rows))
        print(f"  {name:22} {rows:4}  {line}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__} on {torch.backends.cpu.get_cpu_capability()}, 1 thread")
    print(f"CPU us, median [min, max] of {options.rounds} rounds; ratio torch / fused\n")
    print(f"  {'':22} rows  {'torch':28} {'fused':28} ratio")
    for raw in (SMALL, LARGER):
        config = parse_config(raw)
        for label, dtype in DTYPES.items():
            model = random_init(config, dtype, CPU)
            name = config.architecture.removesuffix("ForCausalLM")
            print(f"{name}, {config.num_layers} layers of {config.hidden_size}, {label}")
            for rows in (1, 4, 16, 64):
                measure(model, rows, dtype, options.rounds)


if __name__ == "__main__":
    main()
