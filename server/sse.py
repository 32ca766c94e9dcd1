"""Server-sent events of the two streaming endpoints, made of prepared bytes.

Only the varying part of a chunk is encoded; id, created, model and fingerprint are the same in all
chunks of a response and are encoded once. The contract's fields stand in this order:

    data: {"id":..,"object":..,"created":..,"model":..,"system_fingerprint":..,
           "choices":[{"index":..,"delta"|"text":..,"logprobs":null,"finish_reason":..}],"usage":..}
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import told_in_stream
from server.generate import Generation, Piece, Usage
from server.logprobs import Detail, Wording
from server.queue_positions import QueuePositions
from server.receipt import RequestReceipt
from server.tools import CallDelta

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"
QUEUED = b": queued position=%d\n\n"
MEDIA_TYPE = "text/event-stream; charset=utf-8"

_json = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all chunks of a response share."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, kind: str) -> dict[str, object]:
        """In the order of the wire; `kind` is the value of `object`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


@dataclass(frozen=True, slots=True)
class UsageOptions:
    """`stream_options`: usage at the end, and in every chunk."""

    at_end: bool = False
    in_every_chunk: bool = False


class Chunks(Protocol):
    """How one endpoint words its chunks."""

    def opening(self, index: int, usage: bytes) -> bytes:
        """The first chunk of an answer, if there is one."""

    def piece(self, piece: Piece, usage: bytes) -> bytes:
        """The chunk, or the two, of one piece."""

    def usage(self, usage: Usage, receipt: RequestReceipt) -> bytes:
        """The chunk without choices."""


class _Frame:
    """The bytes before and between what varies."""

    def __init__(self, envelope: Envelope, kind: str) -> None:
        self._head = b"data: " + _json(envelope.fields(kind))[:-1] + b',"choices":['
        self._starts: dict[int, bytes] = {}

    def choice(self, index: int, varying: bytes, usage: bytes) -> bytes:
        start = self._starts.get(index)
        if start is None:
            start = self._starts[index] = b'%b{"index":%d,' % (self._head, index)
        return b"%b%b}]%b}\n\n" % (start, varying, usage)

    def usage(self, usage: Usage, receipt: RequestReceipt) -> bytes:
        values = (self._head, _json(usage.fields()), _json(receipt.fields()))
        return b'%b],"usage":%b,"quire":%b}\n\n' % values


_NO_DETAIL = b'"logprobs":null'


def _ending(piece: Piece, detail: bytes = _NO_DETAIL) -> bytes:
    ending = detail + b',"finish_reason":' + _json(piece.finish_reason)
    if piece.finish_reason is not None:
        ending += b',"stop_reason":' + _json(piece.stop_reason)
    return ending


def _call(delta: CallDelta) -> dict[str, Any]:
    function = {"arguments": delta.arguments}
    if delta.name is None:
        return {"index": delta.place, "function": function}
    named = {"name": delta.name, **function}
    return {"index": delta.place, "id": delta.id, "type": "function", "function": named}


class ChatChunks:
    """role chunk, content chunks, a chunk with an empty delta and the finish reason.

    Args:
        echo: text that every answer repeats first.
        prompt_token_ids: told with the role, if asked for.
    """

    def __init__(
        self,
        envelope: Envelope,
        wording: Wording,
        echo: str = "",
        prompt_token_ids: Sequence[int] | None = None,
    ) -> None:
        self._frame = _Frame(envelope, "chat.completion.chunk")
        self._wording, self._echo = wording, echo
        self._role_detail = Detail(prompt_token_ids=prompt_token_ids)
        self.usage = self._frame.usage

    def opening(self, index: int, usage: bytes) -> bytes:
        delta = b'"delta":{"role":"assistant","content":""},%b,"finish_reason":null'
        role = self._frame.choice(index, delta % self._told(self._role_detail), usage)
        return role + self.piece(Piece(index, self._echo), usage)

    def piece(self, piece: Piece, usage: bytes) -> bytes:
        chunks = b""
        detail = piece.detail
        if piece.reasoning:
            thought = {"reasoning": piece.reasoning, "reasoning_content": piece.reasoning}
            chunks = self._delta(piece.index, thought, usage)
        if piece.text or (detail is not None and not detail.empty):
            delta = b'"delta":{"content":%b},%b,"finish_reason":null'
            told = _NO_DETAIL if detail is None else self._told(detail)
            chunks += self._frame.choice(piece.index, delta % (_json(piece.text), told), usage)
        for call in piece.calls:
            chunks += self._delta(piece.index, {"tool_calls": [_call(call)]}, usage)
        if piece.finish_reason is not None:
            chunks += self._frame.choice(piece.index, b'"delta":{},' + _ending(piece), usage)
        return chunks

    def _delta(self, index: int, delta: dict[str, Any], usage: bytes) -> bytes:
        told = b'"delta":%b,%b,"finish_reason":null' % (_json(delta), _NO_DETAIL)
        return self._frame.choice(index, told, usage)

    def _told(self, detail: Detail) -> bytes:
        return _json(self._wording.chat(detail))[1:-1]


