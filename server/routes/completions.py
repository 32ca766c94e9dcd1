"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.protocol import EngineInfo
from scheduler.request import Request, SamplingParams
from server.errors import invalid
from server.generate import Generation, Piece, WholeAnswer
from server.logprobs import Detail, Told, Wording, of_prompt
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
        echo = Echo(service, generation, body, prompts, requests[0].n)
        wording = service.wording(body)
        if body.stream:
            chunks = CompletionChunks(envelope, wording, echo.piece)
            items = events(generation, chunks, usage_options(body), service.positions)
            return EventStream(items, headers)
        async with generation:
            answers = await generation.whole()
        choices = [echo.choice(index, answer, wording) for index, answer in enumerate(answers)]
        whole: dict[str, Any] = {
            **envelope.fields("text_completion"),
            "choices": choices,
            "usage": generation.usage.fields(),
            "quire": generation.receipt.fields(),
        }
        headers["server-timing"] = generation.receipt.server_timing()
        return Response(msgspec.json.encode(whole), headers=headers, media_type="application/json")

    return routes


class Echo:
    """What the choices of a completion repeat of their prompts.

    Args:
        n: answers per prompt.
    """

    def __init__(
        self,
        service: Service,
        generation: Generation,
        body: CompletionBody,
        prompts: list[Prompt],
        n: int,
    ) -> None:
        self._service, self._generation = service, generation
        self._body, self._prompts, self._n = body, prompts, n

    def piece(self, index: int) -> Piece:
        """What answer `index` begins with: text and details of its prompt, as far as asked for."""
        body, prompt = self._body, self._prompts[index // self._n]
        told = body.echo and body.answer_logprobs is not None
        ids = prompt.ids if body.return_token_ids else None
        detail = None
        if told or ids is not None:
            detail = Detail(self._told(index) if told else None, None, ids)
        return Piece(index, prompt.text if body.echo else "", detail=detail)

    def choice(self, index: int, answer: WholeAnswer, wording: Wording) -> dict[str, Any]:
        """One whole choice."""
        opening = self.piece(index)
        details = [opening.detail] if opening.detail else []
        if answer.detail is not None:
            details.append(answer.detail.moved(len(opening.text)))
        choice = {
            "index": index,
            "text": opening.text + answer.text,
            **wording.completion(Detail.join(details)),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = wording.prompt(self._told(index))
        return choice

    def _told(self, index: int) -> list[Told]:
        """The prompt's tokens with their log-probabilities."""
        push = self._service.text.detokenizer(
            skip_special=self._body.skip_special_tokens is not False
        ).push
        prompt = self._prompts[index // self._n]
        return of_prompt(prompt.ids, self._generation.prompt_scores(index), push)


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
        lists = service.text.encode(texts, add_special_tokens=special)
    else:
        lists = [prompt] if isinstance(prompt[0], int) else prompt
        texts = [None] * len(lists)
    prompts = []
    for ids, text in zip(lists, texts, strict=True):
        kept = service.truncated(ids, body)
        if text is None or len(kept) < len(ids):
            text = read_back(service, kept, body) if body.echo else ""
        prompts.append(Prompt(kept, text))
    return prompts


def read_back(service: Service, ids: Sequence[int], body: CompletionBody) -> str:
    """The text of a prompt that came as ids. Unknown ids are refused later."""
    known = [i for i in ids if 0 <= i < service.engine.info.vocab_size]
    return service.text.decode(known, skip_special=body.skip_special_tokens is not False)


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
