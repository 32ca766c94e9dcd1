"""Bounds of the queue: that they hold, and what is told to those that are too many."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from scheduler.request import Request
from server.errors import ApiError
from server.queue_bound import QueueBound, QueueLimits
from tests.scheduler.fake_device import make_request
from tests.server.front import COMPLETION, Door, app_over, says


def prompts(count: int, length: int = 10, tenant: str = "") -> list[Request]:
    return [make_request(f"{tenant}{i}/{count}", [1] * length, tenant=tenant) for i in range(count)]


def refusal(bound: QueueBound, requests: list[Request]) -> ApiError:
    with pytest.raises(ApiError) as refused:
        bound.enter(requests)
    return refused.value


def test_requests_and_tokens_are_counted_until_they_leave() -> None:
    bound = QueueBound(QueueLimits(requests=3, tokens=40))
    first = prompts(3)
    bound.enter(first)
    assert refusal(bound, prompts(1)).code == "queue_full"
    bound.leave(first[0])
    bound.leave(first[0])
    error = refusal(bound, prompts(1, length=25))
    assert (error.status, error.code) == (503, "queue_full")
    assert error.message == "waiting prompt tokens may be at most 40, and 20 are there"
    bound.enter(prompts(1, length=20))


def test_all_prompts_of_a_request_enter_or_none() -> None:
    bound = QueueBound(QueueLimits(requests=3))
    bound.enter(prompts(2))
    refusal(bound, prompts(2, tenant="b"))
    bound.enter(prompts(1, tenant="c"))


def test_what_never_fits_is_no_matter_of_trying_again() -> None:
    for limits in (QueueLimits(requests=1), QueueLimits(tokens=10), QueueLimits(per_key=1)):
        error = refusal(QueueBound(limits), prompts(2))
        assert (error.status, error.code) == (400, "invalid_value")


def test_a_bound_for_each_key() -> None:
    bound = QueueBound(QueueLimits(per_key=2))
    bound.enter(prompts(2, tenant="a"))
    error = refusal(bound, prompts(1, tenant="a"))
    assert (error.status, error.code, error.type) == (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    assert error.headers["x-should-retry"] == "true"
    bound.enter(prompts(2, tenant="b"))


def test_retry_after_follows_the_speed_of_the_queue() -> None:
    now = 0.0
    bound = QueueBound(QueueLimits(requests=100), clock=lambda: now)
    waiting = prompts(100)
    bound.enter(waiting)
    assert bound.retry_after == 5, "nothing is known yet"
    for request in waiting[:20]:
        now += 0.5
        bound.leave(request)
    assert bound.retry_after == 38, "80 that leave about twice a second"
    now += 1000
    assert bound.retry_after == 60
    for request in waiting[20:]:
        bound.leave(request)
    assert bound.retry_after == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_burst_does_not_pass_the_bound(stream: bool) -> None:
    """Twelve at once, before the engine has answered to any of them."""
    engine = says("hello", admit_seconds=0.05)
    app = app_over(engine, queue=QueueLimits(requests=3))

    async def burst() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            calls = [
                client.post("/v1/completions", json=COMPLETION | {"stream": stream})
                for _ in range(12)
            ]
            return await asyncio.gather(*calls)

    for submitted in (3, 6):  # the second burst finds the queue empty again
        responses = asyncio.run(burst())
        assert Counter(response.status_code for response in responses) == {200: 3, 503: 9}
        assert len(engine.submitted) == submitted
    refused = next(response for response in responses if response.status_code == 503)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-should-retry"] == "true"
    assert refused.json()["error"]["code"] == "queue_full"
    [line] = [line for line in Door(app).get("/metrics").text.splitlines() if "queue_full" in line]
    assert line.startswith("vllm:admission_rejections_total")
    assert line.endswith(" 18.0")
