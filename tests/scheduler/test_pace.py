"""How much of prompts is read beside decodes, on a device whose steps take a known time."""

from __future__ import annotations

import pytest

from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.pace import LEAST, Pace
from scheduler.plan import ScheduledSeq, StepPlan
from scheduler.scheduler import Scheduler
from tests.scheduler.fake_device import FakeDevice, make_request

DECODE, PROMPT = 0.0005, 0.0001  # seconds per sequence and per token of a prompt, beside BASE
BASE = 0.004


def plan(decodes: int, prompt: int = 0) -> StepPlan:
    counts = [1] * decodes + [prompt] * (prompt > 0)
    return StepPlan(0, scheduled=[ScheduledSeq(i, 0, c, True) for i, c in enumerate(counts)])


def seconds_of(plan: StepPlan) -> float:
    counts = [item.count for item in plan.scheduled]
    decodes = counts.count(1)
    return BASE + DECODE * decodes + PROMPT * (sum(counts) - decodes)


def measured(stretch: float) -> Pace:
    pace = Pace(stretch)
    for decodes, prompt in ((16, 0), (1, 0), (16, 100)):
        step = plan(decodes, prompt)
        pace.observe(step, seconds_of(step))
    return pace


def test_prompts_get_a_part_of_a_decode_step() -> None:
    assert measured(1.5).room(16, 1) == pytest.approx(0.5 * 0.012 / PROMPT, abs=1)
    assert measured(3.0).room(16, 1) == pytest.approx(2 * 0.012 / PROMPT, abs=1)


def test_where_more_wait_for_a_first_token_they_get_more() -> None:
    assert measured(1.5).room(16, 32) == pytest.approx(2 * 0.012 / PROMPT, abs=1)
    assert measured(1.5).room(1, 15) == pytest.approx(15 * 0.0045 / PROMPT, abs=1)


def test_a_batch_never_seen_counts_as_the_most_similar() -> None:
    pace = measured(2.0)
    assert pace.room(20, 1) == pace.room(16, 1), "both have 5 bits"
    assert pace.room(64, 1) == pace.room(16, 1)
    assert pace.room(2, 1) == pace.room(1, 1)


def test_prompts_always_go_on() -> None:
    assert Pace(1.5).room(16, 1) == LEAST, "nothing was measured"
    assert measured(1.001).room(16, 1) == LEAST


def test_times_that_no_clock_should_tell_are_passed_over() -> None:
    pace = measured(2.0)
    room = pace.room(16, 1)
    pace.observe(plan(16), 0.0)
    pace.observe(plan(3), 0.0)
    pace.observe(plan(16, 50), 0.001)  # less than the decodes alone
    assert pace.room(16, 1) == room
    assert pace.room(3, 1) > 0


@pytest.mark.parametrize("stretch", [0.0, 1.5])
def test_a_long_prompt_among_decodes(stretch: float) -> None:
    """The steps of 16 sequences that decode while a prompt of 1,000 tokens comes."""
    cache = KVCacheManager(BlockPool(400), 16, (0,))
    scheduler = Scheduler(cache, max_num_seqs=32, max_num_batched_tokens=2048, pace=Pace(stretch))
    device, times = FakeDevice(32, 16), []

    def step() -> None:
        plan = scheduler.schedule()
        seconds = seconds_of(plan)
        scheduler.commit(device.run(plan))
        scheduler.pace.observe(plan, seconds)
        times.append(seconds)

    for i in range(16):
        scheduler.add(make_request(f"r{i}", [i, 1, 2], max_tokens=200))
    for _ in range(20):
        step()
    scheduler.add(make_request("long", list(range(1000)), max_tokens=2))
    times.clear()
    while any(seq.request.id == "long" for seq in (*scheduler.running, *scheduler.waiting)):
        step()
        scheduler.check()
    if not stretch:
        assert len(times) == 2
        assert times[0] == pytest.approx(0.112), "all at once"
        return
    assert max(times) <= 1.6 * 0.012
    assert len(times) == pytest.approx(1000 * PROMPT / (0.5 * 0.012), abs=5)
