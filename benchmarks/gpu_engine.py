"""How close decoding on a GPU comes to what its memory allows. One command, one short table.

    python -m benchmarks.gpu_engine                          # everything, on a GPU
    python -m benchmarks.gpu_engine --only qwen3-0.6b gpt2   # some of it
    python -m benchmarks.gpu_engine --device cpu --tiny      # does it run at all? seconds, on a CPU

Weights are random, and made on the device from the shapes of `benchmarks.shapes`: speed does not
depend on them. Every workload runs with CUDA graphs and without, and with steps overlapped and not.

    qwen3-0.6b, llama-3.1-8b   one sequence, 128 tokens in, 512 out, greedy
    gpt2                       one sequence, 16 tokens in, 1,000 out, greedy
    crowd                      nano-vllm's own benchmark: 256 sequences on qwen3-0.6b, input and
                               output uniform in 100..1,024 with seed 0, temperature 0.6

The limit is what reading takes at the bandwidth measured first: the weights once per step, and of
every sequence its keys and values. Prompts count as free, so that no run can reach 100 %.

Needs torch with triton, numpy, safetensors and tqdm, and as everything that starts an engine also
msgspec, pydantic, pydantic-settings and llguidance, but no HTTP server. Where a machine lacks them
and has no network:

    pip install --target gpu-packages msgspec pydantic pydantic-settings llguidance   # elsewhere
    PYTHONPATH=gpu-packages python -m benchmarks.gpu_engine
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.shapes import SHAPES

if TYPE_CHECKING:
    from engine.loop import EngineLoop
    from models.decoder import CausalLM
    from scheduler.request import Request

NEEDED = ("msgspec", "pydantic", "pydantic_settings", "llguidance", "safetensors", "tqdm")
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
TINY_GPT2 = {"n_embd": 96, "n_layer": 2, "n_head": 3, "vocab_size": 512}
WARM_TOKENS = 16


@dataclass(frozen=True)
class Workload:
    """Attributes:
    lengths: (tokens in, tokens out) of each sequence.
    temperature: 0 is greedy.
    """

    name: str
    shape: str
    lengths: list[tuple[int, int]]
    temperature: float = 0.0

    @property
    def tokens_out(self) -> int:
        return sum(out for _, out in self.lengths)

    def bytes_read(self, weights: int, per_token: int) -> float:
        """Least bytes that generating takes, of prompts nothing: `weights` for each step, and
        `per_token` for all tokens before each new one."""
        steps = max(out for _, out in self.lengths)
        seen = sum(out * given + out * (out - 1) // 2 for given, out in self.lengths)
        return float(steps * weights + seen * per_token)


def crowd_lengths(count: int = 256, longest: int = 1024) -> list[tuple[int, int]]:
    """The lengths of nano-vllm's benchmark: its random numbers, in its order."""
    draw = Random(0)
    given = []
    for _ in range(count):
        given.append(draw.randint(100, longest))
        for _ in range(given[-1]):
            draw.randint(0, 10_000)  # a token
    return [(length, draw.randint(100, longest)) for length in given]


def workloads(tiny: bool) -> list[Workload]:
    if tiny:
        return [
            Workload("qwen3-0.6b", "qwen3-0.6b", [(8, 12)]),
            Workload("llama-3.1-8b", "llama-3.1-8b", [(8, 12)]),
            Workload("gpt2", "gpt2", [(8, 12)]),
            Workload("crowd", "qwen3-0.6b", [(5 + i, 4 + i) for i in range(6)], 0.6),
        ]
    return [
        Workload("qwen3-0.6b", "qwen3-0.6b", [(128, 512)]),
        Workload("llama-3.1-8b", "llama-3.1-8b", [(128, 512)]),
        Workload("gpt2", "gpt2", [(16, 1000)]),
        Workload("crowd", "qwen3-0.6b", crowd_lengths(), 0.6),
    ]


def build_model(shape: str, device: torch.device, tiny: bool) -> CausalLM:
    from models import loader, registry

    config = SHAPES[shape]
    if tiny:
        config = config | (TINY_GPT2 if shape == "gpt2" else TINY)
    parsed = registry.parse_config(config)
    return loader.random_init(parsed, loader.resolve_dtype("auto", parsed, device), device)


def bytes_per_step(model: CausalLM) -> int:
    """Bytes of weights that a step reads: all but a token table that is not the head too."""
    from engine.build import weight_bytes

    table = model.embed.weight
    tied = model.config.tie_word_embeddings
    return weight_bytes(model.config, table.dtype) - (0 if tied else table.nbytes)


def bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes per second that a reduction reads, the best of ten."""
    gigabytes = 0.0625 if tiny else 4 if device.type == "cuda" else 1
    numbers = torch.ones(int(gigabytes * (1 << 28)), device=device)
    times = []
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        numbers.sum()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return numbers.nbytes / min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start(
    model: CausalLM, work: Workload, device: torch.device, graphs: bool, overlap: bool
) -> EngineLoop:
    from configs.settings import Settings
    from engine.build import assemble

    blocks = sum(-(-(given + out) // 16) for given, out in work.lengths) + 64
    options: dict[str, Any] = {
        "device": device.type,
        "max_num_seqs": len(work.lengths),
        "max_num_batched_tokens": max(16_384 if device.type == "cuda" else 512, len(work.lengths)),
        "max_model_len": max(given + out for given, out in work.lengths) + 1,
        "enforce_eager": not graphs,
        "async_scheduling": "on" if overlap else "off",
        "trace_steps": 0,
    }
    if device.type == "cpu":
        options["num_gpu_blocks_override"] = blocks
    folder = Path(tempfile.gettempdir())  # no file of a checkpoint is read
    return assemble(model, Settings.of(model=str(folder), **options), device, folder)


def requests(work: Workload, vocab: int, most: int) -> list[Request]:
    """Prompts of random tokens; answers of at most `most` tokens."""
    from scheduler.request import Request, SamplingParams

    draw = Random(1)
    return [
        Request(
            id=f"r{number}",
            prompt_ids=tuple(draw.randrange(3, vocab) for _ in range(given)),
            sampling=SamplingParams(
                temperature=work.temperature,
                seed=number,
                max_tokens=min(out, most),
                ignore_eos=True,
            ),
            cache_salt=str(most),  # so that the warm-up leaves nothing to be found
        )
        for number, (given, out) in enumerate(work.lengths)
    ]


def answer(loop: EngineLoop, batch: list[Request]) -> list[tuple[float, int]]:
    """When each step's tokens were there, and how many they were."""
    from engine.protocol import Submit

    told = []
    loop.take(Submit(batch))
    while loop.has_work:
        loop.step()
        output = loop.collect()
        if output.refused or output.failed:
            raise RuntimeError(f"the engine did not answer: {output.refused or output.failed}")
        told.append((time.perf_counter(), sum(len(delta.tokens) for delta in output.deltas)))
    return [(moment, tokens) for moment, tokens in told if tokens]


def speed(loop: EngineLoop, work: Workload) -> float:
    """Tokens per second; of one sequence alone, without its prompt and the token of that."""
    answer(loop, requests(work, loop.info.vocab_size, WARM_TOKENS))
    batch = requests(work, loop.info.vocab_size, max(out for _, out in work.lengths))
    began = time.perf_counter()
    told = answer(loop, batch)
    if len(batch) == 1:
        began, *told = told[0][0], *told[1:]
    return sum(tokens for _, tokens in told) / (told[-1][0] - began)


def missing() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def main() -> int:
    description, *_ = __doc__.partition("\n\nNeeds")
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny models and short answers")
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="some of the workloads")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU can be used here", file=sys.stderr)
        return 2
    if missing():
        names = " ".join(missing()).replace("_", "-")
        print(f"missing here, needed to start an engine: pip install {names}", file=sys.stderr)
        return 2
    chosen = [
        work for work in workloads(options.tiny) if not options.only or work.name in options.only
    ]
    rate = bandwidth(device, options.tiny)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, reads {rate / 1e9:,.0f} GB/s\n")
    print("| workload | tokens out | graphs | overlap | tokens/s | of the limit |")
    print("|---|--:|---|---|--:|--:|")
    for shape, works in itertools.groupby(sorted(chosen, key=lambda w: w.shape), lambda w: w.shape):
        model = build_model(shape, device, options.tiny)
        for work in works:
            measure(model, work, device, rate)
        del model
    print("\nWith and without a KV cache: python -m benchmarks.kv_cache_speedup")
    return 0


def measure(model: CausalLM, work: Workload, device: torch.device, rate: float) -> None:
    """Prints a line for each way to run the workload."""
    on_gpu = device.type == "cuda"
    for graphs, overlap in itertools.product((False, True) if on_gpu else (False,), (False, True)):
        loop = start(model, work, device, graphs, overlap)
        found = speed(loop, work)
        needed = work.bytes_read(bytes_per_step(model), loop.info.kv_bytes_per_token)
        limit = work.tokens_out * rate / needed
        words = ["on" if choice else "off" for choice in (graphs, overlap)]
        cells = [work.name, f"{work.tokens_out:,}", *words, f"{found:,.0f}", f"{found / limit:.0%}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        loop.close()
        del loop
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
