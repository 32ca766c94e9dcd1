"""What streaming costs the HTTP process, in CPU time per streamed token; no model.

    python -m benchmarks.stream_cost [--profile]

The server's application and tokenizer over an engine process that computes nothing: it gives every
stream one token per step. Clients have a process of their own. Counted is the CPU time of the HTTP
process alone while tokens flow: reading the engine's messages, text, metrics, JSON and sockets, but
not the parsing of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import json
import multiprocessing
import pstats
import resource
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from pathlib import Path

import msgspec
import uvicorn

from benchmarks.local_server import make_checkpoint
from configs.settings import Settings
from engine.client import ProcessEngine
from engine.process import PipeInbox
from engine.protocol import (
    EngineInfo,
    EngineStats,
    FromEngine,
    Ready,
    Receipt,
    Shutdown,
    StepOutput,
    StepReport,
    Submit,
    TokenDelta,
)
from scheduler.request import Request
from scheduler.stopping import FinishReason
from server.keys import KeyRing
from server.launch import build_app
from server.lifecycle import Lifecycle
from server.tokenizer import TextModel

TEXT = (
    "The cache is a gathering of pages, hello world, how are you? ünïcödé, 漢字 and 42 numbers.\n"
)
STOPS = ["\n\n", "User:", "###"]
SETTLE_SECONDS = 0.2  # between the last request of a round and its first token


@dataclass(frozen=True)
class Ticker:
    """An engine process that computes nothing: once `streams` requests are there, each of them gets
    the next of `tokens` every `seconds`, until the end that they asked for."""

    info: EngineInfo
    tokens: list[int]
    streams: int
    seconds: float

    def __call__(self, _: Settings, inbox: Connection, outbox: Connection) -> None:
        """The process's entry point: serves one crowd after the other."""
        encode = msgspec.msgpack.Encoder().encode

        def send(message: FromEngine) -> None:
            outbox.send_bytes(encode(message))

        send(Ready(self.info))
        reading, crowd = PipeInbox(inbox), list[Request]()
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                for message in reading.drain(wait=True):
                    if isinstance(message, Shutdown):
                        return
                    if isinstance(message, Submit):
                        crowd += message.requests
                        admitted = [request.id for request in message.requests]
                        send(StepOutput(EngineStats(running=len(crowd)), admitted=admitted))
                if len(crowd) == self.streams:
                    time.sleep(SETTLE_SECONDS)
                    self._step(crowd, send)
                    crowd = []

    def _step(self, crowd: list[Request], send: Callable[[FromEngine], None]) -> None:
        count, due = crowd[0].sampling.max_tokens or 0, time.monotonic()
        for made in range(1, count + 1):
            due += self.seconds
            time.sleep(max(due - time.monotonic(), 0))
            over, token = made == count, [self.tokens[made % len(self.tokens)]]
            reason: FinishReason | None = "length" if over else None
            receipt = Receipt() if over else None
            send(
                StepOutput(
                    EngineStats(running=0 if over else len(crowd)),
                    deltas=[
                        TokenDelta(request.id, 0, token, reason, receipt=receipt)
                        for request in crowd
                    ],
                    step=StepReport(len(crowd), self.seconds, 0.0, time.time()),
                )
            )


@dataclass(frozen=True)
class Load:
    """`streams` at once, `tokens` each, `rate` tokens per second together."""

    streams: int
    rate: float
    tokens: int
    stops: bool = False

    @property
    def body(self) -> bytes:
        """Of every request."""
        fields = {
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": self.tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(fields | ({"stop": STOPS} if self.stops else {})).encode()


@dataclass(frozen=True)
class Cost:
    """One round: events sent, seconds on the clock, CPU seconds of the HTTP process."""

    events: int
    seconds: float
    cpu: float

    @property
    def microseconds(self) -> float:
        """CPU time per event."""
        return 1e6 * self.cpu / self.events


def read_streams(port: int, load: Load, results: Queue[int]) -> None:
    """A process of clients: reads all streams to their ends, and puts the number of events."""

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(load.body)}\r\n\r\n".encode() + load.body)
        events = 0
        while data := await reader.read(1 << 16):
            events += data.count(b"data: {")
            if b"data: [DONE]" in data:
                break
        writer.close()
        return events

    async def every() -> int:
        return sum(await asyncio.gather(*(one() for _ in range(load.streams))))

    results.put(asyncio.run(every()))


