"""A streaming HTTP client that costs almost nothing.

The client of a benchmark runs on the cores that the server needs, so what it spends is taken from
what it measures. While a server is measured, this client does no more than note when bytes came:
`benchmarks.answers` reads the events out of them when the round is over. `python -m
benchmarks.client_cost` prints what an event costs.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


class BenchError(RuntimeError):
    """A server that cannot be measured: unreachable, refusing, or answering too little."""


class Refused(BenchError):
    """A server that has no room at the moment: status 429 or 503."""


class Hangup(BenchError):
    """A connection that ended before any of the answer."""


@dataclass(frozen=True)
class Reply:
    """What came back, byte for byte. Times are seconds on `time.perf_counter`.

    Attributes:
        sent: when the request was written.
        pieces: of the body, without the framing of chunks; one for each read that brought any.
        times: of these reads.
    """

    sent: float
    status: int
    pieces: list[bytes]
    times: list[float]

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection with one request on it at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self.reusable = True
        self._clear()

    def _clear(self) -> None:
        self._bytes = b""  # not yet understood
        self._status = 0  # 0 until the head is read
        self._chunked = False
        self._left: int | None = None  # of the body; None: it ends when the connection does
        # Many short pieces, because a body that grows is moved again and again, and on fresh pages
        # of memory that costs more than all the rest.
        self._pieces: list[bytes] = []
        self._times: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._done is None or self._done.done():
            return
        if exc is None and self._status and not self._chunked and self._left is None:
            self._done.set_result(None)
        else:
            kind = BenchError if self._status else Hangup
            self._done.set_exception(kind(f"the server closed the connection ({exc})"))

    async def request(self, head: str, body: bytes = b"") -> Reply:
        """Sends one request and waits for the end of its answer."""
        assert self._transport is not None
        self._clear()
        self._done = asyncio.get_running_loop().create_future()
        sent = time.perf_counter()
        self._transport.write(head.encode() + b"\r\n\r\n" + body)
        await self._done
        return Reply(sent, self._status, self._pieces, self._times)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._status:
            data = self._read_head(self._bytes + data)
            if not self._status:
                return
        piece, ended = self._read_chunks(data) if self._chunked else self._read_plain(data)
        if piece:
            self._pieces.append(piece)
            self._times.append(now)
        if ended and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _read_head(self, data: bytes) -> bytes:
        """What follows the head, once it is there as a whole."""
        head, blank, rest = data.partition(b"\r\n\r\n")
        if not blank:
            self._bytes = data
            return b""
        lines = head.lower().split(b"\r\n")
        version, status = lines[0].split()[:2]
        fields = dict(line.split(b":", 1) for line in lines[1:])
        headers = {name: value.strip() for name, value in fields.items()}
        self._bytes = b""
        self._status = int(status)
        self._chunked = headers.get(b"transfer-encoding") == b"chunked"
        if b"content-length" in headers:
            self._left = int(headers[b"content-length"])
        kept = headers.get(b"connection", b"close" if version == b"http/1.0" else b"keep-alive")
        self.reusable = kept == b"keep-alive" and (self._chunked or self._left is not None)
        return rest

    def _read_plain(self, data: bytes) -> tuple[bytes, bool]:
        if self._left is not None:
            self._left -= len(data)
        return data, self._left == 0

    def _read_chunks(self, data: bytes) -> tuple[bytes, bool]:
        """What whole chunks hold, and whether the last one is among them."""
        buffer, start, found = self._bytes + data, 0, b""
        while (end := buffer.find(b"\r\n", start)) >= 0:
            size = int(buffer[start:end].partition(b";")[0], 16)
            if len(buffer) < end + size + 4:
                break
            if not size:
                return found, True
            found += buffer[end + 2 : end + 2 + size]
            start = end + size + 4
        self._bytes = buffer[start:]
        return found, False


class Client:
    """Requests to one server, over connections that are kept where the server keeps them.

    Args:
        url: `http://host:port`, with a path where the API lies below one; `/v1` may end it.
        api_key: sent as a bearer token.

    Raises:
        ValueError: the URL is not like that.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"must be like http://127.0.0.1:8000, got {url}")
        self._tls = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}"
        if api_key:
            self._headers += f"\r\nAuthorization: Bearer {api_key}"
        self._idle: list[Connection] = []

    async def open(self, count: int) -> None:
        """Connects ahead of time, so that no answer is measured with it."""
        self._idle += [await self._connect() for _ in range(count)]

    def close(self) -> None:
        """Closes what is idle; a client may be used again in another event loop then."""
        while self._idle:
            self._idle.pop().close()

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a plain answer, over a connection of its own."""
        connection = await self._connect()
        try:
            reply = await connection.request(
                f"GET {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
            )
        finally:
            connection.close()
        return reply.status, reply.body

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        """One request, over a connection that is idle or else a new one.

        Raises:
            Refused: status 429 or 503.
            BenchError: another status than 200, or a connection that ended too early.
        """
        data = json.dumps(body, separators=(",", ":")).encode()
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\n{self._headers}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}"
        )
        kept = self._take()
        connection = kept or await self._connect()
        try:
            reply = await connection.request(head, data)
        except Hangup:
            if kept:  # it was being closed already: nothing was answered
                return await self.post(path, body)
            raise
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        if reply.status != 200:
            kind = Refused if reply.status in (429, 503) else BenchError
            raise kind(f"status {reply.status}: {reply.body.decode(errors='replace')[:300]}")
        return reply

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:  # else the server closes it, or has done so
                return connection
        return None

    async def _connect(self) -> Connection:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, self._host, self._port, ssl=self._tls or None
            )
        except OSError as error:
            raise BenchError(f"no server at {self._host}:{self._port}: {error}") from None
        return connection
