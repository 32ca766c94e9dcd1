import pytest

from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.request import InvalidRequest
from scheduler.scheduler import Progress, Scheduler
from scheduler.sequence import Status
from tests.scheduler.fake_device import FakeDevice, expected, make_request

EOS = frozenset({0})


class Rig:
    """A scheduler with a fake device behind it."""

    def __init__(
        self,
        blocks=64,
        block_size=4,
        slots=8,
        budget=32,
        eos=frozenset(),
        windows=(0,),
        **policy,
    ):
        cache = KVCacheManager(BlockPool(blocks), block_size, windows)
        self.scheduler = Scheduler(
            cache, max_num_seqs=slots, max_num_batched_tokens=budget, eos_token_ids=eos, **policy
        )
        self.device = FakeDevice(slots, block_size, windows)
        self.pool = cache.pool
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}

    def step(self):
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        self.take(self.scheduler.commit(self.device.run(plan)))
        self.scheduler.check()
        return plan

    def take(self, progress: list[Progress]):
        for item in progress:
            key = (item.seq.request.id, item.seq.index)
            self.answers.setdefault(key, []).extend(item.tokens)
            if item.finish_reason:
                self.reasons[key] = item.finish_reason

    def drain(self, limit=10_000):
        for _ in range(limit):
            if not self.scheduler.has_work:
                assert self.pool.num_used == 0
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")


def test_one_request_runs_to_its_length():
    rig, request = Rig(), make_request("a", [1, 2, 3], max_tokens=5)
    rig.scheduler.add(request)
    assert [(s.start, s.count) for s in rig.step().scheduled] == [(0, 3)]
    assert [(s.start, s.count) for s in rig.step().scheduled] == [(3, 1)]
    rig.drain()
    assert rig.answers["a", 0] == expected(request, 0, frozenset())
    assert rig.reasons["a", 0] == "length"


def test_prompts_are_read_in_chunks_within_the_budget_behind_decodes():
    rig = Rig(budget=8)
    rig.scheduler.add(make_request("a", [1] * 3, max_tokens=20))
    rig.step()
    rig.scheduler.add(make_request("b", [2] * 20, max_tokens=2))
    chunks = [[(s.slot, s.start, s.count) for s in rig.step().scheduled] for _ in range(4)]
    assert chunks == [
        [(0, 3, 1), (1, 0, 7)],
        [(0, 4, 1), (1, 7, 7)],
        [(0, 5, 1), (1, 14, 6)],
        [(0, 6, 1), (1, 20, 1)],
    ]


def test_admission_is_first_come_first_served():
    """The second prompt does not fit beside the first; the third would, but waits its turn."""
    rig = Rig(blocks=8, block_size=4)
    for name, length in [("a", 16), ("b", 20), ("c", 1)]:
        rig.scheduler.add(make_request(name, [ord(name)] * length, max_tokens=2))
    rig.step()
    assert [s.request.id for s in rig.scheduler.running] == ["a"]
    assert [s.request.id for s in rig.scheduler.waiting] == ["b", "c"]
    rig.drain()


def test_the_newest_is_preempted_and_recomputed():
    rig = Rig(blocks=6, block_size=4, slots=4)
    requests = [make_request(name, [ord(name)] * 6, max_tokens=12) for name in "abc"]
    for request in requests:
        rig.scheduler.add(request)
    rig.step()
    assert len(rig.scheduler.running) == 3
    while not rig.scheduler.num_preemptions:
        rig.step()
    assert [s.request.id for s in rig.scheduler.running] == ["a", "b"]
    assert next(iter(rig.scheduler.waiting)).num_computed == 0
    rig.drain()
    for request in requests:
        assert rig.answers[request.id, 0] == expected(request, 0, frozenset())


def test_the_oldest_is_never_preempted():
    rig = Rig(blocks=5, block_size=2, slots=8, budget=6)
    for i in range(6):
        rig.scheduler.add(make_request(str(i), [i + 1] * 3, max_tokens=7))
    while rig.scheduler.has_work:
        oldest = min(rig.scheduler.running or rig.scheduler.waiting, key=lambda s: s.order)
        before = oldest.num_preemptions, oldest.num_computed
        rig.step()
        assert oldest.num_preemptions == before[0]
        assert oldest.status is Status.FINISHED or oldest.num_computed > before[1]
    assert rig.scheduler.num_preemptions > 0


def test_a_better_priority_starts_first_and_gives_way_last():
    rig = Rig(blocks=9, block_size=2, slots=3, budget=16)
    for name, priority in [("a", 1), ("b", 1), ("c", 0), ("d", 0)]:
        rig.scheduler.add(make_request(name, [ord(name)] * 3, max_tokens=10, priority=priority))
    rig.step()
    assert [seq.request.id for seq in rig.scheduler.running] == ["c", "d", "a"]
    while not rig.scheduler.num_preemptions:
        rig.step()
    assert [seq.request.id for seq in rig.scheduler.running] == ["c", "d"]
    rig.drain()


