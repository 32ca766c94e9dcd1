"""The Responses API, held against the openai SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from scheduler.request import InvalidRequest
from server.reading import ParserNames
from server.template import ChatTemplate
from server.tokenizer import TextModel
from tests.server.fake_engine import FakeEngine
from tests.server.front import app_over, door, live, says
from tests.server.strict import strict_client
from tests.server.text_models import byte_level_tokenizer

PARSERS = ParserNames(tools="hermes", reasoning="think")
TOOLS: list[Any] = [
    {"type": "function", "name": "now", "parameters": None, "strict": None},
    {
        "type": "function",
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    },
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture
def engine() -> FakeEngine:
    return says("hello there")


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with live(app_over(engine, parsers=PARSERS)) as url:
        yield strict_client(url)


def answering(engine: FakeEngine, text: str) -> None:
    engine.say = says(text).say


def events_of(client: openai.OpenAI, **options: Any) -> list[Any]:
    options = {"model": "quiet", "input": "hi"} | options
    return list(client.responses.create(**options, stream=True))


def test_a_text_is_answered(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="quiet", input="hi", metadata={"a": "b"})
    assert answer.output_text == "hello there"
    assert answer.status == "completed"
    assert answer.id.startswith("resp_")
    assert answer.metadata == {"a": "b"}
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize("per_step", [1, 100])
def test_events_come_in_order(engine: FakeEngine, client: openai.OpenAI, per_step: int) -> None:
    engine.per_step = per_step
    events = events_of(client)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "hello there" == events[-1].response.output_text
    assert events[-1].response.id == events[0].response.id


def test_what_was_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    for answer in (
        client.responses.create(model="quiet", input="hi", max_output_tokens=2),
        events_of(client, max_output_tokens=2)[-1].response,
    ):
        assert answer.status == answer.output[0].status == "incomplete"
        assert answer.incomplete_details.reason == "max_output_tokens"


def test_an_empty_answer_is_an_empty_message(engine: FakeEngine, client: openai.OpenAI) -> None:
    engine.say = lambda request, index: []
    assert client.responses.create(model="quiet", input="hi").output[0].type == "message"


def test_structured_text_is_parsed(engine: FakeEngine, client: openai.OpenAI) -> None:
    answering(engine, '{"name": "Ada", "age": 36}')
    answer = client.responses.parse(model="quiet", input="who?", text_format=Person)
    assert answer.output_parsed == Person(name="Ada", age=36)
    grammar = engine.submitted[0].sampling.grammar
    assert grammar is not None
    assert grammar.param == "text.format.schema"
    assert json.loads(grammar.text)["required"] == ["name", "age"]


def test_errors_are_told(engine: FakeEngine, client: openai.OpenAI) -> None:
    engine.fail_after = 2
    events = events_of(client)
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1].response.output[-1].status == "incomplete"
    engine.refuse = InvalidRequest("too long", "input")
    with pytest.raises(openai.BadRequestError):
        events_of(client)


def test_nothing_is_stored(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="quiet", input="hi", store=True)
    for method in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="stores none"):
            method(answer.id)
    with pytest.raises(openai.NotFoundError, match="stores none"):
        client.responses.input_items.list(answer.id)


def test_what_has_no_effect_is_named() -> None:
    body = {"input": "hi", "store": True, "reasoning": {"effort": "low"}, "text": {"verbosity": 1}}
    response = door(says("x")).call("POST", "/v1/responses", json=body)
    assert response.headers["x-ignored-params"] == "store, reasoning, text.verbosity"
    assert response.json()["store"] is False


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "invalid_value"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "invalid_value"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(fields: dict[str, Any], param: str, code: str) -> None:
    response = door(says("x")).call("POST", "/v1/responses", json={"input": "hi"} | fields)
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    if param == "tools.0.type":
        assert "web_search" in error["message"]


def test_calls_are_items(engine: FakeEngine, client: openai.OpenAI) -> None:
    """Behind the thoughts and the text, and the same when streamed."""
    answering(engine, f"<think>where?</think>Let me see.\n{CALL}\n{CALL}")
    options: dict[str, Any] = {"model": "quiet", "input": "hi", "tools": TOOLS}
    whole = client.responses.create(**options)
    streamed = events_of(client, tools=TOOLS)

    def told(output: list[Any]) -> list[Any]:
        return [
            (item.type, item.status, getattr(item, "arguments", None) or item.content[0].text)
            for item in output
        ]

    assert told(whole.output) == [
        ("reasoning", "completed", "where?"),
        ("message", "completed", "Let me see."),
        ("function_call", "completed", '{"city": "Ulm"}'),
        ("function_call", "completed", '{"city": "Ulm"}'),
    ]
    assert told(streamed[-1].response.output) == told(whole.output)
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    for place, item in enumerate(streamed[-1].response.output):
        own = [e for e in streamed if getattr(e, "output_index", None) == place]
        deltas = [event.delta for event in own if event.type.endswith(".delta")]
        assert "".join(deltas) == told([item])[0][2]
        assert own[0].type == "response.output_item.added"
        assert own[-1].type == "response.output_item.done"


def test_a_demanded_call_is_the_answer(engine: FakeEngine, client: openai.OpenAI) -> None:
    answering(engine, '{"city": "Ulm"}')
    answer = client.responses.create(
        model="quiet",
        input="hi",
        tools=TOOLS,
        tool_choice={"type": "function", "name": "weather"},
    )
    [call] = answer.output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("weather", '{"city": "Ulm"}')
    grammar = engine.submitted[0].sampling.grammar
    assert grammar is not None
    assert grammar.param == "tools.1.parameters"


def test_what_was_said_goes_back_as_messages(engine: FakeEngine) -> None:
    """The items of an output, and what came of its calls."""
    source = (
        "{% for m in messages %}[{{ m.role }}|{{ m.reasoning_content }}|{{ m.content }}"
        "{% for c in m.tool_calls or [] %}|{{ c.function.name }}{{ c.function.arguments }}"
        "{% endfor %}]{% endfor %}"
    )
    text = TextModel(byte_level_tokenizer(), ChatTemplate(source, {}))
    front = door(engine, text=text, parsers=PARSERS)
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "so", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
    ]
    body = {"input": items, "instructions": "be brief"}
    response = front.call("POST", "/v1/responses", json=body)
    assert response.status_code == 200, response.text
    assert "x-ignored-params" not in response.headers
    prompt = text.decode(engine.submitted[0].prompt_ids)
    assert prompt == ("[system||be brief][user||hi][assistant|hm|so|f{'a': 1}|g{}][tool||1]")
