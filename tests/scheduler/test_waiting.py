"""Who is next, and how what tenants are served stays even."""

import itertools

import pytest

from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.fairness import INPUT, OUTPUT, FairShares
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from scheduler.waiting import WaitingQueue
from tests.scheduler.fake_device import FakeDevice, make_request


class Line:
    """A queue whose sequences are made by name."""

    def __init__(self, shares: FairShares | None = None):
        self.queue = WaitingQueue(shares)
        self.cache = KVCacheManager(BlockPool(1), 1)
        self.orders = itertools.count()

    def make(self, name: str, tenant="", priority=0, length=10, preempted=0) -> Sequence:
        request = make_request(name, [1] * length, tenant=tenant, priority=priority)
        seq = Sequence(request, 0, next(self.orders), self.cache.open(), 1)
        seq.num_preemptions = preempted
        return seq

    def add(self, *args, **options) -> Sequence:
        seq = self.make(*args, **options)
        self.queue.put_back(seq) if seq.num_preemptions else self.queue.add(seq)
        self.queue.check()
        return seq

    def names(self) -> str:
        return "".join(seq.request.id for seq in self.queue)


def test_one_tenant_is_served_in_order_of_arrival():
    line = Line()
    seqs = [line.add(name) for name in "abcd"]
    assert line.names() == "abcd"
    line.queue.remove(seqs[1])
    assert (line.names(), len(line.queue)) == ("acd", 3)


def test_a_lower_priority_number_goes_first_and_ties_keep_their_order():
    line = Line()
    for name, priority in [("a", 5), ("b", 0), ("c", -1), ("d", 0), ("e", 5)]:
        line.add(name, priority=priority)
    assert line.names() == "cbdae"


def test_who_gave_way_goes_before_those_that_never_ran():
    line = Line()
    old = line.make("a", preempted=1)
    for name, options in [("b", {}), ("c", {"priority": -1}), ("d", {"preempted": 2})]:
        line.add(name, **options)
    line.queue.put_back(old)
    assert line.names() == "cadb"


def test_who_is_not_ready_is_passed_over():
    line = Line()
    for name in "abc":
        line.add(name)
    first = line.queue.first(lambda seq: seq.request.id > "a")
    assert first is not None
    assert first.request.id == "b"
    assert line.queue.first(lambda seq: False) is None


def test_tenants_take_turns_by_what_they_cost():
    line = Line(FairShares({"paid": 2}))
    for name in "abc":
        line.add(name, "ann", length=20)
    for name in "pqrs":
        line.add(name, "paid", length=20)
    assert line.names() == "apqbrsc"


def test_a_tenant_that_was_served_waits_for_the_others():
    line = Line()
    line.queue.shares.serve("ann", 100)
    for name in "ab":
        line.add(name, "ann")
    for name in "xy":
        line.add(name, "bob")
    assert line.names() == "axby", "bob was lifted to ann, the only one that waited"
    line.queue.shares.serve("ann", 15)
    assert line.names() == "xyab"


def test_staying_away_saves_nothing_up():
    line = Line()
    seq = line.add("a", "ann")
    line.queue.shares.serve("ann", 1000)
    line.queue.remove(seq)
    line.add("x", "bob")
    assert line.queue.shares.counter("bob") == 1000, "lifted to the last one that left"


def served_steps(weights: dict[str, float], flood: int, trickle: int) -> list[dict[str, float]]:
    """What two tenants were served in each step while both have requests waiting: `flood` of ann's
    are there from the beginning, bob has at most two waiting at a time."""
    cache = KVCacheManager(BlockPool(64), 4)
    scheduler = Scheduler(
        cache, max_num_seqs=4, max_num_batched_tokens=32, shares=FairShares(weights)
    )
    device = FakeDevice(4, 4)
    for i in range(flood):
        scheduler.add(make_request(f"ann{i}", [i, *range(7 + i % 5)], 12, tenant="ann"))
    steps, coming = [], iter(range(trickle))
    while True:
        waiting = [seq.request.tenant for seq in scheduler.waiting]
        if waiting.count("bob") < 2 and (i := next(coming, None)) is not None:
            scheduler.add(make_request(f"bob{i}", [50 + i, *range(20)], 6, tenant="bob"))
            continue
        if len(set(waiting)) < 2:
            return steps
        new = {seq for seq in scheduler.waiting if not seq.num_preemptions}
        served = dict.fromkeys(("ann", "bob"), 0.0)
        progress = scheduler.commit(device.run(scheduler.schedule()))
        for seq in new.difference(scheduler.waiting):
            served[seq.request.tenant] += INPUT * (seq.num_prompt - (seq.num_cached or 0))
        for item in progress:
            served[item.seq.request.tenant] += OUTPUT * len(item.tokens)
        steps.append({name: count / weights.get(name, 1) for name, count in served.items()})


@pytest.mark.parametrize("weights", [{}, {"ann": 3.0}, {"bob": 2.0}])
def test_a_flood_cannot_starve_another_tenant(weights: dict[str, float]):
    """The bound of the paper: over every interval in which both have requests waiting."""
    steps = served_steps(weights, flood=150, trickle=60)
    longest_prompt, at_once = 21, 4 * 27
    bound = 2 * max(INPUT * longest_prompt, OUTPUT * at_once)
    gaps = list(itertools.accumulate(step["ann"] - step["bob"] for step in steps))
    assert max(gaps) - min(gaps) <= bound
    assert sum(step["bob"] for step in steps) > 2 * bound, "too short a run to tell"
