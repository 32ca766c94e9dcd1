"""The list of live requests, ending one of them, and what those in the queue are told."""

from __future__ import annotations

import asyncio

import pytest

from engine.protocol import RequestView
from server import generate
from server.keys import KeyRing
from server.queue_positions import QueuePositions
from tests.server.front import door, says

KEYS = KeyRing([("k1", "ann"), ("k2", "bob")])


def view(name: str, tenant: str = "", position: int | None = None) -> RequestView:
    state = "waiting" if position else "running"
    return RequestView(name, tenant, state, position, 0, 10, 2, 1, 0.5)


def test_live_requests() -> None:
    answer = door(says("x", live=[view("a"), view("b", position=1)])).get("/v1/requests").json()
    assert [item["id"] for item in answer["data"]] == ["a", "b"]
    assert answer["data"][1] == {
        "id": "b",
        "object": "request",
        "state": "waiting",
        "position": 1,
        "priority": 0,
        "prompt_tokens": 10,
        "generated_tokens": 2,
        "blocks": 1,
        "age_seconds": 0.5,
    }


def test_a_key_sees_and_ends_its_own_requests_only() -> None:
    engine = says("x", live=[view("a", "ann"), view("b", "bob")])
    front = door(engine, keys=KEYS)
    ann = {"authorization": "Bearer k1"}
    data = front.get("/v1/requests", headers=ann).json()["data"]
    assert [item["id"] for item in data] == ["a"]
    refused = front.call("DELETE", "/v1/requests/b", headers=ann)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
    assert engine.aborted == []
    deleted = front.call("DELETE", "/v1/requests/a", headers=ann)
    assert deleted.json() == {"id": "a", "object": "request", "deleted": True}
    assert engine.aborted == ["a"]


def test_unknown_requests_and_a_dead_engine() -> None:
    assert door(says("x")).call("DELETE", "/v1/requests/a").status_code == 404
    assert door(says("x", alive=False)).get("/v1/requests").status_code == 503


@pytest.mark.parametrize(
    ("queued", "comment"), [(True, ": queued position=3"), (False, ": waiting")]
)
def test_a_stream_in_the_queue_is_told_its_place(
    monkeypatch: pytest.MonkeyPatch, queued: bool, comment: str
) -> None:
    monkeypatch.setattr(generate, "IDLE_SECONDS", 0.03)
    engine = says("hi", step_seconds=0.2)

    async def requests() -> list[RequestView]:
        return [view(engine.submitted[0].id, position=3 if queued else None), view("x", position=1)]

    engine.requests = requests  # type: ignore[method-assign]
    response = door(engine).chat(stream=True)
    assert response.text.split("\n\n")[0] == comment
    assert ": queued" not in response.text.partition("data:")[2], "only before the first token"


def test_many_that_wait_ask_once() -> None:
    engine = says("x", live=[view("a", position=1), view("b", position=2)])
    asked = 0

    async def requests() -> list[RequestView]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        return engine.live

    engine.requests = requests  # type: ignore[method-assign]

    async def ask() -> list[int | None]:
        positions = QueuePositions(engine)
        return await asyncio.gather(*(positions.first([name]) for name in ("a", "b", "c") * 5))

    assert asyncio.run(ask()) == [1, 2, None] * 5
    assert asked == 1


def test_an_engine_that_does_not_answer_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.queue_positions.PATIENCE", 0.01)
    engine = says("x")

    async def never() -> list[RequestView]:
        await asyncio.Event().wait()
        raise AssertionError

    engine.requests = never  # type: ignore[method-assign]

    async def ask() -> int | None:
        return await QueuePositions(engine).first(["a"])

    assert asyncio.run(ask()) is None
