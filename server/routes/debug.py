"""GET /debug/kv and /debug/kv/verify: the block pool as it is."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from engine.protocol import CacheView
from server.service import Service

STATES = ("free", "cached", "used", "shared")
LETTERS = ".cus"


def router(service: Service) -> APIRouter:
    """The routes over `service`; guarded by the API key like the rest of the API."""
    routes = APIRouter()

    @routes.get("/debug/kv")
    async def kv() -> Response:
        found = await service.engine.inspect()
        return _json(describe(found.view))

    @routes.get("/debug/kv/verify")
    async def verify() -> Response:
        """200 where every invariant holds, else 500 and the one that does not."""
        found = await service.engine.inspect(verify=True)
        answer = {"ok": found.problem is None, "problem": found.problem}
        return _json(answer, 200 if found.problem is None else 500)

    return routes


def describe(view: CacheView) -> dict[str, Any]:
    """The view as JSON has it: one letter per block, hashes shortened, every live sequence."""
    size = len(view.tags) // max(len(view.states), 1)
    tags = (view.tags[block * size : (block + 1) * size] for block in range(len(view.states)))
    hashes = {str(block): tag.hex() for block, tag in enumerate(tags) if any(tag)}
    letters = bytes(ord(letter) for letter in LETTERS)
    return {
        "block_size": view.block_size,
        "windows": view.windows,
        "num_blocks": len(view.states),
        "counts": {name: view.states.count(number) for number, name in enumerate(STATES)},
        "legend": dict(zip(LETTERS, STATES, strict=True)),
        "blocks": view.states.translate(letters + bytes(range(len(letters), 256))).decode(
            "latin-1"
        ),
        "hashes": hashes,
        "sequences": view.sequences,
    }


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
