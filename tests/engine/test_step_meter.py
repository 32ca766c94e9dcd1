"""Times of steps, empty places in blocks, and compilations that nobody expected."""

import itertools
import sys

import pytest

from engine.fragmentation import INTERVAL, Fragmentation
from engine.jit_compiles import JitCompiles
from engine.protocol import Submit
from engine.step_meter import StepMeter
from tests.engine.test_loop import make, run
from tests.scheduler.fake_device import make_request


def test_a_step_and_the_scheduler_s_part_of_it():
    clock = iter([1.0, 1.5, 4.5, 4.75])
    meter = StepMeter(lambda: next(clock))
    meter.begin()
    meter.planned()
    assert meter.computed() == 3.0
    report = meter.ended(7)
    assert (report.tokens, report.seconds, report.scheduler_seconds) == (7, 3.75, 0.75)


def test_the_loop_reports_each_step_that_computes():
    outputs = run(make(), [Submit([make_request("a", [1, 2, 3], max_tokens=3)])])
    assert [o.step.tokens for o in outputs if o.step] == [3, 1, 1]


def test_a_failed_step_is_not_reported():
    loop = make()
    loop.runner.broken = {1}
    outputs = run(loop, [Submit([make_request("a", [1, 2])])])
    assert [o.step is not None for o in outputs] == [True, False]


def test_fragmentation_is_the_share_of_empty_places():
    now = 0.0
    loop = make()
    measured = Fragmentation(loop.scheduler, lambda: now)
    loop.take(Submit([make_request("a", [1] * 5, max_tokens=9), make_request("b", [2] * 4)]))
    loop.step()  # 5 tokens in 2 blocks of 4, 4 tokens in one
    assert measured.measure() == 3 / 12
    loop.step()  # b took a second block
    assert measured.measure() == 3 / 12, "it was measured again at once"
    now += INTERVAL
    assert measured.measure() == (2 + 3) / 16
    while loop.scheduler.has_work:
        loop.step()
    assert measured.measure() == 0


def test_numba_s_compilations_are_counted():
    numba = pytest.importorskip("numba")
    compiles = JitCompiles().watch()
    double = numba.njit(lambda x: x * 2)
    assert (double(1), double(2)) == (2, 4)
    first = compiles.count
    assert first > 0
    assert double(1.5) == 3.0
    assert compiles.count > first


def test_triton_s_compilations_are_counted_but_not_what_it_finds_on_disk():
    triton = pytest.importorskip("triton")
    assert "triton" in sys.modules
    before = triton.knobs.compilation.listener
    try:
        compiles = JitCompiles().watch()
        told = triton.knobs.compilation.listener
        for cache_hit in itertools.islice(itertools.cycle([True, False]), 4):
            told(src=None, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)
        assert compiles.count == 2
    finally:
        triton.knobs.compilation.listener = before
