"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.errors import invalid
from server.fields import UNSUPPORTED_IN_MESSAGE, check_extra
from server.generate import WholeAnswer
from server.logprobs import of_prompt
from server.schemas import ChatBody
from server.service import Prompt, Service, usage_options
from server.sse import ChatChunks, EventStream, events
from server.template import GIVEN, ChatTemplate, TemplateError


def router(service: Service) -> APIRouter:
    """The route over `service`."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest) -> Response:
        body = await service.read(http, ChatBody)
        headers = service.response_headers(http, body, check(service, body))
        envelope = service.envelope("chatcmpl", body)
        sampling = service.sampling(body)
        prompt, ids = await asyncio.to_thread(prompt_of, service, body)
        request = service.request(http, envelope.id, Prompt(ids), sampling, body, "messages")
        echo, wording = echoed(body), service.wording(body)
        reader = service.parsers.readers(body, prompt)
        generation = service.generation(http, body, [request], continues=False, reader=reader)
        if body.stream:
            told_ids = ids if body.return_token_ids else None
            chunks = ChatChunks(envelope, wording, echo, told_ids)
            items = events(generation, chunks, usage_options(body), service.positions)
            return EventStream(items, headers)
        async with generation:
            answers = await generation.whole()
        choices = [
            {
                "index": index,
                "message": message(answer, echo),
                **wording.chat(answer.detail),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for index, answer in enumerate(answers)
        ]
        whole: dict[str, Any] = {
            **envelope.fields("chat.completion"),
            "choices": choices,
            "usage": generation.usage.fields(),
            "quire": generation.receipt.fields(),
        }
        if body.return_token_ids:
            whole["prompt_token_ids"] = ids
        if body.prompt_logprobs is not None:
            push = service.text.detokenizer().push
            entries = of_prompt(ids, generation.prompt_scores(0), push)
            whole["prompt_logprobs"] = wording.prompt(entries)
        headers["server-timing"] = generation.receipt.server_timing()
        return Response(msgspec.json.encode(whole), headers=headers, media_type="application/json")

    return routes


def message(answer: WholeAnswer, echo: str) -> dict[str, Any]:
    """An assistant's message; without content where there are calls and nothing else."""
    content = echo + answer.text
    told: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not answer.calls else None,
        "refusal": None,
    }
    if answer.reasoning:
        told["reasoning"] = told["reasoning_content"] = answer.reasoning
    if answer.calls:
        told["tool_calls"] = [call.fields() for call in answer.calls]
    return told


def echoed(body: ChatBody) -> str:
    """The text of the message that the answer goes on with, where it is to be repeated."""
    if not (body.echo and body.continue_final_message):
        return ""
    content: str = body.messages[-1].for_template()["content"]
    return content


def check(service: Service, body: ChatBody) -> list[str]:
    """Paths of fields of messages, and of variables of the template, that have no effect.

    Raises:
        ApiError: 400 for messages that cannot be rendered.
    """
    most = service.limits.request.logprobs
    if not 0 <= (body.top_logprobs or 0) <= most:
        raise invalid(
            "top_logprobs", f"top_logprobs must be between 0 and {most}, got {body.top_logprobs}"
        )
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    if not body.messages:
        raise invalid("messages", "messages must have at least 1 message, got 0")
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise invalid(
                "continue_final_message",
                "continue_final_message and add_generation_prompt cannot both be true",
            )
        last = body.messages[-1].role
        if last != "assistant":
            param = f"messages.{len(body.messages) - 1}.role"
            raise invalid(
                param, f"{param} must be 'assistant' with continue_final_message, got {last!r}"
            )
    ignored = []
    for place, one in enumerate(body.messages):
        if one.content is None and not (one.role == "assistant" and one.tool_calls):
            param = f"messages.{place}.content"
            raise invalid(param, f"{param} must be a string or text parts, got None")
        if one.model_extra:
            ignored += check_extra(one.model_extra, UNSUPPORTED_IN_MESSAGE, f"messages.{place}.")
    return ignored + check_variables(service.text.template, body.chat_template_kwargs or {})


def check_variables(template: ChatTemplate | None, given: Mapping[str, Any]) -> list[str]:
    """Paths of the variables that the template does not read.

    Raises:
        ApiError: 400 for one that a request cannot set like this.
    """
    ignored = []
    for name in given:
        path = f"chat_template_kwargs.{name}"
        if name in GIVEN or name.endswith("_token") or name == "chat_template":
            raise invalid(path, f"{path} cannot be set, only variables of the model's own template")
        if template is None or name not in template.variables:
            ignored.append(path)
    return ignored


def prompt_ids(service: Service, body: ChatBody) -> tuple[int, ...]:
    """The chat as token ids: see `prompt_of`."""
    return prompt_of(service, body)[1]


def prompt_of(service: Service, body: ChatBody) -> tuple[str, tuple[int, ...]]:
    """The chat as text and as token ids. The template writes the special tokens, the tokenizer adds
    none unless asked to. Takes its time: to be run on a thread.

    Raises:
        ApiError: the template refuses the messages.
    """
    try:
        text = service.text.render(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            variables=body.chat_template_kwargs,
            tools=[tool.model_dump(exclude_unset=True) for tool in body.tools or ()] or None,
        )
    except TemplateError as error:
        raise invalid("messages", str(error)) from None
    ids = service.text.encode([text], add_special_tokens=bool(body.add_special_tokens))[0]
    return text, service.truncated(ids, body)
