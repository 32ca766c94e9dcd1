"""What a KV cache gains: GPT-2 generates with one and without, in Quire and in transformers.

    python -m benchmarks.kv_cache_speedup --tokens 200 --plot kv_cache_speedup.png

A random GPT-2 (124M), one sequence, a prompt of 16 tokens, greedy, past the end-of-sequence token.
All four ways take turns within each round, in one process, with the same dtype and threads:

    Quire, cache            one request; the engine's loop is stepped to its end
    Quire, no cache         a new request for each token, whose prompt is all tokens before it; the
                            prefix cache is off, so each computes every position again
    transformers, cache     `generate(use_cache=True)`
    transformers, no cache  `generate(use_cache=False)`

Quire's times hold scheduling, blocks and sampling, but neither HTTP nor text. Before anything is
timed, the four must agree on the first tokens in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import make_checkpoint
from configs.settings import Settings
from engine.build import build
from engine.loop import EngineLoop
from engine.protocol import Submit
from models import loader
from scheduler.request import Request, SamplingParams

FOLDER = Path(__file__).parents[1] / ".cache" / "bench"
SHAPE = "gpt2"
PROMPT = tuple(range(100, 116))
MOST_TOKENS = 1024 - len(PROMPT)
CHECKED = 48  # tokens that must be the same everywhere
PUBLISHED = (6.244, 21.098)
"""Seconds for 1,000 tokens on an A5000, with a cache and without, in the project's seed notes."""


@dataclass(frozen=True)
class Run:
    """One answer: its tokens, and the seconds that each took."""

    tokens: list[int]
    seconds: list[float]


Generate = Callable[[int], Run]
"""Generates so many tokens after PROMPT."""


class Quire:
    """The engine, stepped by the caller."""

    def __init__(self, folder: Path, dtype: str, device: str, threads: int) -> None:
        self._loop: EngineLoop = build(
            Settings.of(
                model=str(folder),
                dtype=dtype,
                device=device,
                cpu_threads=threads,
                max_num_seqs=1,
                max_num_batched_tokens=1024,
                enable_prefix_caching=False,
                trace_steps=0,
            )
        )
        self._requests = 0

    def cached(self, count: int) -> Run:
        return self._answer(PROMPT, count)

    def uncached(self, count: int) -> Run:
        run = Run([], [])
        for _ in range(count):
            one = self._answer((*PROMPT, *run.tokens), 1)
            run.tokens.extend(one.tokens)
            run.seconds.extend(one.seconds)
        return run

    def _answer(self, prompt: tuple[int, ...], count: int) -> Run:
        loop, run = self._loop, Run([], [])
        self._requests += 1
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=count, ignore_eos=True)
        last = time.perf_counter()
        loop.take(Submit([Request(id=str(self._requests), prompt_ids=prompt, sampling=sampling)]))
        while loop.has_work:
            loop.step()
            for delta in loop.collect().deltas:
                run.tokens.extend(delta.tokens)
                now = time.perf_counter()
                run.seconds.append(now - last)
                last = now
        return run


class Transformers:
    """`generate` of transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        from transformers import GPT2LMHeadModel

        model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype)
        self._model = model.to(device).eval()
        self._model.generation_config.eos_token_id = None
        self._prompt = torch.tensor([PROMPT], device=device)

    def cached(self, count: int) -> Run:
        return self._generate(count, use_cache=True)

    def uncached(self, count: int) -> Run:
        return self._generate(count, use_cache=False)

    def _generate(self, count: int, *, use_cache: bool) -> Run:
        clock = _Clock()
        tokens = self._model.generate(
            self._prompt,
            attention_mask=torch.ones_like(self._prompt),
            max_new_tokens=count,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
            streamer=clock,
        )
        return Run(tokens[0, len(PROMPT) :].tolist(), clock.seconds)


class _Clock:
    """A streamer of `generate` that notes when tokens come."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def put(self, _: torch.Tensor) -> None:
        now = time.perf_counter()
        if self._last is not None:  # the first call brings the prompt
            self.seconds.append(now - self._last)
        self._last = now

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class System:
    """Somebody who can generate with a cache and without."""

    name: str
    cached: Generate
    uncached: Generate


def systems(folder: Path, dtype: torch.dtype, device: str, threads: int) -> list[System]:
    """Quire, and transformers."""
    import transformers

    name = str(dtype).removeprefix("torch.")
    quire, peer = Quire(folder, name, device, threads), Transformers(folder, dtype, device)
    return [
        System("Quire", quire.cached, quire.uncached),
        System(f"transformers {transformers.__version__}", peer.cached, peer.uncached),
    ]