class CompletionChunks:
    """Text chunks; the last of an answer has the finish reason.

    `echo`: gives what an answer begins with, text "" without echo.
    """

    def __init__(self, envelope: Envelope, wording: Wording, echo: Callable[[int], Piece]) -> None:
        self._frame = _Frame(envelope, "text_completion")
        self._wording, self._echo = wording, echo
        self._starts: dict[int, int] = {}  # index -> length of its echo
        self.usage = self._frame.usage

    def opening(self, index: int, usage: bytes) -> bytes:
        piece = self._echo(index)
        chunk = self.piece(piece, usage) if piece.text or piece.detail else b""
        self._starts[index] = len(piece.text)
        return chunk

    def piece(self, piece: Piece, usage: bytes) -> bytes:
        if piece.detail is None:
            ending = _ending(piece)
        else:
            detail = piece.detail.moved(self._starts.get(piece.index, 0))
            ending = _ending(piece, _json(self._wording.completion(detail))[1:-1])
        return self._frame.choice(piece.index, b'"text":%b,%b' % (_json(piece.text), ending), usage)


async def events(
    generation: Generation, chunks: Chunks, options: UsageOptions, positions: QueuePositions
) -> AsyncGenerator[bytes, None]:
    """The whole stream, one item per write.

    An error before the first item is raised, to become a real status; a later one is sent.
    """
    started = False
    unopened = set(range(generation.count))
    usage = b',"usage":null' if options.at_end else b""
    try:
        async with generation, aclosing(generation.batches()) as batches:
            async for pieces in batches:
                if options.in_every_chunk:
                    usage = b',"usage":' + _json(generation.usage.fields())
                write = [] if pieces else [await comment(generation, positions)]
                if unopened:
                    new = unopened.intersection(piece.index for piece in pieces)
                    unopened -= new
                    write += [chunks.opening(index, usage) for index in sorted(new)]
                for piece in pieces:
                    write.append(chunks.piece(piece, usage))
                started = True
                yield b"".join(write)
    except Exception as error:
        if not started:
            raise
        told = told_in_stream(error)
        yield b"data: " + told.body() + b"\n\n" + DONE
        return
    end = chunks.usage(generation.usage, generation.receipt) if options.at_end else b""
    yield end + DONE


async def comment(generation: Generation, positions: QueuePositions) -> bytes:
    """What keeps a silent stream alive; in the queue it says how far."""
    place = None
    if not generation.usage.completion_tokens:
        place = await positions.first(generation.request_ids)
    return KEEP_ALIVE if place is None else QUEUED % place


class EventStream(Response):
    """Sends the events of one answer; the status is only sent with the first of them. The layers of
    the application see the beginning and the end: what lies between is sent past them.

    A client that goes away is noticed by `edge.HangUp`, which cancels the task that runs this.
    """

    def __init__(self, items: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        self._items = items
        self.status_code, self.background = 200, None
        self.init_headers(  # no `body`: its length is not known
            {
                "content-type": MEDIA_TYPE,
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                **headers,
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # In a task of its own: waking one passes through all that it awaits, and a request's task
        # awaits the whole application.
        await asyncio.create_task(self._send(send, scope["state"]["send"]))

    async def _send(self, send: Send, straight: Send) -> None:
        """`send` passes the layers of the application, `straight` does not."""
        async with aclosing(self._items) as items:
            first = await anext(items)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for item in items:
                await straight({"type": "http.response.body", "body": item, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
