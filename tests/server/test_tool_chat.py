"""Tools and thoughts over HTTP: streamed, whole, and in the messages of the next request."""

from __future__ import annotations

from typing import Any

import pytest

from server.reading import ParserNames
from server.template import ChatTemplate
from server.tokenizer import TextModel
from tests.server.front import Door, chunks, door, says
from tests.server.text_models import byte_level_tokenizer, chat_model

TOOLS = [
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "K\u00f6ln"}}\n</tool_call>'
ANSWER = f"<think>where?</think>Let me see.\n{CALL}\n{CALL}"
PARSERS = ParserNames(tools="hermes", reasoning="think")


def front(text: str, **options: Any) -> Door:
    return door(says(text, **options), parsers=PARSERS)


def message(door: Door, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Message and choice of a whole answer."""
    response = door.chat(**fields)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["message"], choice


@pytest.mark.parametrize("per_step", [1, 3, 100])
def test_streamed_and_whole_are_the_same(per_step: int) -> None:
    """As the contract words it: the first delta of a call has everything but its arguments."""
    whole, choice = message(front(ANSWER), tools=TOOLS)
    events = chunks(front(ANSWER, per_step=per_step).chat(tools=TOOLS, stream=True))
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content") or "" for delta in deltas) == whole["content"]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == whole[name] == "where?"
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(calls)
                assert call["function"]["arguments"] == ""
                calls.append({"type": call["type"], "function": dict(call["function"])})
            else:
                assert set(call) == {"index", "function"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    assert calls == [{k: v for k, v in call.items() if k != "id"} for call in whole["tool_calls"]]
    assert whole["content"] == "Let me see."
    assert calls[1]["function"] == {"name": "weather", "arguments": '{"city": "K\u00f6ln"}'}
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons[-1] == choice["finish_reason"] == "tool_calls"


def test_thoughts_are_counted() -> None:
    usage = front(ANSWER).chat().json()["usage"]
    thoughts = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < thoughts < usage["completion_tokens"]
    plain = front("no thoughts").chat().json()["usage"]
    assert plain["completion_tokens_details"]["reasoning_tokens"] == 0


def test_calls_alone_leave_no_content() -> None:
    told, _ = message(front(CALL), tools=TOOLS)
    assert told["content"] is None
    assert "reasoning" not in told


def test_without_tools_calls_are_text() -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        told, choice = message(front(CALL), **fields)
        assert told["content"] == CALL
        assert "tool_calls" not in told
        assert choice["finish_reason"] == "stop"


def test_a_named_call_is_the_answer() -> None:
    engine = says('{"city": "Ulm"}')
    named = {"type": "function", "function": {"name": "weather"}}
    told, choice = message(door(engine, parsers=PARSERS), tools=TOOLS, tool_choice=named)
    assert told["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert choice["finish_reason"] == "tool_calls"
    grammar = engine.submitted[0].sampling.grammar
    assert grammar is not None
    assert grammar.param == "tools.1.function.parameters"


@pytest.mark.parametrize("parallel", [True, False])
def test_required_demands_calls(parallel: bool) -> None:
    engine = says(CALL)
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel}
    told, _ = message(door(engine, parsers=PARSERS), **fields)
    assert len(told["tool_calls"]) == 1
    grammar = engine.submitted[0].sampling.grammar
    assert grammar is not None
    assert ("{0,15}" in grammar.text) == parallel


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "auto", "tools": []}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tool_choice",
        ),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "search"}]}, "tools.0.type"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}]},
            "messages.0.tool_calls.0.function",
        ),
    ],
)
def test_refusals(fields: dict[str, Any], param: str) -> None:
    response = front("x").chat(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


TEMPLATE = """\
{%- for tool in tools or [] %}[{{ tool.function.name }}: {{ tool.function | tojson }}]{% endfor %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}"""


def test_tools_and_calls_reach_the_template() -> None:
    model = TextModel(byte_level_tokenizer(), ChatTemplate(TEMPLATE, {}))
    engine = says("sunny")
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city":"Ulm"}'}  # type: ignore[assignment]
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    app = door(engine, text=model)
    assert app.chat(messages=messages, tools=TOOLS).status_code == 200
    prompt = chat_model().decode(engine.submitted[0].prompt_ids)
    assert prompt.startswith('[now: {"name": "now"}][weather: {"name": "weather", "desc')
    assert prompt.endswith('<user>Weather?<assistant>{"city": "Ulm"}<tool>sun')
