"""The overlapped loop gives everybody what the plain one gives, a step later at most."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.loop import EngineLoop
from engine.protocol import Abort, Submit, TokenDelta
from models import embedded
from paged_cache.host_tier import HostTier
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.plan import StepPlan, StepResult
from scheduler.preemption import Preemption
from scheduler.request import Grammar, Request
from scheduler.scheduler import Scheduler
from tests.engine.drive import engine
from tests.engine.drive import request as model_request
from tests.engine.guests import CONTEXT, Alone, Guest, Menu, assert_as_alone, checkpoint, serve
from tests.engine.test_loop import INFO
from tests.scheduler.fake_device import FakeDevice, expected, make_request

EOS = frozenset({0, 1, 2})


class Device(FakeDevice):
    """Counts steps whose results nobody has read; fails where it is told to.

    Attributes:
        most_unread: the largest count so far.
        launches, results: numbers of the steps whose launch, or whose result, raises.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.unread = self.most_unread = self.launched = 0
        self.launches: set[int] = set()
        self.results: set[int] = set()

    def launch(self, plan: StepPlan) -> Unread:  # type: ignore[override]
        number, self.launched = self.launched, self.launched + 1
        if number in self.launches:
            raise ValueError("it cannot be launched")
        self.unread += 1
        self.most_unread = max(self.most_unread, self.unread)
        return Unread(self, number, self.run(plan))


@dataclass(frozen=True)
class Unread:
    device: Device
    number: int
    of_plan: StepResult

    def result(self) -> StepResult:
        self.device.unread -= 1
        if self.number in self.device.results:
            raise ValueError("it failed on the device")
        return self.of_plan


@dataclass
class Run:
    """What became of a history.

    Attributes:
        tokens, reasons, scores: by (request, index); scores are those of the prompt.
        found: what the prefix cache holds at the end.
    """

    loop: EngineLoop
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)
    scores: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert key not in self.reasons, "an ended answer went on"
            self.tokens.setdefault(key, []).extend(delta.tokens)
            if delta.prompt_scores is not None:
                self.scores.setdefault(key, []).extend(delta.prompt_scores.logprobs)
            if delta.finish_reason is not None:
                self.reasons[key] = delta.finish_reason

    @property
    def device(self) -> Device:
        assert isinstance(self.loop.runner, Device)
        return self.loop.runner

    @property
    def found(self) -> set[Any]:
        return {key for key, _ in self.loop.scheduler.cache.cached()}


def make(overlap: bool, blocks: int, windows: tuple[int, ...] = (0,), host: int = 0) -> Run:
    cache = KVCacheManager(
        BlockPool(blocks),
        INFO.block_size,
        windows,
        host=HostTier(host, keep=True),
        hash_key=bytes(32),
    )
    scheduler = Scheduler(
        cache,
        max_num_seqs=INFO.max_num_seqs,
        max_num_batched_tokens=16,
        eos_token_ids=EOS,
        preemption=Preemption("swap" if host else "recompute"),
    )
    device = Device(INFO.max_num_seqs, INFO.block_size, windows)
    return Run(EngineLoop(scheduler, device, INFO, overlap=overlap))


def go(run: Run, coming: dict[int, list[Request]], leaving: dict[int, list[str]]) -> Run:
    """Steps until nothing is left; `coming` and `leaving` say what happens before which step."""
    loop, step = run.loop, 0
    while loop.has_work or step <= max([*coming, *leaving]):
        loop.take(Submit(coming.get(step, [])))
        loop.take(Abort(leaving.get(step, [])))
        if loop.has_work:
            loop.step()
        output, step = loop.collect(), step + 1
        assert not output.refused and not output.failed
        run.take(output.deltas)
        loop.scheduler.check()
    assert loop.scheduler.cache.pool.num_used == 0
    assert not loop.scheduler._planned, "a plan was never committed"
    assert len(loop.scheduler._free_slots) == INFO.max_num_seqs
    return run


def some_requests(draw: random.Random) -> list[Request]:
    return [
        make_request(
            f"r{number}",
            [*range(draw.randrange(20)), *(draw.randrange(97) for _ in range(draw.randint(1, 9)))],
            max_tokens=draw.choice([0, 1, 2, 9, 25]),
            n=draw.choice([1, 1, 1, 3]),
            temperature=draw.choice([0.0, 1.0]),
            ignore_eos=draw.random() < 0.3,
            stop_token_ids=tuple(draw.sample(range(97), draw.choice([0, 8]))),
            priority=draw.choice([0, 0, 3]),
            prompt_logprobs=draw.choice([None, None, 0]),
        )
        for number in range(draw.randint(3, 8))
    ]


