"""Random histories of the scheduler, its tables and the pool, checked after every step."""

import os
from collections import Counter, deque
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from paged_cache.host_tier import HostTier
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.plan import StepPlan, StepResult
from scheduler.preemption import Preemption, PreemptionMode
from scheduler.request import InvalidRequest, Request
from scheduler.scheduler import Progress, Scheduler
from scheduler.sequence import Sequence
from tests.scheduler.fake_device import FakeDevice, FakeDisk, expected, make_request

EOS = frozenset({0, 1, 2})
STEPS = int(os.environ.get("TEST_STEPS", "50000"))
SEED = int(os.environ.get("TEST_SEED", "0"))
SHARDS = 5
STEPS_PER_RUN = 60


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, aborts, plans, commits and restarts in any order, with up to two plans in flight."""

    rules_run = 0
    seen: ClassVar[Counter[str]] = Counter()  # so that no part of it is left out by bad luck

    @initialize(
        blocks=st.integers(2, 40),
        block_size=st.sampled_from([1, 2, 4, 16]),
        slots=st.integers(1, 6),
        budget=st.integers(1, 24),
        windows=st.sampled_from([(0,), (0,), (5,), (0, 7), (4, 0, 4), (3, 9)]),
        prefix_cache=st.sampled_from([True, True, True, False]),
        isolated=st.booleans(),
        watermark=st.sampled_from([0, 0, 1, 5]),
        reserve=st.sampled_from([False, False, False, True]),
        host_slots=st.sampled_from([0, 1, 3, 8, 30, 30]),
        preemption=st.sampled_from(["recompute", "swap", "swap"]),
        disk_blocks=st.sampled_from([0, 2, 100, 100]),
        disk_delay=st.integers(0, 3),
        disk_broken=st.sampled_from([0, 0, 5]),
    )
    def start(
        self,
        blocks: int,
        block_size: int,
        slots: int,
        budget: int,
        windows: tuple[int, ...],
        prefix_cache: bool,
        isolated: bool,
        watermark: int,
        reserve: bool,
        host_slots: int,
        preemption: PreemptionMode,
        disk_blocks: int,
        disk_delay: int,
        disk_broken: int,
    ) -> None:
        disk = FakeDisk(disk_blocks, disk_delay, disk_broken)
        self.disk = disk if disk_blocks and host_slots and prefix_cache else None

        def boot() -> None:
            """Everything but the disk is as new."""
            self.pool = BlockPool(blocks)
            self.host = HostTier(host_slots, keep=prefix_cache)
            cache = KVCacheManager(
                self.pool,
                block_size,
                windows,
                prefix_cache=prefix_cache,
                isolate_tenants=isolated,
                host=self.host,
                disk=self.disk,
                hash_key=bytes(32),
            )
            self.scheduler = Scheduler(
                cache,
                max_num_seqs=slots,
                max_num_batched_tokens=budget,
                eos_token_ids=EOS,
                watermark=watermark,
                reserve=reserve,
                preemption=Preemption(preemption),
            )
            self.device = FakeDevice(slots, block_size, windows, self.disk)

        self.boot = boot
        self.boot()
        self.in_flight: deque[StepResult] = deque()
        self.requests: dict[str, Request] = {}
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.scores: dict[tuple[str, int], list[float]] = {}
        self.counts: dict[Sequence, int] = {}  # tokens of each one's latest step

    @rule(
        shared=st.integers(0, 40),
        own=st.lists(st.integers(0, 96), min_size=1, max_size=20),
        max_tokens=st.integers(0, 30),
        n=st.integers(1, 3),
        temperature=st.sampled_from([0.0, 1.0]),
        ignore_eos=st.booleans(),
        salt=st.sampled_from(["", "", "other"]),
        tenant=st.sampled_from(["", "t1", "t2"]),
        priority=st.sampled_from([0, 0, -1, 5]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(
        self,
        shared: int,
        own: list[int],
        max_tokens: int,
        n: int,
        temperature: float,
        ignore_eos: bool,
        salt: str,
        tenant: str,
        priority: int,
        prompt_logprobs: int | None,
    ) -> None:
        name = f"r{len(self.requests)}"
        prompt = [*range(shared), *own]
        options = {"temperature": temperature, "ignore_eos": ignore_eos}
        options["prompt_logprobs"] = prompt_logprobs
        request = make_request(name, prompt, max_tokens, n, salt, tenant, priority, **options)
        cache = self.scheduler.cache
        length = len(prompt) + max(max_tokens, 1) - 1
        try:
            self.scheduler.add(request)
        except InvalidRequest:
            chunk = self.scheduler.max_num_batched_tokens
            assert cache.most_blocks(length, chunk) > self.pool.num_blocks
        else:
            self.requests[name] = request

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule()
    def plan(self) -> None:
        scheduler = self.scheduler
        idle = not scheduler.has_work
        before = {seq: seq.num_preemptions for seq in scheduler.running}
        plan = scheduler.schedule()
        assert plan.num_tokens <= scheduler.max_num_batched_tokens
        assert not idle or not plan.scheduled
        slots = {seq.slot: seq for seq in scheduler.running}
        self.counts |= {slots[item.slot]: item.count for item in plan.scheduled}
        self.gave_way_in_turn(before)
        self.in_flight.append(self.device.run(plan))

    def gave_way_in_turn(self, before: dict[Sequence, int]) -> None:
        """The first in rank kept its blocks, and nobody lost its own while another of the same or a
        worse priority, who had lost them less often, kept theirs."""
        lost = [seq for seq, times in before.items() if seq.num_preemptions > times]
        first, *others = sorted(before, key=lambda seq: seq.rank) or [None]
        assert first not in lost or not others

        def turn(seq: Sequence) -> tuple[int, int]:
            return -seq.request.priority, before[seq]

        spared = [turn(seq) for seq in others if seq not in lost]
        assert not lost or not spared or max(map(turn, lost)) <= min(spared)
        assert not lost or not self.scheduler.reserve

    @precondition(lambda self: self.in_flight)
    @rule()
    def commit(self) -> None:
        self.take(self.scheduler.commit(self.in_flight.popleft()))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        index = data.draw(st.sampled_from([None, *range(self.requests[name].n)]))
        self.take(self.scheduler.abort(name, index=index))

    @precondition(lambda self: not self.in_flight and self.scheduler.running)
    @rule()
    def fail(self) -> None:
        plan: StepPlan = self.scheduler.schedule()
        for item in self.scheduler.fail(plan):
            self.reasons[item.seq.request.id, item.seq.index] = "error"

    @precondition(lambda self: self.disk and self.disk.num_blocks)
    @rule()
    def restart(self) -> None:
        for name in self.requests:
            self.take(self.scheduler.abort(name))
        self.in_flight.clear()
        self.tally()
        assert self.disk is not None
        self.disk.reading.clear()
        self.disk.loaded.clear()
        self.boot()

    def take(self, progress: list[Progress]) -> None:
        for item in progress:
            key = (item.seq.request.id, item.seq.index)
            assert key not in self.reasons, "a finished sequence went on"
            self.answers.setdefault(key, []).extend(item.tokens)
            if item.prompt_scores is not None:
                self.scores.setdefault(key, []).extend(item.prompt_scores.logprobs)
            if item.finish_reason:
                self.reasons[key] = item.finish_reason

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            type(self).rules_run += 1
            self.scheduler.check()
            assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks
            if self.scheduler.reserve:
                assert not self.scheduler.num_preemptions
            self.windows_hold_little()

    def windows_hold_little(self) -> None:
        """Between two steps a sequence holds less than its window and two blocks in a sliding
        group, and while it reads its prompt, the further tokens of its last chunk."""
        cache = self.scheduler.cache
        for seq in self.scheduler.running:
            for window, table in zip(cache.windows, seq.blocks.tables, strict=True):
                held = len(table.held) * cache.block_size
                limit = window + self.counts[seq] - 1 + 2 * cache.block_size
                assert not window or held < limit

    def tally(self) -> None:
        tiers = self.scheduler.cache.tiers
        self.seen["preemptions"] += self.scheduler.num_preemptions
        self.seen["hits"] += self.scheduler.prefix.hits
        self.seen["recovered"] += self.scheduler.prefix.recovered
        self.seen["evicted"] += self.pool.num_evicted
        self.seen["swapped"] += self.scheduler.preemption.num_swapped
        self.seen["host hits"] += tiers.host_hits
        self.seen["disk hits"] += tiers.disk_hits
        self.seen.update(self.device.copied)

    def teardown(self) -> None:
        """Everything admitted finishes, with the tokens that it would have had alone."""
        if not hasattr(self, "scheduler"):
            return
        while self.in_flight:
            self.commit()
        for _ in range(100_000):
            if not self.scheduler.has_work:
                break
            self.take(self.scheduler.commit(self.device.run(self.scheduler.schedule())))
        assert not self.scheduler.has_work
        assert self.pool.num_used == 0
        self.tally()
        assert len(self.scheduler._free_slots) == len(self.device.tokens)
        for name, request in self.requests.items():
            for index in range(request.n):
                whole = expected(request, index, EOS)
                answer = self.answers.get((name, index), [])
                assert answer == whole[: len(answer)]
                if self.reasons[name, index] in ("stop", "length"):
                    assert answer == whole
                    asked = request.sampling.prompt_logprobs is not None and index == 0
                    every = range(len(request.prompt_ids) - 1 if asked else 0)
                    assert self.scores.get((name, index), []) == list(every)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_histories(shard: int):
    steps = STEPS // SHARDS
    machine = type(f"Shard{shard}", (SchedulerMachine,), {"rules_run": 0, "seen": Counter()})
    profile = settings(
        max_examples=-(-steps // STEPS_PER_RUN),
        stateful_step_count=STEPS_PER_RUN * 3 // 2,  # the most; hypothesis ends some runs earlier
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    print(f"TEST_SEED={SEED} TEST_STEPS={STEPS}, shard {shard}")
    seeded = seed(SEED + shard)(machine)
    run_state_machine_as_test(seeded, settings=profile)  # type: ignore[no-untyped-call]
    print(f"{machine.rules_run} operations, {dict(machine.seen)}")
    assert machine.rules_run >= steps
    assert min(machine.seen.values()) >= steps // 5000, machine.seen
