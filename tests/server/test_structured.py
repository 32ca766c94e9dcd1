"""What `response_format` and `structured_outputs` ask of the engine, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.grammar import GrammarCompiler
from models import embedded
from scheduler.request import Grammar
from server.structured import closed
from tests.server.front import door, says

SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer"}}, "required": ["ä"]}


def grammar(**fields: Any) -> Grammar | None:
    """Of the request that reaches the engine, the same from both endpoints."""
    engine = says("{}")
    front = door(engine)
    assert front.chat(**fields).status_code == 200
    assert front.complete(**fields).status_code == 200
    ours, theirs = (request.sampling.grammar for request in engine.submitted)
    assert ours == theirs
    return ours


@pytest.mark.parametrize(
    ("fields", "kind", "text", "param"),
    [
        (
            {"response_format": {"type": "json_object"}},
            "json_schema",
            '{"type":"object"}',
            "response_format",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            json.dumps(closed(SCHEMA), ensure_ascii=False, separators=(",", ":")),
            "response_format.json_schema.schema",
        ),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            "json_schema",
            json.dumps(SCHEMA),
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"regex": "[a-z]+"}},
            "regex",
            "[a-z]+",
            "structured_outputs.regex",
        ),
        (
            {"structured_outputs": {"choice": ["yes", 'n"o\n', "ü\\"]}},
            "lark",
            'start: "yes" | "n\\"o\\n" | "ü\\\\"',
            "structured_outputs.choice",
        ),
        (
            {
                "structured_outputs": {"grammar": 'start: "a"'},
                "response_format": {"type": "text"},
            },
            "lark",
            'start: "a"',
            "structured_outputs.grammar",
        ),
    ],
)
def test_one_grammar_reaches_the_engine(
    fields: dict[str, Any], kind: str, text: str, param: str
) -> None:
    found = grammar(**fields)
    assert found is not None
    assert (found.kind, found.text, found.param) == (kind, text, param)
    GrammarCompiler(embedded.path(), 2048, [2]).compile(found)


def test_text_asks_for_nothing() -> None:
    assert grammar() is None
    assert grammar(response_format={"type": "text"}, structured_outputs=None) is None


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "got none"),
        (
            {"structured_outputs": {"regex": "a", "json": {}}},
            "structured_outputs",
            "got json, regex",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1", "empty"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice.1", "string"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "dictionary"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "permitted"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        (
            {
                "response_format": {"type": "json_object"},
                "structured_outputs": {"regex": "a"},
            },
            "structured_outputs",
            "exclude",
        ),
        ({"guided_json": {}}, "guided_json", "structured_outputs.json"),
        ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs.choice"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str, word: str) -> None:
    front = door(says("{}"))
    for response in (front.chat(**fields), front.complete(**fields)):
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["param"] == param
        assert word in error["message"]


@pytest.mark.parametrize("depth", [100, 900])
def test_a_deep_schema_is_no_error_of_the_server(depth: int) -> None:
    assert door(says("{}")).chat(structured_outputs={"json": deep(depth)}).status_code in (200, 400)


def test_undeclared_keys_are_closed_out_where_nothing_is_said_of_them() -> None:
    inner = {"type": "object", "properties": {"b": {"type": "integer"}}}
    schema = {
        "type": "object",
        "properties": {"a": inner, "list": {"type": "array", "items": inner}},
    }
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "type": "object",
        "properties": {"a": shut, "list": {"type": "array", "items": shut}},
        "additionalProperties": False,
    }
    assert schema["properties"]["a"] == inner, "the client's own is left alone"
    for kept in (
        {**inner, "additionalProperties": True},
        {**inner, "allOf": [inner]},
        {"type": "object"},
        {"$ref": "#/$defs/x", "properties": {}},
        True,
    ):
        assert closed(kept) == kept
