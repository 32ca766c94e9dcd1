"""When it is asked: a number of clients at once, or arrivals at a rate. One round is one value."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import answers
from benchmarks.answers import Answer
from benchmarks.dialect import Request
from benchmarks.sse import BenchError, Client, Refused, Reply
from benchmarks.workload import Script, Workload


@dataclass(frozen=True)
class Round:
    """All answers of one load.

    Attributes:
        seconds: from the first request to the last answer.
        cpu_seconds: what this process used meanwhile.
        refused: requests that the server had no room for; only an open loop goes on then.
    """

    answers: tuple[Answer, ...]
    seconds: float
    cpu_seconds: float
    refused: int = 0


@dataclass(frozen=True)
class Exchange:
    request: Request
    reply: Reply
    due: float
    turn: int

    def answer(self) -> Answer:
        """Raises BenchError: it is not an answer, or has another length than asked for."""
        answer = answers.read(self.reply, due=self.due, turn=self.turn)
        asked = self.request.output_tokens
        if answer.counted and asked not in (None, answer.completion_tokens):
            raise BenchError(f"asked for {asked} tokens, got {answer.completion_tokens}")
        return answer


class Talk:
    """One round in progress: what was said so far."""

    def __init__(self, client: Client, path: str, on_answer: Callable[[], object]) -> None:
        self._client = client
        self._path = path
        self._on_answer = on_answer
        self.exchanges: list[Exchange] = []
        self.refused = 0

    async def follow(self, script: Script, due: float | None = None) -> None:
        """Asks all that a script asks, each request when the last one is answered."""
        reply: Reply | None = None
        for turn in itertools.count():
            try:
                request = next(script) if reply is None else script.send(reply)
            except StopIteration:
                return
            asked = time.perf_counter() if due is None or turn else due
            reply = await self._client.post(self._path, request.body)
            self.exchanges.append(Exchange(request, reply, asked, turn))
            self._on_answer()


@dataclass(frozen=True)
class ClosedLoop:
    """Clients that start at once; each sends its next request when the last is answered.

    Attributes:
        requests: scripts (single requests, or chats) per client, one after another.
    """

    clients: int
    requests: int = 2

    @property
    def name(self) -> str:
        return f"{self.clients} clients" if self.clients > 1 else "1 client"

    @property
    def scripts(self) -> int:
        """In a round."""
        return self.clients * self.requests

    @property
    def connections(self) -> int:
        """Made before a round begins."""
        return self.clients

    async def run(self, talk: Talk, scripts: list[Script], shape: random.Random) -> None:
        async def work(mine: list[Script]) -> None:
            for script in mine:
                await talk.follow(script)

        await all_of(work(scripts[client :: self.clients]) for client in range(self.clients))

    def short(self) -> ClosedLoop:
        """Enough to warm a server up."""
        return replace(self, requests=1)


@dataclass(frozen=True)
class OpenLoop:
    """Arrivals that do not wait for answers, at times of a Poisson process.

    Attributes:
        rate: scripts (single requests, or chats) per second.
        arrivals: in a round.
        max_concurrency: at most so many at once; who comes meanwhile waits here, at the client.
    """

    rate: float
    arrivals: int = 100
    max_concurrency: int | None = None

    @property
    def name(self) -> str:
        return f"{self.rate:g} arrivals/s"

    @property
    def scripts(self) -> int:
        """In a round."""
        return self.arrivals

    @property
    def connections(self) -> int:
        """Made before a round begins; the others as they are needed."""
        return 1

    def times(self, shape: random.Random) -> list[float]:
        """Seconds from the round's start."""
        gaps = (shape.expovariate(self.rate) for _ in range(self.arrivals))
        return list(itertools.accumulate(gaps))

    async def run(self, talk: Talk, scripts: list[Script], shape: random.Random) -> None:
        limit = asyncio.Semaphore(self.max_concurrency) if self.max_concurrency else nullcontext()
        began = time.perf_counter()

        async def arrive(script: Script, due: float) -> None:
            await asyncio.sleep(due - time.perf_counter())
            async with limit:
                try:
                    await talk.follow(script, due)
                except Refused:
                    talk.refused += 1

        times = self.times(shape)
        await all_of(arrive(s, began + at) for s, at in zip(scripts, times, strict=True))

    def short(self) -> ClosedLoop:
        """Enough to warm a server up."""
        return ClosedLoop(clients=4, requests=1)


Loop = ClosedLoop | OpenLoop


async def all_of(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Waits for all; where one fails, the others are cancelled and its exception is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def run_round(
    client: Client,
    workload: Workload,
    loop: Loop,
    seed: int,
    on_answer: Callable[[], object] = lambda: None,
) -> Round:
    """One round of new prompts.

    Args:
        seed: of lengths and arrival times. What prompts say is new every time, so that no server
            finds in its cache what it was asked in another round.
        on_answer: called after every answer.

    Raises:
        BenchError: the server refused, or an answer has another length than asked for.
    """
    shape = random.Random(seed)
    scripts = workload.scripts(loop.scripts, shape, random.Random())
    talk = Talk(client, workload.dialect.path, on_answer)
    try:
        await client.open(loop.connections)
        began, cpu = time.perf_counter(), time.process_time()
        await loop.run(talk, scripts, shape)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    finally:
        client.close()
    said = tuple(exchange.answer() for exchange in talk.exchanges)
    return Round(said, seconds, cpu, talk.refused)


async def measure(
    client: Client,
    workload: Workload,
    loop: Loop,
    *,
    rounds: int = 3,
    seed: int = 0,
    warm_up: bool = True,
    on_answer: Callable[[], object] = lambda: None,
) -> list[Round]:
    """A short round that is not counted, then `rounds` of them; `report.summarize` takes them.

        dialect = Dialect(await first_model(client))
        workload = Independent(dialect, Lengths(64, 64), Lengths(64, 64))
        rounds = await measure(client, workload, ClosedLoop(16))

    Args:
        seed: of the first round's lengths and arrival times; the next rounds take the next ones.
        warm_up: whether to begin with a round of short answers, one script for each client.

    Raises:
        BenchError: as `run_round`.
    """
    if warm_up:
        await run_round(client, workload.brief(), loop.short(), seed)
    return [
        await run_round(client, workload, loop, seed + number, on_answer)
        for number in range(rounds)
    ]
