"""A transport that holds every answer against the openai SDK's own types, in strict mode.

The SDK itself builds its objects without validating them; here a missing or mistyped field of any
response or stream chunk that passes fails the test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

WHOLE: dict[str, TypeAdapter[Any]] = {
    "/v1/chat/completions": TypeAdapter(ChatCompletion),
    "/v1/completions": TypeAdapter(Completion),
    "/v1/responses": TypeAdapter(Response),
}
CHUNK: dict[str, TypeAdapter[Any]] = {
    "/v1/chat/completions": TypeAdapter(ChatCompletionChunk),
    "/v1/completions": TypeAdapter(Completion),
    "/v1/responses": TypeAdapter(ResponseStreamEvent),
}
MODEL: TypeAdapter[Any] = TypeAdapter(Model)
ERROR_FIELDS = {"message", "type", "param", "code"}


def check(path: str, status: int, content_type: str, body: bytes) -> None:
    """Raises AssertionError or pydantic's ValidationError for an answer that is not OpenAI's."""
    if status >= 400:
        assert set(json.loads(body)["error"]) == ERROR_FIELDS, body
    elif content_type.startswith("text/event-stream"):
        for event in body.split(b"\n\n")[:-1]:  # what follows the last one was cut off
            _check_event(path, event)
    elif path in WHOLE:
        WHOLE[path].validate_json(body, strict=True)
    elif path == "/v1/models":
        for model in json.loads(body)["data"]:
            MODEL.validate_python(model, strict=True)
    elif path.startswith("/v1/models/"):
        MODEL.validate_json(body, strict=True)


def _check_event(path: str, event: bytes) -> None:
    for line in event.split(b"\n"):
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        data = line.removeprefix(b"data: ")
        if "error" in (fields := json.loads(data)) and len(fields) == 1:
            assert set(fields["error"]) == ERROR_FIELDS, data
        else:
            CHUNK[path].validate_json(data, strict=True)


class _Tee(httpx.SyncByteStream):
    """Passes a body through and checks it once it is closed."""

    def __init__(self, request: httpx.Request, response: httpx.Response) -> None:
        self._request, self._response = request, response
        self._body = b""

    def __iter__(self) -> Iterator[bytes]:
        assert isinstance(self._response.stream, httpx.SyncByteStream)
        for part in self._response.stream:
            self._body += part
            yield part
        kind = self._response.headers.get("content-type", "")
        check(self._request.url.path, self._response.status_code, kind, self._body)

    def close(self) -> None:
        self._response.close()


class StrictTransport(httpx.HTTPTransport):
    """An ordinary transport with the check at the end of every body."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_Tee(request, response),
            extensions=response.extensions,
        )


def strict_client(url: str, key: str = "none") -> openai.OpenAI:
    """The SDK over that transport; `url` is the server's, without /v1."""
    return openai.OpenAI(
        base_url=f"{url}/v1",
        api_key=key,
        max_retries=0,
        http_client=httpx.Client(transport=StrictTransport(), timeout=120),
    )
