"""litellm as a client: whole, streamed, async, errors mapped to its own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compat.target import Target

litellm = pytest.importorskip("litellm")

HI: list[dict[str, str]] = [{"role": "user", "content": "What is a block table?"}]


@pytest.fixture
def options(target: Target) -> dict[str, Any]:
    return {
        "model": f"openai/{target.model}",
        "api_base": f"{target.url}/v1",
        "api_key": target.key,
        "messages": HI,
        "temperature": 0,
        "num_retries": 0,
    }


def test_whole_answer(options: dict[str, Any]) -> None:
    answer = litellm.completion(**options)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert "block" in choice.message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_equals_whole(options: dict[str, Any]) -> None:
    whole = litellm.completion(**options).choices[0].message.content
    chunks = list(litellm.completion(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HI)
    assert rebuilt.choices[0].message.content == whole


async def test_async_stream(options: dict[str, Any]) -> None:
    whole = (await litellm.acompletion(**options)).choices[0].message.content
    stream = await litellm.acompletion(**options, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == whole


def test_text_completion(options: dict[str, Any], target: Target) -> None:
    del options["messages"]
    options["model"] = f"text-completion-openai/{target.model}"
    answer = litellm.text_completion(**options, prompt="A block table", max_tokens=5)
    assert answer.usage.completion_tokens <= 5


def test_structured_output(options: dict[str, Any]) -> None:
    import json

    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = litellm.completion(
        **options,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": schema, "strict": True},
        },
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)


def test_tool_call(options: dict[str, Any]) -> None:
    import json

    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
    answer = litellm.completion(**options, tools=[tool], tool_choice="required", max_tokens=200)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0].function
    assert call.name == "add"
    assert set(json.loads(call.arguments)) == {"a", "b"}


def test_errors_are_its_own(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**{**options, "temperature": 3})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**options, "api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**options, "model": "openai/none"})
