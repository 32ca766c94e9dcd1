"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.protocol import EngineInfo
from scheduler.request import Request, SamplingParams
from server.errors import invalid
from server.schemas import CompletionBody
from server.service import Prompt, Service, usage_options
from server.sse import CompletionChunks, EventStream, events

DEFAULT_MAX_TOKENS = 16


def router(service: Service) -> APIRouter:
    """The route over `service`."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        body = await service.read(http, CompletionBody)
        headers = service.response_headers(http, body, [])
        envelope = service.envelope("cmpl", body)
        sampling = service.sampling(body)
        prompts = await asyncio.to_thread(read_prompts, service, body)
        requests = build_requests(service, http, envelope.id, prompts, sampling, body)
        generation = service.generation(http, body, requests, continues=True)
        n = requests[0].n
        echoes = [prompt.text for prompt in prompts] if body.echo else []
        if body.stream:
            chunks = CompletionChunks(envelope, echoes, n)
            return EventStream(events(generation, chunks, usage_options(body)), headers)
        async with generation:
            answers = await generation.whole()
        choices = [
            {
                "index": index,
                "text": (echoes[index // n] if echoes else "") + answer.text,
                "logprobs": None,
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for index, answer in enumerate(answers)
        ]
        whole: dict[str, Any] = {
            **envelope.fields("text_completion"),
            "choices": choices,
            "usage": generation.usage.fields(),
            "quire": generation.receipt.fields(),
        }
        headers["server-timing"] = generation.receipt.server_timing()
        return Response(msgspec.json.encode(whole), headers=headers, media_type="application/json")

    return routes


def read_prompts(service: Service, body: CompletionBody) -> list[Prompt]:
    """The prompts as token ids, texts tokenized with the model's special tokens. Takes its time:
    to be run on a thread.

    Raises:
        ApiError: there is none.
    """
    prompt: Any = body.prompt
    if prompt == [] or prompt == [[]]:
        raise invalid("prompt", "prompt must not be empty")
    if isinstance(prompt, str) or isinstance(prompt[0], str):
        texts = [prompt] if isinstance(prompt, str) else prompt
        special = body.add_special_tokens is not False
        encoded = service.text.encode(texts, add_special_tokens=special)
        return [Prompt(tuple(ids), text) for ids, text in zip(encoded, texts, strict=True)]
    lists = [prompt] if isinstance(prompt[0], int) else prompt
    skip = body.skip_special_tokens is not False
    top = service.engine.info.vocab_size
    return [
        Prompt(tuple(ids), service.text.decode([i for i in ids if 0 <= i < top], skip_special=skip))
        if body.echo
        else Prompt(tuple(ids))
        for ids in lists
    ]


def build_requests(
    service: Service,
    http: HttpRequest,
    request_id: str,
    prompts: list[Prompt],
    sampling: SamplingParams,
    body: CompletionBody,
) -> list[Request]:
    """One engine request per prompt.

    Raises:
        InvalidRequest: one can never be served; its `param` names it where there are several.
    """
    several = len(prompts) > 1
    return [
        service.request(
            http,
            f"{request_id}-{place}" if several else request_id,
            prompt,
            _with_max_tokens(sampling, len(prompt.ids), service.engine.info),
            body,
            f"prompt.{place}" if several else "prompt",
        )
        for place, prompt in enumerate(prompts)
    ]


def _with_max_tokens(sampling: SamplingParams, length: int, info: EngineInfo) -> SamplingParams:
    """The endpoint's default, cut to what the context leaves; what a client gives is never cut."""
    if sampling.max_tokens is not None:
        return sampling
    room = max(info.max_model_len - length, 1)
    return msgspec.structs.replace(sampling, max_tokens=min(DEFAULT_MAX_TOKENS, room))