def disagreement(found: Sequence[System], count: int) -> str | None:
    """Who differs from the first one with a cache, and where; None where all agree."""
    expected = found[0].cached(count).tokens
    for system in found:
        for way, generate in (("with", system.cached), ("without", system.uncached)):
            tokens = generate(count).tokens
            if tokens != expected:
                pairs = enumerate(zip(tokens, expected, strict=False))
                place = next((i for i, (a, b) in pairs if a != b), len(tokens))
                return f"{system.name} {way} a cache differs from token {place} on"
    return None


@dataclass(frozen=True)
class Result:
    """All rounds of one system for one length."""

    name: str
    count: int
    cached: list[Run]
    uncached: list[Run]

    @property
    def line(self) -> str:
        """A row of the table."""
        totals = [[sum(run.seconds) for run in runs] for runs in (self.cached, self.uncached)]
        cached, uncached = (statistics.median(total) for total in totals)
        return (
            f"| {self.name} | {self.count:,} | {_spread(totals[0])} | {self.count / cached:,.1f} "
            f"| {_spread(totals[1])} | {self.count / uncached:,.1f} | {uncached / cached:.2f} |"
        )

    def milliseconds(self, *, cached: bool) -> list[float]:
        """Per token, by position: the median of the rounds."""
        runs = self.cached if cached else self.uncached
        return [
            1e3 * statistics.median(times)
            for times in zip(*(run.seconds for run in runs), strict=True)
        ]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measure(found: Sequence[System], count: int, rounds: int) -> list[Result]:
    """`rounds` in which all take turns; a short one before does not count."""
    results = [Result(system.name, count, [], []) for system in found]
    for turn in range(rounds + 1):
        length = count if turn else min(count, CHECKED)
        for system, result in zip(found, results, strict=True):
            for runs, generate in (
                (result.cached, system.cached),
                (result.uncached, system.uncached),
            ):
                run = generate(length)
                if turn:
                    runs.append(run)
                    print(f"{system.name}: {sum(run.seconds):.2f} s", file=sys.stderr)
    return results


def table(results: Sequence[Result]) -> str:
    cached, uncached = PUBLISHED
    return "\n".join(
        [
            "| | tokens | with a cache, s | tokens/s | without, s | tokens/s | speed-up |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *(result.line for result in results),
            f"| published (seed notes, A5000) | 1,000 | {cached} | {1000 / cached:.1f} "
            f"| {uncached} | {1000 / uncached:.1f} | {uncached / cached:.2f} |",
        ]
    )


def draw(results: Sequence[Result], file: Path) -> None:
    """Milliseconds per token against the token's position."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    for color, result in enumerate(results):
        for cached, style in ((True, "-"), (False, "--")):
            times = result.milliseconds(cached=cached)
            label = f"{result.name}, {'' if cached else 'no '}cache"
            places = range(len(PROMPT) + 1, len(PROMPT) + 1 + len(times))
            # The first token reads the prompt.
            axes.plot(places[1:], times[1:], style, color=f"C{color}", label=label, linewidth=1)
    axes.set_xlabel("position of the token")
    axes.set_ylabel("ms per token, median of the rounds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def checkpoint() -> Path:
    """The random GPT-2, made once."""
    folder = FOLDER / SHAPE
    if not (folder / "model.safetensors").is_file():
        make_checkpoint.write(folder, SHAPE)
    return folder


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1000, help="to generate (default 1000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=cores, help=f"on a CPU (default {cores})")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the seconds of every token")
    args = parser.parse_args(argv)
    if not 1 <= args.tokens <= MOST_TOKENS:
        parser.error(f"--tokens must be between 1 and {MOST_TOKENS}, got {args.tokens}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    folder, device = checkpoint(), torch.device(args.device)
    dtype = loader.resolve_dtype(args.dtype, loader.load_config(folder), device)
    try:
        found = systems(folder, torch.float32, args.device, args.threads)
    except ImportError:
        raise SystemExit("kv_cache_speedup needs transformers: make venv installs it") from None
    problem = disagreement(found, min(args.tokens, CHECKED))
    if problem is not None:
        raise SystemExit(f"kv_cache_speedup: in float32, {problem}")
    if dtype is not torch.float32:
        del found
        found = systems(folder, dtype, args.device, args.threads)
    results = measure(found, args.tokens, args.rounds)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(f"GPT-2 124M, {dtype}, {where}; median (range) of {args.rounds} rounds\n")
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps([_plain(result) for result in results]) + "\n")
    if args.plot is not None:
        draw(results, args.plot)


def _plain(result: Result) -> dict[str, object]:
    return {
        "name": result.name,
        "tokens": result.count,
        "cached": [run.seconds for run in result.cached],
        "uncached": [run.seconds for run in result.uncached],
    }


if __name__ == "__main__":
    main()
