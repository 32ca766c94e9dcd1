"""Structured outputs: from `response_format` and `structured_outputs` to one grammar."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from scheduler.request import Grammar
from server.errors import invalid
from server.schemas import GenerationBody, ResponseFormat, StructuredOutputs

ANY_OBJECT = Grammar("json_schema", '{"type":"object"}', "response_format")

_COMBINED = {
    *("$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "patternProperties"),
    "unevaluatedProperties",
}


def grammar_of(body: GenerationBody) -> Grammar | None:
    """What the answers must match, or None.

    Raises:
        ApiError: 400 where more than one thing is asked for, or nothing where something must be.
    """
    format, outputs = body.response_format, body.structured_outputs
    held = format is not None and format.type != "text"
    if outputs is None:
        return _of_format(format) if format is not None and held else None
    if held:
        raise invalid(
            "structured_outputs", "structured_outputs and response_format exclude each other"
        )
    return _of_outputs(outputs)


def _of_format(format: ResponseFormat) -> Grammar:
    if format.type == "json_object":
        return ANY_OBJECT
    if format.json_schema is None:
        param = "response_format.json_schema"
        raise invalid(param, f"{param} is required with the type 'json_schema'")
    schema = closed(format.json_schema.schema_)
    return schema_grammar(schema, "response_format.json_schema.schema")


def _of_outputs(outputs: StructuredOutputs) -> Grammar:
    given = {name: value for name, value in outputs if value is not None}
    if len(given) != 1:
        raise invalid(
            "structured_outputs",
            "structured_outputs must have exactly one of json, regex, choice and grammar, got "
            + (", ".join(name.rstrip("_") for name in given) or "none"),
        )
    match given:
        case {"json_": schema}:
            return schema_grammar(schema, "structured_outputs.json")
        case {"regex": regex}:
            return Grammar("regex", regex, "structured_outputs.regex")
        case {"choice": choice}:
            return _choice(choice)
        case _:
            return Grammar("lark", outputs.grammar or "", "structured_outputs.grammar")


def schema_grammar(schema: dict[str, Any] | str, param: str) -> Grammar:
    """JSON that a schema describes; `param` is the client's name of the schema.

    Raises:
        ApiError: 400 for one that is nested too deeply.
    """
    if isinstance(schema, str):
        return Grammar("json_schema", schema, param)
    try:
        text = msgspec.json.encode(schema).decode()
    except RecursionError:
        raise invalid(param, f"{param} is nested too deeply") from None
    return Grammar("json_schema", text, param)


def closed(schema: Any, depth: int = 64) -> Any:
    """The schema without undeclared keys: an object that lists its properties and says nothing of
    others gets `additionalProperties: false`, or small models never come to its end. Objects that
    are put together of several schemas stay open, since each of those would exclude the others; so
    does what lies `depth` levels down."""
    if not isinstance(schema, dict) or not _COMBINED.isdisjoint(schema) or not depth:
        return schema
    made = dict(schema)
    if isinstance(made.get("properties"), dict):
        made["properties"] = {
            name: closed(value, depth - 1) for name, value in made["properties"].items()
        }
        made.setdefault("additionalProperties", False)
    if "items" in made:
        made["items"] = closed(made["items"], depth - 1)
    return made


def _choice(choice: list[str]) -> Grammar:
    param = "structured_outputs.choice"
    if not choice:
        raise invalid(param, f"{param} must have at least 1 string, got 0")
    if "" in choice:
        param += f".{choice.index('')}"
        raise invalid(param, f"{param} must not be an empty string, got ''")
    return Grammar("lark", "start: " + " | ".join(map(lark_string, choice)), param)


def lark_string(text: str) -> str:
    """`text` as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)
