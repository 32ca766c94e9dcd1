"""A server that says exactly what a test tells it to, in the framing that the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from benchmarks.sse import Client

KEPT = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
OLD = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"  # ends with the connection
Answering = Callable[[str, bytes], bytes]  # path and body of a request -> bytes of an answer


def chunked(events: list[str]) -> bytes:
    """One chunk per event."""
    chunks = [f"{len(data):x}\r\n".encode() + data + b"\r\n" for data in map(str.encode, events)]
    return KEPT + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks) + b"0\r\n\r\n"


def measured(events: list[str]) -> bytes:
    """With a content-length."""
    body = "".join(events).encode()
    return KEPT + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def plain(status: int, body: object) -> bytes:
    data = json.dumps(body).encode()
    return f"HTTP/1.1 {status} So\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def usage(completion: int, prompt: int = 3) -> str:
    told = {"prompt_tokens": prompt, "completion_tokens": completion}
    return f'data: {{"choices":[],"usage":{json.dumps(told)}}}\n\n'


def completion(tokens: int, counted: int | None = None) -> list[str]:
    """Events of a text completion: a comment, one event per token, usage, [DONE]."""
    events = [": queued position=1\n\n"]
    events += ['data: {"choices":[{"text":"é\\n"}],"usage":null}\n\n'] * tokens
    return [*events, usage(tokens if counted is None else counted), "data: [DONE]\n\n"]


@asynccontextmanager
async def serving(
    answer: Answering, piece: int = 4096, *, hangs_up: bool = False
) -> AsyncIterator[Client]:
    """Sends `answer(path, body)` in pieces of that many bytes.

    A server that hangs up does so after every answer, without telling.
    """

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                lengths = [line for line in head.split("\r\n") if line.startswith("Content-Length")]
                body = await reader.readexactly(int(lengths[0].split()[1]) if lengths else 0)
                data = answer(head.split()[1], body)
                for start in range(0, len(data), piece):
                    writer.write(data[start : start + piece])
                    await writer.drain()
                    if piece < 100:
                        await asyncio.sleep(0)
                if hangs_up or data.startswith(b"HTTP/1.0"):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    made = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with made:
        yield Client(f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}")
