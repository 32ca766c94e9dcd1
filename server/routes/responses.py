"""POST /v1/responses: a chat in the form of the Responses API. Nothing is stored."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from scheduler.request import SamplingParams
from server.errors import ApiError
from server.response_events import ResponseWriter, response_events
from server.response_schemas import ResponsesBody
from server.routes.chat import check, prompt_of
from server.schemas import ChatBody
from server.service import Prompt, Service
from server.sse import EventStream


def router(service: Service) -> APIRouter:
    """The routes over `service`."""
    routes = APIRouter()

    @routes.post("/v1/responses")
    async def responses(http: HttpRequest) -> Response:
        body = await service.read_any(http, ResponsesBody)
        if body.model is not None:
            service.check_model(body.model)
        ignored, chat = body.ignored(), body.chat()
        headers = service.response_headers(http, chat, ignored + check(service, chat))
        sampling = _sampling(service, chat)
        prompt, ids = await asyncio.to_thread(_prompt_of, service, chat)
        response_id = f"resp_{uuid.uuid4().hex}"
        request = service.request(http, response_id, Prompt(ids), sampling, chat, "input")
        reader = service.parsers.readers(chat, prompt)
        generation = service.generation(http, chat, [request], continues=False, reader=reader)
        writer = ResponseWriter(frame(body, response_id, body.model or service.names[0]))
        if body.stream:
            items = response_events(generation, writer, service.positions)
            return EventStream(items, headers)
        async with generation, aclosing(generation.batches()) as batches:
            async for pieces in batches:
                for piece in pieces:
                    writer.push(piece)
        whole = writer.whole(generation.usage, generation.receipt.fields())
        headers["server-timing"] = generation.receipt.server_timing()
        return Response(msgspec.json.encode(whole), headers=headers, media_type="application/json")

    @routes.get("/v1/responses/{id}")
    @routes.delete("/v1/responses/{id}")
    @routes.get("/v1/responses/{id}/input_items")
    @routes.post("/v1/responses/{id}/cancel")
    async def stored(id: str) -> Response:
        raise ApiError(
            404,
            f"there is no response {id!r}: this server stores none; "
            "keep the answer of POST /v1/responses",
            param="id",
            code="not_found",
        )

    return routes


def frame(body: ResponsesBody, response_id: str, model: str) -> dict[str, Any]:
    """The fields of a response that the request decides."""
    format = body.text.format if body.text else None
    told_format = format.model_dump(by_alias=True, exclude_unset=True) if format else None
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "background": False,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "text": {"format": told_format or {"type": "text"}},
        "tool_choice": _told_choice(body),
        "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _told_choice(body: ResponsesBody) -> str | dict[str, Any]:
    choice = body.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _sampling(service: Service, chat: ChatBody) -> SamplingParams:
    """As of the chat; a grammar goes by the name that it has in the client's body."""
    sampling = service.sampling(chat)
    grammar = sampling.grammar
    if grammar is None:
        return sampling
    param = grammar.param.replace("response_format.json_schema", "text.format")
    param = param.replace("response_format", "text.format").replace(".function.", ".")
    named = msgspec.structs.replace(grammar, param=param)
    return msgspec.structs.replace(sampling, grammar=named)


def _prompt_of(service: Service, chat: ChatBody) -> tuple[str, tuple[int, ...]]:
    """See `prompt_of`; what the template refuses is the input."""
    try:
        return prompt_of(service, chat)
    except ApiError as error:
        error.param = "input"
        raise
