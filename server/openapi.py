"""The OpenAPI document. Routes read their bodies themselves, so that errors have one shape; what
they take and give is therefore told to the document here."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.response_schemas import ResponsesBody
from server.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

BODIES: Mapping[str, tuple[type[Body], ...]] = {
    "/v1/chat/completions": (ChatBody,),
    "/v1/completions": (CompletionBody,),
    "/v1/responses": (ResponsesBody,),
    "/tokenize": (TokenizeBody, ChatBody),
    "/detokenize": (DetokenizeBody,),
    "/v1/explain": (ChatBody, CompletionBody),
    "/debug/kv/explain": (ChatBody, CompletionBody),
}
"""What each POST route takes: one of these."""

STREAMING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

_REF = "#/components/schemas/{model}"
_NULLABLE_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
        }
    },
}


def install(app: FastAPI) -> None:
    """Lets `/openapi.json` serve the whole document, built when first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def document(app: FastAPI) -> dict[str, Any]:
    """The document of all routes of `app`."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    keys, definitions = models_json_schema(
        [(body, "validation") for body in dict.fromkeys(chain.from_iterable(BODIES.values()))],
        ref_template=_REF,
    )
    components = found.setdefault("components", {})
    components["schemas"] = {"Error": _ERROR, **definitions.get("$defs", {})}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    found["security"] = [{"key": []}, {}]
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            answers: dict[str, Any] = operation["responses"]
            answers.pop("422", None)  # FastAPI's own; nothing here answers it
            answers["default"] = {
                "description": "An error",
                "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
            }
            if method == "post" and path in BODIES:
                schemas = [keys[(body, "validation")] for body in BODIES[path]]
                schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
                operation["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                }
            if path in STREAMING:
                answers["200"]["content"]["text/event-stream"] = {}
    return found
