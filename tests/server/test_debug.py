"""What /debug/kv shows of the pool."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from engine.protocol import CacheView, SequenceView
from paged_cache.explain import Explanation, Missing
from server.keys import KeyRing
from tests.server.front import CHAT, COMPLETION, Door, door, says

VIEW = CacheView(
    block_size=16,
    windows=[0, 64],
    states=bytes([2, 3, 1, 0, 0]),
    tags=bytes(4) + b"\xab\xcd\xef\x01" + b"\x11\x22\x33\x44" + bytes(8),
    sequences=[SequenceView("r", 1, "running", 40, 32, 2, [[0, 1], [-1, 1]], swaps=1)],
    host_blocks=8,
    host_blocks_used=3,
    disk_blocks=20,
)


def test_a_map_of_the_pool() -> None:
    answer = door(says("x", view=VIEW)).get("/debug/kv").json()
    assert answer["blocks"] == "usc.."
    assert answer["counts"] == {"free": 2, "cached": 1, "used": 1, "shared": 1}
    assert answer["hashes"] == {"1": "abcdef01", "2": "11223344"}
    assert (answer["block_size"], answer["windows"], answer["num_blocks"]) == (16, [0, 64], 5)
    assert answer["disk"] == {"num_blocks": 20}
    assert answer["host"] == {"num_blocks": 8, "used": 3}
    assert answer["sequences"] == [
        {
            "request_id": "r",
            "index": 1,
            "status": "running",
            "tokens": 40,
            "computed": 32,
            "preemptions": 2,
            "tables": [[0, 1], [-1, 1]],
            "swaps": 1,
        }
    ]


@pytest.mark.parametrize(("problem", "status"), [(None, 200), ("block 3 is lost", 500)])
def test_verify_tells_the_broken_invariant(problem: str | None, status: int) -> None:
    response = door(says("x", problem=problem)).get("/debug/kv/verify")
    assert response.status_code == status
    assert response.json() == {"ok": problem is None, "problem": problem}


def test_a_dead_engine_and_a_missing_key() -> None:
    assert door(says("x", alive=False)).get("/debug/kv").status_code == 503
    assert door(says("x"), keys=KeyRing([("k", "")])).get("/debug/kv").status_code == 401


def explain(front: Door, body: object, **options: Any) -> httpx.Response:
    return front.call("POST", "/debug/kv/explain", json=body, **options)


def test_what_would_be_found_of_a_prompt() -> None:
    found = Explanation(16, [1], [Missing(16, 16, "diverged", 20), Missing(32, 4, "last_block")])
    answer = explain(door(says("x", explanation=found)), {"prompt": [5] * 36}).json()
    assert answer == {
        "prompts": [
            {
                "prompt_tokens": 36,
                "found": 16,
                "held": [1],
                "missing": [
                    {"start": 16, "count": 16, "reason": "diverged", "diverges_at": 20},
                    {"start": 32, "count": 4, "reason": "last_block", "diverges_at": None},
                ],
            }
        ]
    }


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (CHAT | {"cache_salt": "s"}, "/v1/chat/completions"),
        (COMPLETION | {"cache_salt": "s"}, "/v1/completions"),
        ({"prompt": ["a", "b"]}, "/v1/completions"),
    ],
)
def test_explained_is_what_the_endpoint_would_ask_for(body: dict[str, Any], path: str) -> None:
    engine = says("x")
    front = door(engine, keys=KeyRing([("k", "ann")]))
    headers = {"authorization": "Bearer k"}
    assert explain(front, body, headers=headers).status_code == 200
    front.call("POST", path, json=body, headers=headers)
    keyed = [
        [(item.prompt_ids, item.cache_salt, item.tenant) for item in items]
        for items in (engine.explained, engine.submitted)
    ]
    assert keyed[0] == keyed[1] != []


@pytest.mark.parametrize("body", [[], {}, {"messages": []}, {"prompt": []}, {"prompt": "a" * 999}])
def test_what_cannot_be_served_cannot_be_explained(body: object) -> None:
    assert explain(door(says("x")), body).status_code == 400
