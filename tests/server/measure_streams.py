"""What streaming costs the HTTP process: 64 streams, 2,000 chunks per second, no engine work.

    python -m tests.server.measure_streams [--profile]

The engine is a ticker that hands every stream one token per step, as the real client's dispatch
does. Clients are a process of their own. Printed is the share of one core that the server's process
used while the chunks flowed.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import pstats
import resource
import socket
import sys
import time
from multiprocessing.queues import Queue

import msgspec
import uvicorn

from engine.protocol import EngineStats, TokenDelta
from scheduler.request import Request
from scheduler.stopping import FinishReason
from server.app import create_app
from tests.server.fake_engine import INFO
from tests.server.text_models import chat_model, ids_of

WORDS = "hello world, how are you? ünïcödé "


class TickingStream:
    def __init__(self, engine: TickingEngine, request: Request) -> None:
        self.engine, self.request, self.made = engine, request, 0
        self.queue: asyncio.Queue[TokenDelta] = asyncio.Queue()

    def __aiter__(self) -> TickingStream:
        return self

    async def __anext__(self) -> TokenDelta:
        if self.request.id not in self.engine.streams and self.queue.empty():
            raise StopAsyncIteration
        return await self.queue.get()

    async def aclose(self) -> None:
        self.engine.abort(self.request.id)


class TickingEngine:
    """One step every `seconds`; every request gets one token of it."""

    alive = True
    quiet_seconds = 0.0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.streams: dict[str, TickingStream] = {}
        self.tokens = ids_of(WORDS)
        self.info = msgspec.structs.replace(INFO, max_model_len=100_000)
        self.ticker: asyncio.Task[None] | None = None

    async def submit(self, request: Request) -> TickingStream:
        self.ticker = self.ticker or asyncio.create_task(self.tick())
        stream = self.streams[request.id] = TickingStream(self, request)
        return stream

    async def tick(self) -> None:
        due = time.monotonic()
        while True:
            due += self.seconds
            await asyncio.sleep(due - time.monotonic())
            for stream in list(self.streams.values()):
                token = self.tokens[stream.made % len(self.tokens)]
                stream.made += 1
                last = stream.made == stream.request.sampling.max_tokens
                reason: FinishReason | None = "length" if last else None
                stream.queue.put_nowait(TokenDelta(stream.request.id, 0, [token], reason))
                if last:
                    del self.streams[stream.request.id]

    def listen(self, listener: object) -> None:
        pass

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.streams.pop(request_id, None)

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None:
        pass


def run_clients(port: int, streams: int, tokens: int, stops: bool, results: Queue[int]) -> None:
    """Reads all streams to their ends and puts the number of their chunks."""

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({"stop": ["\n\n", "User:", "###"]} if stops else {}),
            }
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        chunks = 0
        while data := await reader.read(1 << 16):
            chunks += data.count(b"data: {")
            if b"data: [DONE]" in data:
                break
        writer.close()
        return chunks

    async def every() -> int:
        return sum(await asyncio.gather(*(one() for _ in range(streams))))

    results.put(asyncio.run(every()))


async def measure(args: argparse.Namespace) -> None:
    engine = TickingEngine(args.streams / args.rate)
    app = create_app(engine, chat_model(), served_model_names=("measured",))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    bound = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started:
        await asyncio.sleep(0.01)
    tokens = int(args.rate * args.seconds / args.streams)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = bound.getsockname()[1]
    clients = context.Process(
        target=run_clients, args=(port, args.streams, tokens, args.stops, results)
    )
    clients.start()
    while len(engine.streams) < args.streams:
        await asyncio.sleep(0.01)
    profile = cProfile.Profile()
    if args.profile:
        profile.enable()
    before, started = cpu_seconds(), time.monotonic()
    chunks = await asyncio.to_thread(results.get)
    used, wall = cpu_seconds() - before, time.monotonic() - started
    if args.profile:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)
    print(
        f"{args.streams} streams, {chunks / wall:.0f} chunks/s: "
        f"{100 * used / wall:.1f} % of a core, {1e6 * used / chunks:.0f} us per chunk"
    )
    clients.join()
    server.should_exit = True
    await serving


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2000, help="chunks per second")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--stops", action="store_true", help="with three stop strings")
    parser.add_argument("--profile", action="store_true")
    asyncio.run(measure(parser.parse_args()))