def test_followers_of_a_prompt_that_is_read_are_passed_over_and_counted():
    rig = Rig(budget=8)
    rig.scheduler.add(make_request("a", list(range(20)), n=3, temperature=1.0))
    rig.scheduler.add(make_request("b", [1, 2]))
    rig.step()
    assert rig.scheduler.num_deferred == 2
    rig.step()
    rig.step()
    assert "b" in [seq.request.id for seq in rig.scheduler.running]
    assert rig.scheduler.num_deferred == 0
    rig.drain()


def test_nobody_gives_way_twice_while_others_never_did():
    rig = Rig(blocks=16, block_size=2, slots=8, budget=16)
    for i in range(8):
        rig.scheduler.add(make_request(str(i), [i + 1] * 3, max_tokens=(11, 3, 7)[i % 3]))
    while rig.scheduler.has_work:
        before = {seq: seq.num_preemptions for seq in rig.scheduler.running}
        rig.step()
        again = [seq for seq, times in before.items() if seq.num_preemptions > max(times, 1)]
        spared = [seq for seq in rig.scheduler.running[1:] if seq in before]
        assert not again or all(seq.num_preemptions for seq in spared)
    assert rig.scheduler.num_preemptions > 4


def test_an_admission_leaves_the_watermark_free_but_not_for_the_first():
    rig = Rig(blocks=8, watermark=2)
    for name, length in [("a", 12), ("b", 16)]:
        rig.scheduler.add(make_request(name, [ord(name)] * length, max_tokens=2))
    rig.step()
    assert [s.request.id for s in rig.scheduler.running] == ["a"], "b would leave 1 block"
    rig.drain()
    rig.scheduler.add(make_request("all", [1] * 30, max_tokens=2))
    rig.step()
    assert rig.pool.num_free == 0
    rig.drain()


def test_forks_leave_the_watermark_free():
    rig = Rig(blocks=6, watermark=2)
    rig.scheduler.add(make_request("a", [1] * 9, max_tokens=4, n=4, temperature=1.0))
    for _ in range(3):
        rig.step()
        assert rig.pool.num_free >= 2
    rig.drain()


def test_with_reservations_nobody_is_preempted():
    optimistic, careful = (Rig(blocks=24, block_size=2, reserve=r) for r in (False, True))
    most = 0
    for rig in (optimistic, careful):
        for i in range(8):
            rig.scheduler.add(make_request(str(i), [i + 1] * 3, max_tokens=12, n=1 + i % 2))
        while rig.scheduler.has_work:
            rig.step()
            most = max(most, len(rig.scheduler.running))
    assert optimistic.scheduler.num_preemptions > 0
    assert careful.scheduler.num_preemptions == 0
    assert careful.answers == optimistic.answers


def test_each_of_n_answers_has_its_own_random_numbers():
    rig = Rig()
    request = make_request("a", [1, 2], max_tokens=6, n=3, temperature=1.0, seed=7)
    rig.scheduler.add(request)
    rig.drain()
    answers = [rig.answers["a", i] for i in range(3)]
    assert answers == [expected(request, i, frozenset()) for i in range(3)]
    assert len({tuple(a) for a in answers}) == 3


@pytest.mark.parametrize(("prompt", "copies"), [(10, 3), (9, 0), (1, 0)])
def test_n_answers_share_one_prompt(prompt: int, copies: int):
    """The prompt is computed once; each further answer computes its last token again, in a copy of
    the block it lies in unless it is the first of its block."""
    rig = Rig()
    request = make_request("a", list(range(prompt)), max_tokens=3, n=4, temperature=1.0)
    rig.scheduler.add(request)
    rig.step()
    assert [s.index for s in rig.scheduler.running] == [0]
    rig.step()
    assert len(rig.scheduler.running) == 4
    assert rig.device.computed == prompt + 1 + 3
    assert rig.device.copied["cow"] == copies
    full = (prompt - 1) // 4
    tables = [seq.blocks.tables[0].blocks for seq in rig.scheduler.running]
    assert all(table[:full] == tables[0][:full] for table in tables)
    rig.drain()
    for index in range(4):
        assert rig.answers["a", index] == expected(request, index, frozenset())


def test_answers_whose_leader_is_gone_start_from_the_cache():
    rig = Rig()
    request = make_request("a", list(range(10)), max_tokens=1, n=3, temperature=1.0)
    rig.scheduler.add(request)
    rig.drain()
    assert rig.device.computed == 10 + 2 + 2
    for index in range(3):
        assert rig.answers["a", index] == expected(request, index, frozenset())


def test_a_shared_prefix_is_computed_once():
    rig = Rig(budget=64)
    system = list(range(20))
    for name in "abc":
        rig.scheduler.add(make_request(name, [*system, ord(name)], max_tokens=2))
    rig.step()  # all three in one step: what a stores, b and c read
    assert rig.device.computed == 21 + 1 + 1
    assert [seq.num_cached for seq in rig.scheduler.running] == [0, 20, 20]
    counts = rig.scheduler.prefix
    assert (counts.queries, counts.hits, counts.recovered) == (63, 40, 0)
    rig.drain()