@contextlib.asynccontextmanager
async def serving(folder: Path, load: Load) -> AsyncIterator[tuple[ProcessEngine, int]]:
    """The engine, and the port that the application over it answers at. `folder`: of the tokenizer
    files."""
    settings = Settings.of(model=str(folder))
    tokens = TextModel.load(folder).encode([TEXT], add_special_tokens=False)[0]
    ticker = Ticker(_info(folder, load), tokens, load.streams, load.streams / load.rate)
    engine = ProcessEngine(settings, ticker)
    await engine.start(lambda progress: None)
    lifecycle = Lifecycle(settings.lifetime.stall_timeout)
    app = build_app(settings, KeyRing(), None, lifecycle, engine, {})
    lifecycle.engine = engine
    config = uvicorn.Config(app, lifespan="off", ws="none", log_level="warning", access_log=False)
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    answering = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield engine, listening.getsockname()[1]
    finally:
        server.should_exit = True
        await answering
        await engine.close()


def _info(folder: Path, load: Load) -> EngineInfo:
    return EngineInfo(
        model_path=str(folder),
        architecture="none",
        device="cpu",
        dtype="float32",
        vocab_size=1 << 20,
        max_model_len=1 << 20,
        eos_token_ids=[],
        block_size=16,
        num_blocks=1 << 20,
        max_num_seqs=load.streams,
        max_num_batched_tokens=load.streams,
        kv_bytes_per_token=1,
        weight_bytes=1,
    )


async def measure(
    folder: Path, load: Load, rounds: int, profile: cProfile.Profile | None = None
) -> list[Cost]:
    """What each of `rounds` cost, after one that does not count."""
    context = multiprocessing.get_context("spawn")
    results, costs = context.Queue(), list[Cost]()
    async with serving(folder, load) as (engine, port):
        for _ in range(rounds + 1):
            clients = context.Process(target=read_streams, args=(port, load, results))
            clients.start()
            while engine.stats().running < load.streams:
                await asyncio.sleep(SETTLE_SECONDS / 10)
            with profile or contextlib.nullcontext():
                cpu, started = _cpu_seconds(), time.monotonic()
                events = await asyncio.to_thread(results.get)
                costs.append(Cost(events, time.monotonic() - started, _cpu_seconds() - cpu))
            await asyncio.to_thread(clients.join)
    return costs[1:]


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def line(load: Load, costs: list[Cost]) -> str:
    """A row of the table."""
    spent = [cost.microseconds for cost in costs]
    core = statistics.median(cost.cpu / cost.seconds for cost in costs)
    rate = statistics.median(cost.events / cost.seconds for cost in costs)
    return (
        f"| {load.streams} | {rate:,.0f} | {statistics.median(spent):.1f} "
        f"({min(spent):.1f} to {max(spent):.1f}) | {core:.1%} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[64])
    parser.add_argument("--rate", type=float, default=2000, help="tokens per second, together")
    parser.add_argument("--seconds", type=float, default=5, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stops", action="store_true", help="with three stop strings")
    parser.add_argument("--profile", action="store_true", help="functions, by their own time")
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    args = parser.parse_args(argv)
    profile = cProfile.Profile() if args.profile else None
    folder, figures = make_checkpoint(), list[dict[str, object]]()
    if not args.json:
        print("| streams | events/s | CPU us per event, median (range) | of a core |")
        print("|--:|--:|--:|--:|")
    for streams in args.streams:
        load = Load(streams, args.rate, int(args.rate * args.seconds / streams), args.stops)
        costs = asyncio.run(measure(folder, load, args.rounds, profile))
        figures.append(asdict(load) | {"rounds": [asdict(cost) for cost in costs]})
        if not args.json:
            print(line(load, costs), flush=True)
    if args.json:
        print(json.dumps(figures, indent=2))
    if profile is not None:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
