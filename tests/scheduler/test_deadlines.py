"""Which requests are given up because of their deadline, and which are not."""

import math

import msgspec
import pytest

from scheduler.deadlines import QueueRate
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from tests.scheduler.fake_device import make_request
from tests.scheduler.test_scheduler import Rig


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rig(clock: Clock) -> Rig:
    return Rig(slots=1, clock=clock)


def timed(name: str, length: int = 4, **deadlines: float) -> Request:
    request = make_request(name, [1] * length, max_tokens=20)
    return msgspec.structs.replace(request, **deadlines)


def expired(scheduler: Scheduler) -> set[str]:
    return {item.seq.request.id for item in scheduler.expire()}


def test_the_rate_is_of_the_last_half_minute():
    rate = QueueRate()
    assert rate.per_second(0) == math.inf
    rate.started(1000, 0)
    assert rate.per_second(0.1) == math.inf, "too early to tell"
    assert rate.per_second(2) == 500
    rate.started(10, 40)
    assert rate.per_second(42) == 5
    rate.rest()
    assert rate.per_second(50) == math.inf


@pytest.mark.parametrize("kind", ["deadline", "ttft_deadline"])
def test_a_queued_request_ends_at_its_deadline_without_any_work(rig: Rig, clock: Clock, kind: str):
    rig.scheduler.add(make_request("first", [1] * 4, max_tokens=50))
    rig.step()
    rig.scheduler.add(timed("late", **{kind: clock.now + 1}))
    rig.scheduler.add(make_request("patient", [1] * 4))
    assert not rig.scheduler.expire()
    clock.now += 1
    assert expired(rig.scheduler) == {"late"}
    rig.drain()
    assert ("late", 0) not in rig.answers


def test_a_request_whose_deadline_is_over_when_it_comes_is_never_started(rig: Rig, clock: Clock):
    rig.scheduler.add(timed("late", deadline=clock.now))
    assert expired(rig.scheduler) == {"late"}
    assert not rig.scheduler.has_work


def test_a_running_request_ends_at_its_deadline(rig: Rig, clock: Clock):
    rig.scheduler.add(timed("long", deadline=clock.now + 1))
    rig.step()
    clock.now += 0.9
    assert not rig.scheduler.expire()
    clock.now += 0.2
    assert expired(rig.scheduler) == {"long"}
    assert rig.pool.num_used == 0


def test_the_first_token_meets_the_deadline_for_it(rig: Rig, clock: Clock):
    rig.scheduler.add(timed("quick", ttft_deadline=clock.now + 1))
    rig.step()
    clock.now += 60
    assert not rig.scheduler.expire()
    rig.drain()
    assert rig.reasons["quick", 0] == "length"


def test_who_cannot_have_its_turn_in_time_is_given_up_early(rig: Rig, clock: Clock):
    """The queue goes on by 4 prompt tokens per second; 40 tokens stand before the last one."""
    rig.scheduler.add(make_request("a", [1] * 4, max_tokens=1))
    for i in range(11):
        rig.scheduler.add(make_request(f"w{i}", [i] * 4, max_tokens=1))
    rig.scheduler.add(timed("soon", ttft_deadline=clock.now + 8))
    rig.scheduler.add(timed("later", ttft_deadline=clock.now + 30))
    rig.step()
    clock.now += 1
    rig.step()
    assert rig.scheduler._deadlines.rate.per_second(clock.now) == 8
    assert not rig.scheduler.expire(), "40 tokens at 8 a second are 5 s of the 7 that are left"
    clock.now += 1
    assert expired(rig.scheduler) == {"soon"}, "40 tokens at 4 a second"
    rig.drain()
    assert rig.reasons["later", 0] == "length"


def test_without_deadlines_nothing_is_looked_at(rig: Rig):
    rig.scheduler.add(make_request("a", [1]))
    rig.scheduler.waiting = None  # type: ignore[assignment]  # looking at it would raise
    assert rig.scheduler.expire() == []
