"""Helpers of a team: every task once, whoever comes when."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kernels import cpu_team


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_helpers_take_part_and_are_gone_when_it_returns(threads: None) -> None:
    seen: set[int] = set()
    inside = 0
    lock, everybody = threading.Lock(), threading.Event()

    @cpu_team.WORKER
    def work(_: int) -> None:
        nonlocal inside
        with lock:
            inside += 1
            seen.add(threading.get_ident())
        if len(seen) == 3:
            everybody.set()
        assert everybody.wait(30), "a helper did not come"
        with lock:
            inside -= 1

    cpu_team.run(work, np.zeros(1), shares=8)
    assert len(seen) == 3 and inside == 0


def workers_of_a_call(shares: int) -> int:
    """How many threads run a job that is over when two of them are there."""
    count = 0
    lock, two = threading.Lock(), threading.Event()

    @cpu_team.WORKER
    def work(_: int) -> None:
        nonlocal count
        with lock:
            count += 1
            if count == 2:
                two.set()
        assert two.wait(30), "no helper came"

    cpu_team.run(work, np.zeros(1), shares)
    return count


def test_helpers_that_sleep_wake_for_the_next_job(threads: None) -> None:
    for _ in range(5):
        time.sleep(0.05)
        assert workers_of_a_call(shares=2) == 2, "no more threads than shares"


def test_a_late_helper_does_not_hold_anybody_up(threads: None) -> None:
    job = np.zeros(1, np.int64)

    @cpu_team.WORKER
    def quick(place: int) -> None:
        ctypes.c_int64.from_address(place).value += 1

    for _ in range(2000):  # calls that are over before a helper has looked
        cpu_team.run(quick, job, shares=3)
    assert 2000 <= job[0] <= 6000


def test_a_caller_in_the_middle_of_another_works_alone(threads: None) -> None:
    order: list[str] = []

    @cpu_team.WORKER
    def inner(_: int) -> None:
        order.append("inner")

    @cpu_team.WORKER
    def outer(_: int) -> None:
        if threading.current_thread() is threading.main_thread():
            cpu_team.run(inner, np.zeros(1), shares=2)
            order.append("outer")

    cpu_team.run(outer, np.zeros(1), shares=2)
    assert order == ["inner", "outer"]
