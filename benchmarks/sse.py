"""A streaming HTTP client that costs almost nothing.

The client of a benchmark runs on the cores that the server needs, so what it spends is taken from
what it measures. httpx and a JSON parse cost 0.19 ms of CPU per streamed event, which at 64 clients
is 12 ms of every step; this client, which looks for line ends in raw bytes and parses one event per
answer, costs 0.02 ms (both at 32 answers at once).
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any


class BenchError(RuntimeError):
    """A server that cannot be measured: unreachable, refusing, or answering too little."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer. Times are seconds on `time.perf_counter`."""

    sent: float
    first: float  # the first event that carries a choice
    last: float  # the last one that does
    prompt_tokens: int
    completion_tokens: int

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.last - self.first) / max(1, self.completion_tokens - 1)


class Connection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection with one request on it at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._clear()

    def _clear(self) -> None:
        self._bytes = bytearray()  # not yet understood
        self._status = 0  # 0 until the head is read
        self._chunked = False
        self._length = 0
        self._body = bytearray()  # of an event that is not complete, or of a plain answer
        self._stream = False
        self.first = self.last = 0.0
        self.usage: dict[str, Any] | None = None
        self.failure: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(BenchError(f"the server closed the connection ({exc})"))

    async def request(self, head: str, body: bytes = b"") -> tuple[int, bytes]:
        """Sends one request and waits for the end of its answer; the status and a plain body."""
        assert self._transport is not None
        self._clear()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(head.encode() + b"\r\n\r\n" + body)
        await self._done
        return self._status, bytes(self._body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        if not self._status and not self._read_head():
            return
        if not self._chunked:
            self._body += self._bytes
            self._bytes.clear()
            self._finish_if(len(self._body) >= self._length)
            return
        ended = self._read_chunks()
        if self._stream:
            self._read_events(time.perf_counter())
        self._finish_if(ended)

    def _read_head(self) -> bool:
        end = self._bytes.find(b"\r\n\r\n")
        if end < 0:
            return False
        lines = bytes(self._bytes[:end]).lower().split(b"\r\n")
        headers = dict(line.split(b":", 1) for line in lines[1:])
        self._status = int(lines[0].split()[1])
        self._chunked = headers.get(b"transfer-encoding", b"").strip() == b"chunked"
        self._length = int(headers.get(b"content-length", b"0"))
        self._stream = headers.get(b"content-type", b"").strip().startswith(b"text/event-stream")
        del self._bytes[: end + 4]
        return True

    def _read_chunks(self) -> bool:
        """Moves whole chunks to the body; whether the last one was seen."""
        buffer, start = self._bytes, 0
        while (end := buffer.find(b"\r\n", start)) >= 0:
            size = int(buffer[start:end], 16)
            if len(buffer) < end + size + 4:
                break
            self._body += buffer[end + 2 : end + 2 + size]
            start = end + size + 4
            if size == 0:
                return True
        del buffer[:start]
        return False

    def _read_events(self, now: float) -> None:
        *events, rest = self._body.split(b"\n\n")
        self._body = rest
        for event in events:
            if not event.startswith(b"data: {"):
                continue  # a comment, or [DONE]
            if event.startswith(b'data: {"error"'):
                self.failure = event.decode()
            elif b'"usage":{' in event or b'"usage": {' in event:
                self.usage = json.loads(event[6:])["usage"]
                if b'"choices":[]' not in event and b'"choices": []' not in event:
                    self.last = now
            else:
                self.first = self.first or now
                self.last = now

    def _finish_if(self, ended: bool) -> None:
        if ended and self._done is not None and not self._done.done():
            self._done.set_result(None)


class Client:
    """Requests to one server, each worker on a connection of its own."""

    def __init__(self, host: str, port: int, api_key: str | None = None) -> None:
        self._host, self._port = host, port
        self._headers = f"Host: {host}:{port}\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"

    async def connect(self) -> Connection:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, self._host, self._port
            )
        except OSError as error:
            raise BenchError(f"no server at {self._host}:{self._port}: {error}") from None
        return connection

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a plain answer."""
        connection = await self.connect()
        try:
            return await connection.request(f"GET {path} HTTP/1.1\r\n{self._headers.strip()}")
        finally:
            connection.close()

    async def complete(self, connection: Connection, body: dict[str, Any]) -> Answer:
        """One streamed completion.

        Raises:
            BenchError: a status other than 200, an error in the stream, or no usage at its end.
        """
        data = json.dumps(body, separators=(",", ":")).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}"
        )
        sent = time.perf_counter()
        status, text = await connection.request(head, data)
        if status != 200 or connection.failure:
            raise BenchError(f"status {status}: {connection.failure or text.decode()[:300]}")
        if connection.usage is None:
            raise BenchError("the stream ended without usage")
        return Answer(
            sent=sent,
            first=connection.first,
            last=connection.last,
            prompt_tokens=connection.usage["prompt_tokens"],
            completion_tokens=connection.usage["completion_tokens"],
        )
