"""The ring buffer of steps, on a real scheduler with a device that only counts."""

from __future__ import annotations

import asyncio
import itertools
from array import array

import msgspec
import pytest

from engine.client import InprocEngine
from engine.loop import EngineLoop
from engine.protocol import FromEngine, Submit, Trace, TraceView
from engine.step_trace import StepTrace
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.plan import StepPlan, StepResult
from scheduler.scheduler import Scheduler
from tests.engine.test_loop import INFO
from tests.scheduler.fake_device import FakeDevice, make_request


class Broken(FakeDevice):
    def run(self, plan: StepPlan) -> StepResult:
        raise ValueError("a kernel failed")


def traced(keep: int = 100, blocks: int = 32, device: type[FakeDevice] = FakeDevice) -> EngineLoop:
    """A loop whose trace has a clock that counts: each look at it is one second later."""
    ticks = itertools.count(1)
    trace = StepTrace(keep, 4, clock=lambda: float(next(ticks)))
    scheduler = Scheduler(
        KVCacheManager(BlockPool(blocks), 4),
        max_num_seqs=4,
        max_num_batched_tokens=32,
        journal=trace,
    )
    return EngineLoop(scheduler, device(4, 4), INFO, trace)


def finish(loop: EngineLoop) -> None:
    while loop.scheduler.has_work:
        loop.step()


def read(loop: EngineLoop) -> TraceView:
    """The view as the front door gets it."""
    assert loop._trace is not None
    wire = msgspec.msgpack.encode(Trace(0, loop._trace.view()))
    message = msgspec.msgpack.decode(wire, type=FromEngine)
    assert isinstance(message, Trace)
    return message.view


def shares(packed: bytes) -> list[tuple[int, int, int]]:
    """(slot, start, count) of a step."""
    numbers = array("i")
    numbers.frombytes(packed)
    third = len(numbers) // 3
    return list(zip(numbers[:third], numbers[third : 2 * third], numbers[2 * third :], strict=True))


def test_who_ran_how_many_tokens() -> None:
    loop = traced()
    loop.take(Submit([make_request("a", list(range(40)), max_tokens=2)]))
    finish(loop)
    view = read(loop)
    # 32 of 40 prompt tokens, the other 8 with the first token of the answer, then the second.
    assert [shares(record.shares) for record in view.steps] == [
        [(0, 0, -32)],
        [(0, 32, 8)],
        [(0, 40, 1)],
    ]
    assert [record.step for record in view.steps] == [0, 1, 2]
    for record in view.steps:
        assert 0 < record.began < record.planned < record.ended
    assert (view.steps[0].running, view.steps[0].waiting, view.steps[0].blocks_used) == (1, 0, 10)
    life = view.requests["a"]
    assert (life.prompt_tokens, life.unfinished) == (40, 1)
    assert life.queued < view.steps[0].began


def test_decisions_stand_in_their_step() -> None:
    loop = traced(blocks=4)
    loop.take(Submit([make_request(name, [ord(name)] * 7, max_tokens=8) for name in "ab"]))
    finish(loop)
    told = [
        (place, d.kind, d.request_id, d.detail, d.number)
        for place, record in enumerate(read(loop).steps)
        for d in record.decisions
        if d.kind != "waits"
    ]
    assert told == [
        (0, "admitted", "a", "", 0),
        (0, "admitted", "b", "", 0),
        (2, "preempted", "b", "a", 0),
        (7, "finished", "a", "length", 8),
        (8, "admitted", "b", "", 0),
        (13, "finished", "b", "length", 8),
    ]
    waits = [[d.detail for d in r.decisions if d.kind == "waits"] for r in read(loop).steps[2:9]]
    assert waits == [["preemption"], *([["no blocks"]] * 5), []]


def test_slots_of_forgotten_steps_are_known() -> None:
    loop = traced(keep=3)
    loop.take(Submit([make_request(name, [1, 2], max_tokens=9) for name in "ab"]))
    finish(loop)
    view = read(loop)
    assert [record.step for record in view.steps] == [6, 7, 8]
    assert [user and user.request_id for user in view.slots] == ["a", "b", None, None]
    assert set(view.requests) == {"a", "b"}


def test_memory_is_bounded() -> None:
    loop = traced(keep=5)
    for number in range(50):
        loop.take(Submit([make_request(f"r{number}", [1, 2], max_tokens=2, n=2)]))
        finish(loop)
    view = read(loop)
    assert len(view.steps) == 5
    assert len(view.requests) <= 3
    assert "r49" in view.requests


def test_a_request_that_ends_before_any_step() -> None:
    loop = traced(keep=1)
    loop.take(Submit([make_request("a", [1])]))
    loop.scheduler.abort("a")
    assert "a" in read(loop).requests
    for _ in range(2):
        loop.take(Submit([make_request("b", [1], max_tokens=1)]))
        finish(loop)
    assert list(read(loop).requests) == ["b"]


def test_a_failed_step_says_so() -> None:
    loop = traced(device=Broken)
    loop.take(Submit([make_request("a", [1, 2])]))
    loop.step()
    [record] = read(loop).steps
    assert record.failed
    assert [(d.kind, d.detail) for d in record.decisions][-1] == ("finished", "error")


@pytest.mark.parametrize("on", [True, False])
async def test_the_client_reads_it(on: bool) -> None:
    loop = traced()
    if not on:
        loop = EngineLoop(loop.scheduler, loop.runner, INFO)
    engine = InprocEngine(loop)
    stream = await engine.submit(make_request("a", [1, 2, 3], max_tokens=3))
    await stream.each(lambda delta: False)
    view = await asyncio.wait_for(engine.trace(), 10)
    assert (view.keep, len(view.steps)) == ((100, 3) if on else (0, 0))
    await engine.close()


def test_a_receipt_tells_when_the_sequence_gave_way() -> None:
    loop = traced(blocks=4)
    loop.take(Submit([make_request(name, [ord(name)] * 7, max_tokens=8) for name in "ab"]))
    finish(loop)
    receipts = {d.request_id: d.receipt for d in loop.collect().deltas if d.receipt is not None}
    assert receipts["a"].preempted_at == []
    [moment] = receipts["b"].preempted_at
    assert 0 < moment < receipts["b"].queue + receipts["b"].prefill + receipts["b"].decode
