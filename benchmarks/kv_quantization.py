"""What quantized KV pages save, cost and lose: `python -m benchmarks.kv_quantization`.

Prints the tables of docs/kv-quantization.md. Loss is measured in float32 with pages of bfloat16 as
the standard, so that nothing but the pages differs; speed in the dtype that is served, all formats
taking turns within each round, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import LLAMA_56M
from engine.planner import SHAPES
from kernels import reference
from kernels.dispatch import Backend, backend
from kernels.pages import FORMATS, Pages, QuantizedPages
from models import embedded, loader, registry
from models.config import ModelConfig
from models.context import ForwardContext, GroupTables
from models.decoder import CausalLM
from paged_cache.layout import KVFormat, KVLayout, group_layers
from paged_cache.storage import KVStorage

BLOCK_SIZE = 16
STANDARD = "bfloat16"
ALL = (STANDARD, "fp8_e4m3", "int8", "int4")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cache:
    """Pages of every layer for `seqs` sequences of at most `length` tokens, in shuffled blocks."""

    pages: tuple[Pages, ...]
    tables: Tensor  # int32 [seqs, blocks per sequence]

    @classmethod
    def make(cls, model: CausalLM, format: str, seqs: int, length: int, device: torch.device):
        per_seq = -(-length // BLOCK_SIZE)
        groups = group_layers(model.layer_windows)
        assert len(groups) == 1, "layers of several windows are not measured here"
        shape = layout(model.kv_heads, model.head_dim, model.num_layers, format)
        storage = KVStorage(replace(shape, num_blocks=seqs * per_seq), device)
        order = torch.randperm(seqs * per_seq, generator=torch.Generator().manual_seed(0))
        pages: tuple[Pages, ...] = storage.pages
        if format in FORMATS:
            pages = tuple(
                QuantizedPages(tiles, format, BLOCK_SIZE, model.head_dim) for tiles in storage.pages
            )
        return cls(pages, order.view(seqs, per_seq).int().to(device))

    def slots(self, seq: int, first: int, end: int) -> Tensor:
        at = torch.arange(first, end, device=self.tables.device)
        return self.tables[seq, at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE

    def context(self, chosen: Backend, chunk: tuple[int, int] | None, length: int = 0):
        """Tokens `chunk` of sequence 0, or without one a decode step of all at `length`."""
        device, seqs = self.tables.device, len(self.tables)
        if chunk is not None:
            first, end = chunk
            positions, slots = torch.arange(first, end, device=device), self.slots(0, first, end)
            tables, lens, queries, decodes = self.tables[:1], [end], end - first, 0
        else:
            positions = torch.full((seqs,), length - 1, device=device)
            slots = torch.cat([self.slots(i, length - 1, length) for i in range(seqs)])
            tables, lens, queries, decodes = self.tables, [length] * seqs, 1, seqs
        starts = torch.tensor([0] if decodes else [0, queries], dtype=torch.int32, device=device)
        return ForwardContext(
            positions=positions,
            context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
            query_start=starts,
            num_decodes=decodes,
            max_query_len=queries,
            max_context_len=max(lens),
            groups=(GroupTables(tables, slots),),
            layer_groups=(0,) * len(self.pages),
            pages=self.pages,
            backend=chosen,
        )


def layout(kv_heads: int, head_dim: int, layers: int, format: str) -> KVLayout:
    groups = group_layers((0,) * layers)
    return KVLayout(BLOCK_SIZE, 1, kv_heads, head_dim, groups, KVFormat(format))


# ---------------------------------------------------------------------- bytes and attention error


def show_bytes() -> None:
    print("| shape | " + " | ".join(ALL) + " | gain |")
    print("|---" * (len(ALL) + 2) + "|")
    raw = {name: registry.parse_config(SHAPES[name]) for name in ("gpt2", "llama-3.1-8b")}
    for name, config in {"embedded": embedded_config(), **raw}.items():
        shape = (config.num_kv_heads, config.head_dim, config.num_layers)
        sizes = [layout(*shape, format).bytes_per_token for format in ALL]
        gains = ", ".join(f"{sizes[0] / size:.2f}x" for size in sizes[1:])
        print(f"| {name} | " + " | ".join(f"{size:,}" for size in sizes) + f" | {gains} |")


def show_attention_error(chosen: Backend, device: torch.device, repeats: int) -> None:
    """Root mean square error of attention outputs over that of the outputs, against float64."""
    print("| keys and values | " + " | ".join(ALL) + " |\n" + "|---" * (len(ALL) + 1) + "|")
    for name in ("normal", "outlier channels"):
        errors: dict[str, list[float]] = {format: [] for format in ALL}
        for seed in range(repeats):
            for format, error in attention_errors(chosen, device, name, seed):
                errors[format].append(100 * error)
        print(f"| {name} | " + " | ".join(spread(errors[f], "%", 2) for f in ALL) + " |")


def attention_errors(
    chosen: Backend, device: torch.device, kind: str, seed: int, context: int = 1024
) -> Iterator[tuple[str, float]]:
    """Sharp attention (scores of deviation 2) of 8 queries over one context, 8/2 heads of 128."""
    rng = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, context, 2, 128, generator=rng)
    if kind != "normal":  # a few dimensions of the keys are ten times as large, as in real models
        key[..., ::32] *= 10
    query = torch.randn(8, 8, 128, generator=rng) * (2 / key.square().mean().sqrt())
    blocks = context // BLOCK_SIZE
    tables = torch.randperm(blocks, generator=rng).int()[None].expand(8, -1).contiguous()
    at = torch.arange(context)
    slots = tables[0, at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE
    lens = torch.full((8,), context, dtype=torch.int32)
    exact = torch.zeros(2, blocks, 2, BLOCK_SIZE, 128, dtype=torch.float64)
    reference.store_kv(key, value, exact, slots)
    scale = 128**-0.5
    want = reference.paged_decode(query.double(), exact, tables, lens, scale=scale)
    for format in ALL:
        shape = replace(layout(2, 128, 1, format), num_blocks=blocks)
        pages: Pages = KVStorage(shape, device).pages[0]
        if format in FORMATS:
            pages = QuantizedPages(pages, format, BLOCK_SIZE, 128)
        chosen.store_kv(key.to(device), value.to(device), pages, slots.to(device))
        inputs = [tensor.to(device) for tensor in (query, tables, lens)]
        got = chosen.paged_decode(inputs[0], pages, *inputs[1:], scale=scale).cpu().double()
        yield format, float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


# ---------------------------------------------------------------------- logits


@torch.inference_mode()
def show_logits(model: CausalLM, texts: list[Tensor], chosen: Backend, device) -> None:
    """Teacher forcing: every position sees the same tokens, in pages of different formats."""
    tables = {
        format: [logits(model, text.to(device), format, chosen) for text in texts]
        for format in ("float32", *ALL)
    }
    standard = torch.cat(tables[STANDARD]).log_softmax(-1)
    best = standard.argmax(-1)
    print(f"| pages ({len(best):,} tokens) | greedy agreement | mean KL | largest KL |")
    print("|---|---|---|---|")
    for format in ("float32", *ALL[1:]):
        other = torch.cat(tables[format]).log_softmax(-1)
        same = (other.argmax(-1) == best).double().mean()
        kl = (standard.exp() * (standard - other)).sum(-1)
        print(f"| {format} | {100 * same:.2f} % | {kl.mean():.2e} | {kl.max():.2e} |")


def logits(model: CausalLM, tokens: Tensor, format: str, chosen: Backend) -> Tensor:
    """Of all positions, float32 [tokens, vocab], read in chunks of 128."""
    cache = Cache.make(model, format, 1, len(tokens), tokens.device)
    parts = []
    for first in range(0, len(tokens), 128):
        end = min(first + 128, len(tokens))
        if end - first == 1:  # a lone token would be a decode step
            break
        hidden = model(tokens[first:end], cache.context(chosen, (first, end)))
        parts.append(model.logits(hidden).float())
    return torch.cat(parts)


def embedded_config() -> ModelConfig:
    return loader.load_config(Path(embedded.path()))


def chats(count: int, length: int = 500) -> list[Tensor]:
    """Conversations that the embedded model was not trained on, `count` tokens in all."""
    from tokenizers import Tokenizer

    from models.embedded import corpus
    from models.embedded.tokenizer import render

    tokenizer = Tokenizer.from_file(str(Path(embedded.path(), "tokenizer.json")))
    rng = random.Random(1_000_003)
    texts: list[Tensor] = []
    while (left := count - sum(map(len, texts))) > 0:
        text = "".join(piece for piece, _ in render(corpus.conversation(rng, 20)))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        texts.append(torch.tensor(ids[: min(length, left)]))
    return texts


# ---------------------------------------------------------------------- speed


@torch.inference_mode()
def show_speed(
    models: dict[str, CausalLM], chosen: Backend, device: torch.device, rounds: int
) -> None:
    """One decode step of 16 sequences of 2,048 tokens: the attention of all layers, and all."""
    print("| model | part | " + " | ".join(ALL) + " |\n" + "|---" * (len(ALL) + 2) + "|")
    for name, model in models.items():
        calls = {format: step(model, format, chosen, device) for format in ALL}
        for part, label in enumerate(("attention", "step")):
            times = measure({format: call[part] for format, call in calls.items()}, device, rounds)
            print(f"| {name} | {label}, ms | " + " | ".join(spread(t) for t in times) + " |")
        del calls


def step(
    model: CausalLM, format: str, chosen: Backend, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(attention of all layers, whole step) on pages full of random numbers."""
    seqs, length = 16, 2048
    dtype = model.embed.weight.dtype
    cache = Cache.make(model, format, seqs, length, device)
    shape = (2, length, model.kv_heads, model.head_dim)
    for pages in cache.pages:
        key, value = torch.randn(shape, device=device).to(dtype)
        for seq in range(seqs):
            chosen.store_kv(key, value, pages, cache.slots(seq, 0, length))
    context = cache.context(chosen, None, length)
    tokens = torch.arange(seqs, device=device)
    heads = model.config.num_heads
    query = torch.randn(seqs, heads, model.head_dim, device=device).to(dtype)
    options = {"scale": model.head_dim**-0.5, "max_context_len": length}

    def attention() -> None:
        for pages in cache.pages:
            chosen.paged_decode(query, pages, cache.tables, context.context_lens, **options)

    return attention, lambda: model.logits(model(tokens, context))


