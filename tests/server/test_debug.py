"""What /debug/kv shows of the pool."""

from __future__ import annotations

import pytest

from engine.protocol import CacheView, SequenceView
from server.keys import KeyRing
from tests.server.front import door, says

VIEW = CacheView(
    block_size=16,
    windows=[0, 64],
    states=bytes([2, 3, 1, 0, 0]),
    tags=bytes(4) + b"\xab\xcd\xef\x01" + b"\x11\x22\x33\x44" + bytes(8),
    sequences=[SequenceView("r", 1, "running", 40, 32, 2, [[0, 1], [-1, 1]])],
)


def test_a_map_of_the_pool() -> None:
    answer = door(says("x", view=VIEW)).get("/debug/kv").json()
    assert answer["blocks"] == "usc.."
    assert answer["counts"] == {"free": 2, "cached": 1, "used": 1, "shared": 1}
    assert answer["hashes"] == {"1": "abcdef01", "2": "11223344"}
    assert (answer["block_size"], answer["windows"], answer["num_blocks"]) == (16, [0, 64], 5)
    assert answer["sequences"] == [
        {
            "request_id": "r",
            "index": 1,
            "status": "running",
            "tokens": 40,
            "computed": 32,
            "preemptions": 2,
            "tables": [[0, 1], [-1, 1]],
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
