"""The answer of the Responses API while it is written: pieces in, output items and events out.

    response.created, response.in_progress
    response.output_item.added               once per item: reasoning, message, function_call
      response.content_part.added            not for calls
        response.output_text.delta ...       or reasoning_text, function_call_arguments
        response.output_text.done
      response.content_part.done
    response.output_item.done
    response.completed                       or incomplete; error, then response.failed

An answer that is not streamed is what the same events leave in `output`.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final, Literal

import msgspec

from server.errors import ApiError, told_in_stream
from server.generate import Generation, Piece, Usage
from server.queue_positions import QueuePositions
from server.sse import comment
from server.tools import CallDelta

Event = dict[str, Any]
Kind = Literal["message", "reasoning", "function_call"]

_PREFIX: Final[Mapping[Kind, str]] = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PART: Final[Mapping[Kind, str]] = {"message": "output_text", "reasoning": "reasoning_text"}


class OutputItem:
    """One item of the output while it is written."""

    def __init__(self, kind: Kind, place: int, call: CallDelta | None = None) -> None:
        self._kind, self._place, self._text = kind, place, ""
        self._fields: dict[str, Any] = {
            "id": f"{_PREFIX[kind]}_{uuid.uuid4().hex}",
            "type": kind,
            "status": "in_progress",
        }
        if call is not None:
            self._fields |= {"call_id": call.id, "name": call.name}
        elif kind == "message":
            self._fields["role"] = "assistant"
        else:
            self._fields["summary"] = []
        self._stream = f"response.{_PART.get(kind, 'function_call_arguments')}"

    def is_a(self, kind: Kind) -> bool:
        return self._kind == kind

    def opening(self) -> list[Event]:
        """It begins, without any text."""
        empty: dict[str, Any] = (
            {"arguments": ""} if self._kind == "function_call" else {"content": []}
        )
        added = {"output_index": self._place, "item": self._fields | empty}
        return [{"type": "response.output_item.added", **added}, *self._part("added")]

    def push(self, text: str) -> list[Event]:
        """It goes on."""
        self._text += text
        delta = {"type": f"{self._stream}.delta", **self._whereabouts(), "delta": text}
        return [delta | self._logprobs()]

    def close(self, status: str) -> list[Event]:
        """It is complete, or as complete as it gets."""
        self._fields["status"] = status
        name = "arguments" if self._kind == "function_call" else "text"
        done = {"type": f"{self._stream}.done", **self._whereabouts(), name: self._text}
        if self._kind == "function_call":
            done["name"] = self._fields["name"]
        item = {"output_index": self._place, "item": self.fields()}
        return [
            done | self._logprobs(),
            *self._part("done"),
            {"type": "response.output_item.done", **item},
        ]

    def fields(self) -> dict[str, Any]:
        """As the wire has it."""
        if self._kind == "function_call":
            return self._fields | {"arguments": self._text}
        return self._fields | {"content": [self._content()]}

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"type": _PART[self._kind], "text": self._text}
        if self._kind == "message":
            content |= {"annotations": [], "logprobs": []}
        return content

    def _part(self, what: str) -> list[Event]:
        if self._kind == "function_call":
            return []
        place = self._whereabouts()
        return [{"type": f"response.content_part.{what}", **place, "part": self._content()}]

    def _whereabouts(self) -> dict[str, Any]:
        place = {"item_id": self._fields["id"], "output_index": self._place}
        return place if self._kind == "function_call" else place | {"content_index": 0}

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._kind == "message" else {}


class ResponseWriter:
    """One response.

    Args:
        frame: the fields of the response that do not depend on its answer.
    """

    def __init__(self, frame: Mapping[str, Any]) -> None:
        self._frame = frame
        self._items: list[OutputItem] = []
        self._reason: str | None = None

    def opening(self) -> list[Event]:
        """Before the first piece."""
        response = self._response("in_progress")
        return [
            {"type": "response.created", "response": response},
            {"type": "response.in_progress", "response": response},
        ]

    def push(self, piece: Piece) -> list[Event]:
        """Takes more of the answer in."""
        events: list[Event] = []
        if piece.reasoning:
            events += self._more("reasoning", piece.reasoning)
        if piece.text:
            events += self._more("message", piece.text)
        for call in piece.calls:
            if call.name is not None:
                events += self._open("function_call", call)
            if call.arguments:
                events += self._items[-1].push(call.arguments)
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason
            if not self._items:
                events += self._open("message")
            events += self._items[-1].close(self._status)
        return events

    def whole(self, usage: Usage, receipt: Mapping[str, Any]) -> dict[str, Any]:
        """The complete response; `receipt` stands in it as `quire`."""
        told = self._response(self._status) | {"usage": _usage(usage), "quire": receipt}
        if self._status == "incomplete":
            told["incomplete_details"] = {"reason": "max_output_tokens"}
        return told

    def ending(self, usage: Usage, receipt: Mapping[str, Any]) -> list[Event]:
        """After the last piece."""
        whole = self.whole(usage, receipt)
        return [{"type": f"response.{self._status}", "response": whole}]

    def failure(self, error: ApiError) -> list[Event]:
        """In place of what would have come."""
        if self._items and self._reason is None:
            self._items[-1].close("incomplete")
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error.message}
        told = {"code": error.code, "message": error.message, "param": error.param}
        return [{"type": "error", **told}, {"type": "response.failed", "response": response}]

    @property
    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    def _more(self, kind: Kind, text: str) -> list[Event]:
        events = []
        if not self._items or not self._items[-1].is_a(kind):
            events = self._open(kind)
        return events + self._items[-1].push(text)

    def _open(self, kind: Kind, call: CallDelta | None = None) -> list[Event]:
        events = self._items[-1].close("completed") if self._items else []
        self._items.append(OutputItem(kind, len(self._items), call))
        return events + self._items[-1].opening()

    def _response(self, status: str) -> dict[str, Any]:
        output = [item.fields() for item in self._items]
        return {**self._frame, "status": status, "output": output}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class EventEncoder:
    """Numbers events and encodes them."""

    def __init__(self) -> None:
        self._count = 0

    def encode(self, events: list[Event]) -> bytes:
        """The bytes of `events`, the next of the stream."""
        told = b""
        for event in events:
            data = msgspec.json.encode(event | {"sequence_number": self._count})
            told += b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)
            self._count += 1
        return told


async def response_events(
    generation: Generation, writer: ResponseWriter, positions: QueuePositions
) -> AsyncGenerator[bytes, None]:
    """The whole stream, one item per write.

    An error before the first item is raised, to become a real status; a later one is sent.
    """
    encoder = EventEncoder()
    started = opened = False
    try:
        async with generation, aclosing(generation.batches()) as batches:
            async for pieces in batches:
                started = True
                if not pieces:
                    yield await comment(generation, positions)
                    continue
                events = [] if opened else writer.opening()
                opened = True
                for piece in pieces:
                    events += writer.push(piece)
                yield encoder.encode(events)
    except Exception as error:
        if not started:
            raise
        told = told_in_stream(error)
        opening = [] if opened else writer.opening()
        yield encoder.encode(opening + writer.failure(told))
        return
    yield encoder.encode(writer.ending(generation.usage, generation.receipt.fields()))