def test_blocks_found_after_a_preemption_are_no_clients_hit():
    rig = Rig(blocks=6, block_size=4, slots=4)
    for name in "abc":
        rig.scheduler.add(make_request(name, [ord(name)] * 6, max_tokens=12))
    rig.drain()
    assert rig.scheduler.num_preemptions > 0
    assert rig.scheduler.prefix.hits == 0
    assert rig.scheduler.prefix.recovered > 0


def test_after_a_failed_step_nothing_is_found():
    rig = Rig()
    rig.scheduler.add(make_request("a", list(range(9))))
    rig.scheduler.fail(rig.scheduler.schedule())
    rig.scheduler.add(make_request("b", list(range(9))))
    rig.drain()
    assert rig.scheduler.prefix.hits == 0


def test_a_sliding_group_keeps_its_window_only():
    rig = Rig(windows=(0, 10), blocks=200, budget=16)
    request = make_request("a", list(range(60)), max_tokens=40)
    rig.scheduler.add(request)
    while rig.scheduler.has_work:
        rig.step()
        for seq in rig.scheduler.running:
            full, sliding = seq.blocks.tables
            assert len(full.held) >= seq.num_computed // 4
            most = rig.scheduler.cache.blocks_for(10 + 16) + 1
            assert len(sliding.held) <= (5 if seq.num_generated > 1 else most)
    assert rig.answers["a", 0] == expected(request, 0, frozenset())


def test_stops_at_end_of_sequence_and_stop_tokens():
    rig = Rig(blocks=256, eos=EOS)
    free = make_request("free", [5], max_tokens=400, ignore_eos=True)
    answer = expected(free, 0, frozenset())
    assert 0 in answer, "choose another prompt"
    stop = next(token for token in answer[3:] if token not in answer[:3] and token != 0)
    for name, options in [("eos", {}), ("stop", {"stop_token_ids": (stop,), "ignore_eos": True})]:
        rig.scheduler.add(make_request(name, [5], max_tokens=400, **options))
    rig.drain()
    assert rig.answers["eos", 0] == answer[: answer.index(0) + 1]
    assert rig.answers["stop", 0] == answer[: answer.index(stop) + 1]
    assert set(rig.reasons.values()) == {"stop"}


def test_abort_frees_at_once_whatever_the_state():
    rig = Rig(blocks=4, block_size=4, slots=1)
    rig.scheduler.add(make_request("running", [1] * 4, n=2))
    rig.step()
    rig.take(rig.scheduler.abort("running"))
    rig.scheduler.check()
    assert rig.pool.num_used == 0
    assert not rig.scheduler.has_work
    assert rig.reasons == {("running", 0): "abort", ("running", 1): "abort"}
    assert rig.scheduler.abort("running") == rig.scheduler.abort("never seen") == []


def test_results_of_an_aborted_sequence_are_ignored():
    rig = Rig()
    rig.scheduler.add(make_request("a", [1]))
    plan = rig.scheduler.schedule()
    rig.scheduler.abort("a")
    assert rig.scheduler.commit(rig.device.run(plan)) == []


def test_two_plans_in_flight():
    """Step N+1 is planned before the tokens of step N are known to the host."""
    rig = Rig(blocks=9, block_size=2, slots=4, budget=6)
    requests = [make_request(str(i), [i + 1] * 5, max_tokens=6) for i in range(4)]
    for request in requests:
        rig.scheduler.add(request)
    behind = rig.device.run(rig.scheduler.schedule())
    while rig.scheduler.has_work:
        ahead = rig.device.run(rig.scheduler.schedule())
        rig.take(rig.scheduler.commit(behind))
        behind = ahead
    assert rig.scheduler.num_preemptions > 0
    for request in requests:
        assert rig.answers[request.id, 0] == expected(request, 0, frozenset())


def test_a_failed_step_ends_the_requests_in_it_and_no_others():
    rig = Rig(slots=1)
    for name in "ab":
        rig.scheduler.add(make_request(name, [1, 2]))
    ended = rig.scheduler.fail(rig.scheduler.schedule())
    assert [item.seq.request.id for item in ended] == ["a"]
    rig.drain()
    assert rig.answers.keys() == {("b", 0)}


def test_what_can_never_fit_is_refused():
    rig = Rig(blocks=2, block_size=4)
    rig.scheduler.add(make_request("fits", [1] * 5, max_tokens=4))
    with pytest.raises(InvalidRequest, match=r"needs 3 KV blocks.*the pool has 2") as refused:
        rig.scheduler.add(make_request("large", [1] * 6, max_tokens=4))
    assert refused.value.code == "kv_capacity_exceeded"
    with pytest.raises(InvalidRequest, match="in use"):
        rig.scheduler.add(make_request("fits", [1]))
    rig.drain()
    assert rig.answers.keys() == {("fits", 0)}