def measure(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> list[list[float]]:
    """Milliseconds of every call in every round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:
                times[name].append(1e3 * (time.perf_counter() - start))
    return list(times.values())


def spread(values: list[float], unit: str = "", digits: int = 1) -> str:
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("bytes", "attention", "logits", "speed"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, path = torch.device(options.device), Path(embedded.path())
    chosen = backend(device)
    weights = (path / "model.safetensors").is_file()
    sizes = registry.parse_config(LLAMA_56M)

    def wanted(part: str, title: str) -> bool:
        if options.only in (None, part):
            print(f"\n{title}\n")
        return options.only in (None, part)

    print(f"{chosen.name} on {device.type}, torch {torch.__version__}, {options.threads} threads")
    if weights and wanted("bytes", "Bytes per token"):
        show_bytes()
    if wanted("attention", "Attention error, median [smallest, largest] of 5 seeds"):
        show_attention_error(chosen, device, 5)
    if weights and wanted("logits", "Logits of the embedded model"):
        model = loader.load_model(path, embedded_config(), dtype=torch.float32, device=device)
        show_logits(model, chats(options.tokens), chosen, device)
    if wanted("logits", "Logits of a random model of 56 million parameters"):
        model = loader.random_init(sizes, torch.float32, device)
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(3, sizes.vocab_size, (options.tokens,), generator=rng)
        show_logits(model, list(ids.split(500)), chosen, device)
    if wanted("speed", f"16 x 2,048 tokens, median [min, max] of {options.rounds} rounds"):
        models = {"random, 56M": loader.random_init(sizes, torch.bfloat16, device)}
        if weights:
            models["embedded"] = loader.load_model(
                path, embedded_config(), dtype=torch.bfloat16, device=device
            )
        show_speed(models, chosen, device, options.rounds)


if __name__ == "__main__":
    main()
