"""POST /tokenize and /detokenize: the text side of the model alone."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from server.errors import invalid
from server.fields import check_extra
from server.routes import chat
from server.schemas import Body, ChatBody, DetokenizeBody, TokenizeBody, parse
from server.service import Service


def router(service: Service) -> APIRouter:
    """The routes over `service`."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(http: HttpRequest) -> Response:
        """Of a text as completions read it, or of messages as chat does."""
        given = parse(Body, await http.body(), service.limits).model_extra or {}
        if "messages" in given and "prompt" in given:
            raise invalid("prompt", "prompt and messages cannot both be sent")
        if "messages" in given:
            chat_body = await service.read(http, ChatBody)
            chat.check(service, chat_body)
            ids = list(await asyncio.to_thread(chat.prompt_ids, service, chat_body))
        else:
            body = parse(TokenizeBody, await http.body(), service.limits)
            _check(service, body.model, body)
            special = body.add_special_tokens is not False
            encode = service.text.encode
            [ids] = await asyncio.to_thread(encode, [body.prompt], add_special_tokens=special)
        longest = service.engine.info.max_model_len
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": longest})

    @routes.post("/detokenize")
    async def detokenize(http: HttpRequest) -> Response:
        """The text of tokens, special ones included."""
        body = parse(DetokenizeBody, await http.body(), service.limits)
        _check(service, body.model, body)
        top = service.engine.info.vocab_size - 1
        for place, token in enumerate(body.tokens):
            if not 0 <= token <= top:
                param = f"tokens.{place}"
                raise invalid(param, f"{param} must be between 0 and {top}, got {token}")
        text = await asyncio.to_thread(service.text.decode, body.tokens, skip_special=False)
        return JSONResponse({"prompt": text})

    return routes


def _check(service: Service, model: str | None, body: Body) -> None:
    if model is not None:
        service.check_model(model)
    check_extra(body.model_extra)
