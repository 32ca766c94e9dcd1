"""What the prefix cache gains with hits and costs without: `python -m benchmarks.prefix_cache`.

Two engines in this process, alike but for `enable_prefix_caching`, serve the same requests in turn
within each round, so that a busy machine slows both alike. The model is the random Llama of
`quire bench`; prompts are random ids, drawn anew for every round, so that only what is meant
to be shared is found. TTFT is what the engine takes, without HTTP.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import schedule
from benchmarks.local_server import make_checkpoint
from configs.settings import Settings
from engine.build import build
from engine.loop import EngineLoop
from engine.protocol import Submit
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.request import Request, SamplingParams
from scheduler.scheduler import Scheduler

VOCAB = 30_000
SHARES = (0.0, 0.5, 0.9)
TURNS, SYSTEM, QUESTION, ANSWER = 6, 160, 48, 32  # of a chat, in tokens
Times = dict[bool, list[float]]


class Bench:
    """Two engines; `True` is the one that finds prefixes."""

    def __init__(self, threads: int, rounds: int) -> None:
        self.draw = random.Random(0)
        self.rounds = rounds
        self.ids = itertools.count()
        self.loops = {on: self._engine(on, threads) for on in (True, False)}

    def _engine(self, on: bool, threads: int) -> EngineLoop:
        settings = Settings.of(
            model=str(make_checkpoint()),
            cpu_threads=threads,
            kv_cache_memory_bytes=32 << 20,  # soon full, as it is on a server
            enable_prefix_caching=on,
        )
        return build(settings)

    def tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(3, VOCAB) for _ in range(count)]

    def turns(self) -> list[bool]:
        """Who goes first changes from round to round."""
        return self.draw.sample([True, False], 2)

    def request(self, prompt: list[int], answer: int) -> Request:
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=answer, ignore_eos=True)
        return Request(id=str(next(self.ids)), prompt_ids=tuple(prompt), sampling=sampling)

    def ask(self, on: bool, prompt: list[int], answer: int = 1) -> tuple[float, list[int]]:
        """(milliseconds to the first token, the tokens)"""
        loop, tokens, first = self.loops[on], [], 0.0
        start = time.perf_counter()
        loop.take(Submit([self.request(prompt, answer)]))
        while loop.scheduler.has_work:
            loop.step()
            tokens += [token for delta in loop.collect().deltas for token in delta.tokens]
            if tokens and not first:
                first = 1e3 * (time.perf_counter() - start)
        return first, tokens

    # ------------------------------------------------------------------ parts

    def shared_prefix(self, length: int) -> None:
        print(f"\nTTFT of a prompt of {length} tokens, of which a part was sent before\n")
        head("shared")
        for share in SHARES:
            times: Times = {True: [], False: []}
            for _ in range(self.rounds):
                prefix = self.tokens(int(share * length))
                prompt = prefix + self.tokens(length - len(prefix))
                for on in self.turns():
                    if prefix:
                        self.ask(on, prefix + self.tokens(1))
                    times[on].append(self.ask(on, prompt)[0])
            row(f"{100 * share:.0f} %", times)

    def chats(self) -> None:
        print(f"\nTTFT in a chat: {SYSTEM} tokens, then {QUESTION} and {ANSWER} per turn\n")
        head("turn (tokens)")
        turns: list[Times] = [{True: [], False: []} for _ in range(TURNS)]
        for _ in range(self.rounds):
            system = self.tokens(SYSTEM)
            questions = [self.tokens(QUESTION) for _ in range(TURNS)]
            for on in self.turns():
                context = system[:]
                for times, question in zip(turns, questions, strict=True):
                    context += question
                    first, answer = self.ask(on, context, ANSWER)
                    times[on].append(first)
                    context += answer
        for turn, times in enumerate(turns):
            row(f"{turn + 1} ({SYSTEM + QUESTION + turn * (QUESTION + ANSWER)})", times)

    def nothing_shared(self, clients: int, prompt: int, answer: int) -> None:
        """CPU time of both engines on requests that share nothing."""
        cpu: Times = {True: [], False: []}
        wall: Times = {True: [], False: []}
        for i in range(-2, self.rounds):
            batch = [self.tokens(prompt) for _ in range(clients)]
            for on in self.turns():
                requests = [self.request(tokens, answer) for tokens in batch]
                start, began = time.process_time(), time.perf_counter()
                self._serve(on, requests)
                if i >= 0:  # the first rounds fill the pool
                    cpu[on].append(1e3 * (time.process_time() - start))
                    wall[on].append(1e3 * (time.perf_counter() - began))
        print(f"\n{clients} requests at once of {prompt} + {answer} tokens that share nothing\n")
        print("| ms per batch | cache | no cache | cache costs |\n|---|--:|--:|--:|")
        for name, times in (("user + sys", cpu), ("wall", wall)):
            print(f"| {name} | {show(times[True])} | {show(times[False])} | {more(times)} |")

    def shared_system(self, clients: int, prompt: int, answer: int) -> None:
        """Time for requests at once behind a system prompt that nobody sent before: its ratio is
        the throughput gained."""
        print(
            f"\n{clients} requests at once of {prompt} + {answer} tokens, ms until all are done\n"
        )
        head("system prompt")
        for length in (80, 341):
            times: Times = {True: [], False: []}
            for _ in range(self.rounds):
                prefix = self.tokens(length)
                batch = [prefix + self.tokens(prompt) for _ in range(clients)]
                for on in self.turns():
                    start = time.perf_counter()
                    self._serve(on, [self.request(tokens, answer) for tokens in batch])
                    times[on].append(1e3 * (time.perf_counter() - start))
            row(f"{length} tokens", times)

    def _serve(self, on: bool, requests: list[Request]) -> None:
        loop = self.loops[on]
        loop.take(Submit(requests))
        while loop.scheduler.has_work:
            loop.step()
            loop.collect()


def scheduler_alone(rounds: int) -> None:
    """The same question to the scheduler without a model: every block taken evicts another."""
    tested = {
        on: Scheduler(
            KVCacheManager(BlockPool(schedule.BLOCKS), schedule.BLOCK_SIZE, prefix_cache=on),
            max_num_seqs=schedule.SLOTS,
            max_num_batched_tokens=schedule.BUDGET,
        )
        for on in (True, False)
    }
    draw, times = random.Random(0), {True: [], False: []}  # type: tuple[random.Random, Times]
    steps = 1
    for i in range(rounds + 1):
        load = list(schedule.prompts(draw, 256, 512))
        for on in draw.sample([True, False], 2):
            seconds, steps = schedule.run(tested[on], load)
            if i:
                times[on].append(1e6 * seconds / steps)
    print("\nThe scheduler alone: 64 at once of 512 + 128 tokens that share nothing\n")
    print("| us of CPU time per step | cache | no cache | cache costs |\n|---|--:|--:|--:|")
    print(f"| {steps} steps | {show(times[True])} | {show(times[False])} | {more(times)} |")


def head(name: str) -> None:
    print(f"| {name} | cache, ms | no cache, ms | ratio |\n|--:|--:|--:|--:|")


def row(name: str, times: Times) -> None:
    ratio = statistics.median(off / on for on, off in zip(times[True], times[False], strict=True))
    print(f"| {name} | {show(times[True])} | {show(times[False])} | {ratio:.2f}x |", flush=True)


def show(values: list[float]) -> str:
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:,.1f} ({low:,.1f} to {high:,.1f})"


def more(times: Times) -> str:
    ratios = [on / off - 1 for on, off in zip(times[True], times[False], strict=True)]
    low, middle, high = (100 * f(ratios) for f in (min, statistics.median, max))
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="that compute (default 1)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompts with hits")
    parser.add_argument("--only", choices=("prefix", "chats", "system", "cost", "scheduler"))
    options = parser.parse_args()
    parts: dict[str, Callable[[Bench], None]] = {
        "prefix": lambda bench: bench.shared_prefix(options.length),
        "chats": lambda bench: bench.chats(),
        "system": lambda bench: bench.shared_system(8, 30, 35),
        "cost": lambda bench: bench.nothing_shared(16, 128, 32),
    }
    chosen = [part for name, part in parts.items() if options.only in (None, name)]
    print(
        f"torch {torch.__version__}, {options.threads} threads, median (range) of {options.rounds}"
    )
    if chosen:
        bench = Bench(options.threads, options.rounds)
        for part in chosen:
            part(bench)
    if options.only in (None, "scheduler"):
        scheduler_alone(2 * options.rounds)


if __name__ == "__main__":
    main()
