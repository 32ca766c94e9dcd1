"""/debug/kv: the block pool as it is, and what it would find of a prompt."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.protocol import CacheView
from server.routes import explain as explained
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

    @routes.get("/debug/stats")
    async def stats() -> Response:
        """The engine's newest snapshot and what it was set up with; asks it nothing."""
        engine = service.engine
        return _json({"engine": msgspec.to_builtins(engine.info), "stats": engine.stats()})

    @routes.get("/debug/kv/verify")
    async def verify() -> Response:
        """200 where every invariant holds, else 500 and the one that does not."""
        found = await service.engine.inspect(verify=True)
        answer = {"ok": found.problem is None, "problem": found.problem}
        return _json(answer, 200 if found.problem is None else 500)

    @routes.post("/debug/kv/explain")
    async def explain(http: HttpRequest) -> Response:
        """Takes the body of a chat or a completion, and computes nothing."""
        asked, prompts = await explained.read(service, http), []
        for request in [asked.request(service, http, prompt) for prompt in asked.prompts]:
            found = (await service.engine.explain(request)).explanation
            prompts.append(
                {
                    "prompt_tokens": len(request.prompt_ids),
                    "found": found.found,
                    "held": found.held,
                    "missing": found.missing,
                }
            )
        return _json({"prompts": prompts})

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
        "host": {"num_blocks": view.host_blocks, "used": view.host_blocks_used},
        "disk": {"num_blocks": view.disk_blocks},
        "sequences": view.sequences,
    }


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