@pytest.mark.parametrize("windows", [(0,), (0, 7)])
def test_random_histories(windows: tuple[int, ...]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(150):
        draw = random.Random(seed)
        requests = some_requests(draw)
        coming: dict[int, list[Request]] = {}
        for item in requests:
            coming.setdefault(draw.randrange(12), []).append(item)
        gone = [item.id for item in requests if draw.random() < 0.15]
        leaving = {draw.randrange(3, 20): [name] for name in gone}
        gone = [name for names in leaving.values() for name in names]
        blocks, host = draw.choice([13, 15, 200]) + 7 * (len(windows) - 1), draw.choice([0, 30])
        plain = go(make(False, blocks, windows, host), coming, leaving)
        overlapped = go(make(True, blocks, windows, host), coming, leaving)
        for item in requests:
            for key in [(item.id, index) for index in range(item.n)]:
                whole = expected(item, key[1], EOS)
                told = overlapped.tokens[key]
                if overlapped.reasons[key] == "abort":
                    assert item.id in gone and told == whole[: len(told)]
                    continue
                assert told == whole
                if item.id not in gone:
                    assert overlapped.reasons[key] == plain.reasons[key]
                assert overlapped.scores.get(key, []) == plain.scores.get(key, [])
        if blocks >= 200 and not gone:
            assert overlapped.found == plain.found
            seen["cached"] += len(plain.found)
        assert (plain.device.most_unread, overlapped.device.most_unread) == (1, 2)
        surplus = overlapped.device.computed > plain.device.computed
        seen.update(overlapped.reasons.values(), surplus=surplus)
        seen.update(preemptions=overlapped.loop.scheduler.num_preemptions)
        seen.update(swaps=overlapped.loop.scheduler.preemption.num_swapped)
    least = ("stop", "length", "abort", "preemptions", "swaps", "cached", "surplus")
    assert all(seen[what] > 10 for what in least), seen


def test_a_token_is_read_while_the_next_step_is_on_its_way() -> None:
    run = make(True, 40)
    loop, device = run.loop, run.device
    loop.take(Submit([endless("a", [1, 2, 3], 3)]))
    told = []
    while loop.has_work:
        loop.step()
        told.append((device.launched, [t for d in loop.collect().deltas for t in d.tokens]))
    assert [launched for launched, _ in told] == [1, 2, 3, 3], "the end at max_tokens is foreseen"
    assert [len(tokens) for _, tokens in told] == [0, 1, 1, 1]


def test_an_end_that_only_the_token_tells_is_noticed_one_step_late() -> None:
    requests = [make_request(f"r{i}", [i], max_tokens=30) for i in range(90)]
    early = next(item for item in requests if 2 < len(expected(item, 0, EOS)) < 20)
    run = go(make(True, 40), {0: [early]}, {})
    assert run.tokens == {(early.id, 0): expected(early, 0, EOS)}
    assert run.device.computed == 1 + len(run.tokens[early.id, 0]), "the last one was for nothing"


def endless(name: str, prompt: list[int], max_tokens: int) -> Request:
    return make_request(name, prompt, max_tokens, ignore_eos=True)


def broken_run(launches: set[int], results: set[int], late: int = 4) -> tuple[Run, set[str]]:
    """Two requests, of which "short" ends with the first step, and two that come before steps
    `late` and 9."""
    run = make(True, 40)
    run.device.launches, run.device.results = launches, results
    first = [endless("short", [1], 1), endless("long", [2], 9)]
    coming = {0: first, late: [endless("late", [4, 5], 3)], 9: [endless("last", [6], 3)]}
    failed: set[str] = set()
    for step in range(20):
        run.loop.take(Submit(coming.get(step, [])))
        if run.loop.has_work:
            run.loop.step()
        output = run.loop.collect()
        failed |= {failure.request_id for failure in output.failed}
        run.take(output.deltas)
        run.loop.scheduler.check()
    assert not run.loop.has_work
    assert run.loop.scheduler.cache.pool.num_used == 0
    assert run.reasons["short", 0] == run.reasons["last", 0] == "length"
    return run, failed


def test_a_launch_that_raises_spares_the_step_before_it() -> None:
    run, failed = broken_run({1}, set())
    assert failed == {"long"}
    assert len(run.tokens["late", 0]) == 3


def test_a_result_that_raises_takes_the_step_after_it_along() -> None:
    run, failed = broken_run(set(), {1})
    assert failed == {"long"}
    assert len(run.tokens["late", 0]) == 3
    _, failed = broken_run(set(), {1}, late=2)
    assert failed == {"long", "late"}, "it began in a step that may read what the broken one wrote"


def test_a_failed_step_ends_who_was_preempted_beside_it() -> None:
    """Its token is lost, so it cannot go on either."""
    run = make(True, 5)
    run.device.results = {1}
    run.loop.take(Submit([endless("a", [1] * 7, 9), endless("b", [2] * 7, 9)]))
    failed: set[str] = set()
    while run.loop.has_work:
        run.loop.step()
        failed |= {failure.request_id for failure in run.loop.collect().failed}
        run.loop.scheduler.check()
    assert run.loop.scheduler.num_preemptions == 1
    assert failed == {"a", "b"}


def test_deadlines_end_a_request_whose_token_is_pending() -> None:
    now = 0.0
    run = make(True, 40)
    run.loop.scheduler._clock = lambda: now
    late = msgspec.structs.replace(endless("late", [1], 20), deadline=5.0)
    run.loop.take(Submit([late, endless("b", [3], 6)]))
    failures = []
    for _ in range(12):
        if run.loop.has_work:
            run.loop.step()
        output = run.loop.collect()
        failures += [(failure.request_id, failure.code) for failure in output.failed]
        run.take(output.deltas)
        run.loop.scheduler.check()
        now += 2.0
    assert failures == [("late", "deadline_exceeded")]
    assert len(run.tokens["b", 0]) == 6 and len(run.tokens["late", 0]) < 6


# ---------------------------------------------------------------------- a real model


@pytest.mark.parametrize("windows", [False, True])
def test_a_crowd_gets_what_each_gets_alone(windows: bool, tmp_path: Path) -> None:
    alone = Alone(checkpoint(windows, tmp_path), "auto")
    seen: Counter[str] = Counter()
    menu = Menu(n=(1, 1, 3), salts=("", "", "other"), stops=True)
    for seed in range(8):
        draw = random.Random(f"overlap {windows} {seed}")
        loop = engine(
            alone.path,
            async_scheduling="on",
            max_model_len=CONTEXT,
            num_gpu_blocks_override=draw.randint(26, 60) if windows else draw.randint(12, 24),
            max_num_seqs=draw.randint(3, 8),
            max_num_batched_tokens=draw.choice([16, 200]),
            **draw.choice([{}, {"host_kv_bytes": "2MiB", "preemption": "swap"}]),
        )
        guests = [
            Guest(
                menu.request(draw.randrange(40), f"g{i}"),
                comes=draw.randrange(20),
                leaves=30 if draw.random() < 0.2 else None,
            )
            for i in range(8)
        ]
        told = serve(loop, guests, preempt_every=draw.choice([0, 5]))
        assert_as_alone(told, guests, alone)
        seen.update(reason for _, reason in told.values())
        seen.update(preemptions=loop.scheduler.num_preemptions, hits=loop.scheduler.prefix.hits)
    assert min(seen[what] for what in ("stop", "length", "preemptions", "hits")) > 3, seen


def told_of(loop: EngineLoop, requests: list[Request]) -> dict[tuple[str, int], list[TokenDelta]]:
    loop.take(Submit(requests))
    told: dict[tuple[str, int], list[TokenDelta]] = {}
    while loop.has_work:
        loop.step()
        output = loop.collect()
        assert not output.refused and not output.failed
        for delta in output.deltas:
            told.setdefault((delta.request_id, delta.index), []).append(delta)
    return told


def test_log_probabilities_usage_and_grammars_are_the_plain_loop_s() -> None:
    path = embedded.path()
    held = {
        "temperature": 1.0,
        "ignore_eos": False,
        "max_tokens": 30,
        "grammar": Grammar("regex", "(ab|ba){2,9}", ""),
    }
    requests = [
        model_request("top", range(40, 90), logprobs=3, prompt_logprobs=2, max_tokens=6),
        model_request("min", range(40, 70), min_tokens=5, max_tokens=9, ignore_eos=False),
        model_request("ruled", range(50, 80), temperature=1.0, repetition_penalty=1.3, logprobs=0),
        *(model_request(f"held{i}", range(60, 75 + i), seed=i, **held) for i in range(4)),
    ]
    options = {"max_model_len": 256, "num_gpu_blocks_override": 60}
    want = told_of(engine(path, async_scheduling="off", **options), requests)
    got = told_of(engine(path, async_scheduling="on", **options), requests)
    assert got.keys() == want.keys()
    for key, deltas in want.items():
        assert [msgspec.structs.replace(delta, receipt=None) for delta in got[key]] == [
            msgspec.structs.replace(delta, receipt=None) for delta in deltas
        ]
    assert {want[f"held{i}", 0][-1].finish_reason for i in range(4)} == {"stop"}
