"""Rounds of both loops, against a server that says exactly what the test tells it to."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from benchmarks.dialect import Dialect
from benchmarks.load import ClosedLoop, OpenLoop, measure, run_round
from benchmarks.sse import BenchError, Client, Reply
from benchmarks.workload import Independent, Lengths
from tests.benchmarks.fake_server import Answering, chunked, completion, plain, serving

WORK = Independent(Dialect("m", vocab_size=10), input=Lengths(3, 3), output=Lengths(5, 5))


def noting(asked: list[dict[str, Any]]) -> Answering:
    """Answers at the length asked for, and notes the bodies."""

    def answer(path: str, body: bytes) -> bytes:
        assert path == "/v1/completions"
        asked.append(json.loads(body))
        return chunked(completion(asked[-1]["max_tokens"]))

    return answer


async def test_a_closed_loop_asks_each_client_in_turn() -> None:
    asked: list[dict[str, Any]] = []
    async with serving(noting(asked)) as client:
        done = await run_round(client, WORK, ClosedLoop(clients=3, requests=2), seed=0)
    assert len(done.answers) == 6 and done.refused == 0
    assert all(one.prompt_tokens == 3 and one.completion_tokens == 5 for one in done.answers)
    assert all(one.sent < one.times[0] <= one.times[-1] for one in done.answers)
    assert len({str(body["prompt"]) for body in asked}) == 6
    assert all(len(body["prompt"]) == 3 for body in asked)
    assert all(body["ignore_eos"] and body["max_tokens"] == 5 for body in asked)
    assert done.seconds >= max(one.times[-1] for one in done.answers) - done.answers[0].sent


async def test_a_server_that_closes_what_it_said_it_keeps() -> None:
    asked: list[dict[str, Any]] = []
    async with serving(noting(asked), hangs_up=True) as client:
        done = await run_round(client, WORK, ClosedLoop(clients=2, requests=4), seed=0)
    assert len(done.answers) == len(asked) == 8


async def test_no_more_at_once_than_clients() -> None:
    running, most = 0, 0

    class Counting(Client):
        async def post(self, path: str, body: dict[str, Any]) -> Reply:
            nonlocal running, most
            running, most = running + 1, max(most, running + 1)
            await asyncio.sleep(0)
            running -= 1
            return Reply(0, 200, [completion(5)[1].encode()], [1])

        async def open(self, count: int) -> None:
            assert count in (1, 2)

    client = Counting("http://x")
    loose = Independent(Dialect("m", ignore_eos=False), WORK.input, WORK.output)
    for loop in (ClosedLoop(2, 5), OpenLoop(1e6, 10, max_concurrency=2)):
        most = 0
        assert len((await run_round(client, loose, loop, seed=0)).answers) == 10
        assert most == 2
    await run_round(client, loose, OpenLoop(1e9, 10), seed=0)
    assert most > 2


async def test_lengths_and_arrivals_are_the_seed_s_and_prompts_are_new() -> None:
    asked: list[dict[str, Any]] = []
    work = Independent(Dialect("m", vocab_size=1000), Lengths(5, 50), Lengths(1, 9))
    loop = ClosedLoop(1, 8)
    async with serving(noting(asked)) as client:
        for seed in (7, 7, 8):
            await run_round(client, work, loop, seed)
    rounds = [asked[at : at + 8] for at in (0, 8, 16)]
    lengths = [[(len(b["prompt"]), b["max_tokens"]) for b in bodies] for bodies in rounds]
    assert lengths[0] == lengths[1] != lengths[2]
    assert all(5 <= into <= 50 and 1 <= out <= 9 for into, out in lengths[0])
    assert [b["prompt"] for b in rounds[0]] != [b["prompt"] for b in rounds[1]]


def test_arrivals_are_a_poisson_process() -> None:
    loop = OpenLoop(rate=20, arrivals=10_000)
    times = loop.times(random.Random(1))
    assert times == loop.times(random.Random(1)) != loop.times(random.Random(2))
    assert times == sorted(times) and times[-1] == pytest.approx(10_000 / 20, rel=0.05)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    longer = sum(gap > 1 / 20 for gap in gaps) / len(gaps)
    assert longer == pytest.approx(0.368, abs=0.02)  # 1 / e


async def test_an_open_loop_sends_when_due_and_goes_on_after_a_refusal() -> None:
    count = 0

    def answer(path: str, body: bytes) -> bytes:
        nonlocal count
        count += 1
        return plain(503, {"error": "full"}) if count % 3 == 0 else chunked(completion(5))

    loop = OpenLoop(rate=500, arrivals=9)
    async with serving(answer) as client:
        done = await run_round(client, WORK, loop, seed=3)
    assert (len(done.answers), done.refused) == (6, 3)
    first, *_, last = sorted(one.due for one in done.answers)
    times = loop.times(shape_after(WORK, 9, seed=3))
    assert any(
        last - first == pytest.approx(late - early) for early in times[:3] for late in times[-3:]
    )
    assert all(one.wait >= 0 for one in done.answers)


def shape_after(work: Independent, count: int, seed: int) -> random.Random:
    """The generator of a round when its lengths are drawn."""
    shape = random.Random(seed)
    work.scripts(count, shape, random.Random())
    return shape


async def test_a_closed_loop_ends_at_a_refusal() -> None:
    async with serving(lambda *_: plain(429, {})) as client:
        with pytest.raises(BenchError, match="status 429"):
            await run_round(client, WORK, ClosedLoop(2), seed=0)


async def test_an_answer_of_another_length_is_refused_unless_any_will_do() -> None:
    async with serving(lambda *_: chunked(completion(4))) as client:
        with pytest.raises(BenchError, match="asked for 5 tokens, got 4"):
            await run_round(client, WORK, ClosedLoop(1), seed=0)
        loose = Independent(Dialect("m", ignore_eos=False), WORK.input, WORK.output)
        done = await run_round(client, loose, ClosedLoop(1), seed=0)
        assert done.answers[0].completion_tokens == 4
    uncounted = [event for event in completion(4) if "prompt_tokens" not in event]
    async with serving(lambda *_: chunked(uncounted)) as client:
        done = await run_round(client, WORK, ClosedLoop(1), seed=0)
    assert not done.answers[0].counted


async def test_a_short_round_comes_first_and_is_not_counted() -> None:
    asked: list[dict[str, Any]] = []
    told: list[None] = []
    async with serving(noting(asked)) as client:
        rounds = await measure(
            client, WORK, ClosedLoop(2, 3), rounds=2, on_answer=lambda: told.append(None)
        )
    assert [body["max_tokens"] for body in asked] == [8] * 2 + [5] * 12
    assert [len(one.answers) for one in rounds] == [6, 6] and len(told) == 12


async def test_each_round_has_the_next_seed() -> None:
    asked: list[dict[str, Any]] = []
    work = Independent(Dialect("m", vocab_size=10), Lengths(1, 50), Lengths(1, 9))
    async with serving(noting(asked)) as client:
        await measure(client, work, ClosedLoop(1, 8), rounds=2, seed=4, warm_up=False)
        await run_round(client, work, ClosedLoop(1, 8), seed=5)
    lengths = [len(body["prompt"]) for body in asked]
    assert lengths[:8] != lengths[8:16] == lengths[16:]


async def test_nobody_there() -> None:
    with pytest.raises(BenchError, match="no server at"):
        await measure(Client("http://127.0.0.1:1"), WORK, ClosedLoop(1))
