"""POST /v1/explain: a dry run of a chat or a completion. Nothing is computed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from scheduler.request import InvalidRequest, Request, SamplingParams
from server.errors import ApiError, from_exception
from server.routes import chat, completions
from server.schemas import Body, ChatBody, CompletionBody, parse
from server.service import Prompt, Service

REQUEST_ID = "explain"


def router(service: Service) -> APIRouter:
    """The route over `service`."""
    routes = APIRouter()

    @routes.post("/v1/explain")
    async def explain(http: HttpRequest) -> Response:
        """Takes the body of a chat or a completion. What those would refuse for its fields is
        refused here; a prompt that can never be served is explained."""
        asked = await read(service, http)
        told = {
            "object": "explain",
            "ignored_params": service.ignored(http, asked.body, asked.ignored),
            "prompts": [await _explain(service, http, asked, prompt) for prompt in asked.prompts],
        }
        return Response(msgspec.json.encode(told), media_type="application/json")

    return routes


@dataclass(frozen=True)
class Asked:
    """A body of either kind, up to its engine requests.

    Attributes:
        ignored: paths of its fields that have no effect, as far as only its route knows them.
    """

    body: ChatBody | CompletionBody
    prompts: list[Prompt]
    sampling: SamplingParams
    ignored: list[str]

    def request(self, service: Service, http: HttpRequest, prompt: Prompt) -> Request:
        """What the generation endpoints would make of `prompt`.

        Raises:
            InvalidRequest: they would refuse it.
        """
        body = self.body
        if isinstance(body, ChatBody):
            return service.request(http, REQUEST_ID, prompt, self.sampling, body, "messages")
        [request] = completions.build_requests(
            service, http, REQUEST_ID, [prompt], self.sampling, body
        )
        return request


async def read(service: Service, http: HttpRequest) -> Asked:
    """The body of a chat, which has messages, or else of a completion.

    Raises:
        ApiError, InvalidRequest: a field is wrong.
    """
    fields = parse(Body, await http.body(), service.limits).model_extra or {}
    if "messages" not in fields:
        body = await service.read(http, CompletionBody)
        prompts = await asyncio.to_thread(completions.read_prompts, service, body)
        return Asked(body, prompts, service.sampling(body), [])
    chat_body = await service.read(http, ChatBody)
    ignored = chat.check(service, chat_body)
    ids = await asyncio.to_thread(chat.prompt_ids, service, chat_body)
    return Asked(chat_body, [Prompt(ids)], service.sampling(chat_body), ignored)


async def _explain(
    service: Service, http: HttpRequest, asked: Asked, prompt: Prompt
) -> dict[str, Any]:
    """One prompt: what the model would see of it, and what would become of it."""
    known = [token for token in prompt.ids if 0 <= token < service.engine.info.vocab_size]
    text = await asyncio.to_thread(service.text.decode, known, skip_special=False)
    told = {"prompt": text, "tokens": prompt.ids, "prompt_tokens": len(prompt.ids)}
    try:
        request = asked.request(service, http, prompt)
    except InvalidRequest as error:
        return {**told, "verdict": "refuse", "error": _error(from_exception(error))}
    found = await service.engine.explain(request)
    outlook, scored = found.outlook, request.sampling.prompt_logprobs is not None
    return {
        **told,
        "answers": request.n,
        "max_tokens": request.sampling.max_tokens,
        "verdict": outlook.verdict,
        "blocks_needed": outlook.blocks,
        "blocks_total": service.engine.info.num_blocks,
        # A prompt whose log-probabilities are asked for is read whole.
        "cached_tokens": 0 if scored else found.explanation.found,
        "missing": found.explanation.missing,
        "ahead": outlook.ahead,
        "estimated_wait_seconds": outlook.wait,
    }


def _error(error: ApiError) -> dict[str, str | None]:
    return {"message": error.message, "param": error.param, "code": error.code}
