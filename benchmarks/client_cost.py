"""What the benchmark's own client costs: `python -m benchmarks.client_cost`.

A process that replays a recorded stream writes one event to every connection, every few
milliseconds; the client's CPU time (of its one thread, so that a busy machine does not matter much)
is divided by the events that came.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection as Pipe
from typing import Final

from benchmarks import answers
from benchmarks.dialect import Dialect
from benchmarks.sse import Client, Reply

HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT: Final = (
    b'data: {"id":"cmpl-1f0c2a9e5b7d4e30a6c1f2b3d4e5f607","object":"text_completion",'
    b'"created":1790000000,"model":"llama-56m","system_fingerprint":"fp_0123456789",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}],'
    b'"usage":null}\n\n'
)
ENDING: Final = (
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\ndata: [DONE]\n\n'
)
STEP_SECONDS: Final = 0.005


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def replay(events: int, pipe: Pipe) -> None:
    """Answers any request with so many events; tells its port, and serves until it is killed."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := (await reader.readuntil(b"\r\n\r\n")).lower():
                await reader.readexactly(int(head.rpartition(b"content-length:")[2]))
                writer.write(HEAD)
                for _ in range(events):
                    writer.write(chunk(EVENT))
                    now = time.monotonic()
                    await asyncio.sleep(STEP_SECONDS - now % STEP_SECONDS)  # all in one step
                writer.write(chunk(ENDING) + b"0\r\n\r\n")
        writer.close()

    made = await asyncio.start_server(talk, "127.0.0.1", 0)
    pipe.send(made.sockets[0].getsockname()[1])
    await made.serve_forever()


def serve(events: int, pipe: Pipe) -> None:
    asyncio.run(replay(events, pipe))


async def receive(client: Client, streams: int) -> tuple[list[Reply], float]:
    """Replies of so many requests at once, and the CPU seconds that they took."""
    request = Dialect("m").request({"prompt": [1]}, 1)
    await client.open(streams)
    began = time.thread_time()
    replies = await asyncio.gather(
        *(client.post("/v1/completions", request.body) for _ in range(streams))
    )
    seconds = time.thread_time() - began
    client.close()
    return replies, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=32, help="at once (default 32)")
    parser.add_argument("--events", type=int, default=200, help="per stream (default 200)")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(options.events, there), daemon=True
    )
    server.start()
    client = Client(f"http://127.0.0.1:{here.recv()}")
    received, read = [], []
    for _ in range(options.rounds):
        replies, seconds = asyncio.run(receive(client, options.streams))
        began = time.thread_time()
        events = sum(len(answers.read(reply).times) for reply in replies)
        read.append(1e6 * (time.thread_time() - began) / events)
        received.append(1e6 * seconds / events)
    server.terminate()
    for name, found in (("while it comes", received), ("afterwards", read)):
        middle = statistics.median(found)
        print(f"{name}: {middle:.1f} us of CPU per event ({min(found):.1f} to {max(found):.1f})")


if __name__ == "__main__":
    main()
