"""What the engine alone does, without HTTP, text or a client on its cores: a closed loop of
requests with random prompts, in the process that computes them.

python -m benchmarks.in_process --clients 1 16 64
python -m benchmarks.in_process --clients 16 --input 1024 --prefill-stretch 0 1.6

Several stretches take turns within each round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.local_server import make_checkpoint
from configs.settings import Settings
from engine.build import build
from engine.loop import EngineLoop
from engine.protocol import Submit
from scheduler.pace import Pace
from scheduler.request import Request, SamplingParams


@dataclass
class Round:
    """One closed loop; times in seconds.

    Attributes:
        first: from each request to its first token
        gaps: between the tokens of each request
    """

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class ClosedLoop:
    """Keeps `clients` requests in the engine, `each` per client.

    Args:
        loop: stepped here
        shape: tokens in and out of each request
    """

    def __init__(self, loop: EngineLoop, clients: int, each: int, shape: tuple[int, int]):
        self._loop, self._clients, self._left = loop, clients, clients * (each - 1)
        self._shape, self._draw = shape, Random(clients)
        self._names = itertools.count()
        self._seen: dict[str, float] = {}  # by request: its arrival, then its newest token
        self._answered: set[str] = set()
        self.round = Round()

    def run(self) -> Round:
        began = time.perf_counter()
        self._send(self._clients)
        while self._loop.has_work:
            self._loop.step()
            output = self._loop.collect()
            if output.refused or output.failed:
                raise RuntimeError(f"not answered: {output.refused or output.failed}")
            now = time.perf_counter()
            for delta in output.deltas:
                self._note(delta.request_id, len(delta.tokens), now)
            ended = sum(delta.finish_reason is not None for delta in output.deltas)
            self._send(min(ended, self._left))
            self._left -= min(ended, self._left)
        self.round.seconds = time.perf_counter() - began
        return self.round

    def _note(self, name: str, tokens: int, now: float) -> None:
        if tokens:
            kind = self.round.gaps if name in self._answered else self.round.first
            kind.append(now - self._seen[name])
            self._answered.add(name)
            self._seen[name] = now
            self.round.tokens += tokens

    def _send(self, count: int) -> None:
        given, out = self._shape
        batch = []
        for _ in range(count):
            name = f"r{id(self)}-{next(self._names)}"
            prompt = tuple(self._draw.randrange(self._loop.info.vocab_size) for _ in range(given))
            sampling = SamplingParams(temperature=0, seed=0, max_tokens=out, ignore_eos=True)
            batch.append(Request(id=name, prompt_ids=prompt, sampling=sampling, cache_salt=name))
            self._seen[name] = time.perf_counter()
        if batch:
            self._loop.take(Submit(batch))


def line(rounds: Sequence[Round]) -> str:
    """Tokens/s, first token and gaps in ms, as cells of a table."""
    rates = [round.tokens / round.seconds for round in rounds]
    first, gaps = ([t for r in rounds for t in getattr(r, name)] for name in ("first", "gaps"))
    cells = [f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"]
    cells += [f"{_at(times, 50)} / {_at(times, 99)}" for times in (first, gaps)]
    return " | ".join(cells)


def _at(times: list[float], percent: int) -> str:
    return f"{1e3 * sorted(times)[min(len(times) - 1, len(times) * percent // 100)]:,.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", type=Path, help="default: the random Llama of `quire bench`")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--each", type=int, default=2, help="requests per client and round")
    parser.add_argument("--prefill-stretch", type=float, nargs="+", default=[0.0])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(argv)
    loop = build(Settings.of(model=str(given.model or make_checkpoint())))
    print(f"{given.input} tokens in, {given.output} out, {given.rounds} rounds\n")
    print("| clients | stretch | tokens/s | first token p50 / p99 ms | gap p50 / p99 ms |")
    print("|--:|--:|--:|--:|--:|")
    for clients in given.clients:
        rounds: dict[float, list[Round]] = {stretch: [] for stretch in given.prefill_stretch}
        for stretch in [*rounds][:1] + [*rounds] * given.rounds:  # the very first warms up
            loop.scheduler.pace = Pace(stretch)
            closed = ClosedLoop(loop, clients, given.each, (given.input, given.output))
            rounds[stretch].append(closed.run())
        del rounds[given.prefill_stretch[0]][0]
        for stretch, done in rounds.items():
            print(f"| {clients} | {stretch:g} | {line(done)} |", flush=True)
    loop.close()


if __name__ == "__main__":
    main()
