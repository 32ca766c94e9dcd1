"""The document at /openapi.json names what every route takes and gives."""

from __future__ import annotations

from server.openapi import BODIES, STREAMING
from tests.server.front import app_over, says

WITHOUT_A_BODY = ("/v1/responses/{id}/cancel",)


def test_every_post_route_tells_what_it_takes() -> None:
    app = app_over(says("hello"))
    paths = app.openapi()["paths"]
    posts = {path for path, operations in paths.items() if "post" in operations}
    assert posts == set(BODIES) | set(WITHOUT_A_BODY)
    assert set(STREAMING) <= posts
    for path in BODIES:
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schemas = schema.get("anyOf", [schema])
        assert len(schemas) == len(BODIES[path])
        for one in schemas:
            name = one["$ref"].rpartition("/")[2]
            assert app.openapi()["components"]["schemas"][name]["type"] == "object"


def test_every_operation_tells_the_shape_of_its_errors() -> None:
    document = app_over(says("hello")).openapi()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            schema = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}, path
            assert "422" not in operation["responses"]
