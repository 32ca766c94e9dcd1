import pytest

from paged_cache.host_tier import HostTier
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from paged_cache.rate import MovingRate
from scheduler.preemption import Preemption
from scheduler.scheduler import Scheduler
from tests.scheduler.fake_device import FakeDevice, expected, make_request


@pytest.mark.parametrize(
    ("copying", "computing", "swaps"),
    [
        (1000.0, 10.0, True),  # 2 x 4 x 100 bytes: 0.8 s against 60 tokens: 6 s
        (1000.0, 100.0, False),  # against 0.6 s
        (0.0, 10.0, False),
        (1000.0, 0.0, True),
    ],
)
def test_auto_takes_the_cheaper(copying: float, computing: float, swaps: bool):
    choice = Preemption("auto", 100, MovingRate(copying))
    choice.computing = MovingRate(computing)
    assert choice.prefers_swap(4, 60) is swaps
    assert Preemption("swap").prefers_swap(4, 60)
    assert not Preemption("recompute").prefers_swap(4, 60)


def test_a_rate_starts_at_the_first_measurement_and_follows_the_others():
    rate = MovingRate()
    rate.observe(100, 2)
    assert rate.per_second == 50
    rate.observe(100, 1)
    assert 50 < rate.per_second < 100
    rate.observe(100, 0)  # too short for the clock
    assert 50 < rate.per_second < 100


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_a_swapped_sequence_computes_little_again(mode):
    cache = KVCacheManager(BlockPool(8), 4, prefix_cache=False, host=HostTier(8, keep=False))
    scheduler = Scheduler(
        cache, max_num_seqs=4, max_num_batched_tokens=64, preemption=Preemption(mode)
    )
    device, items = FakeDevice(4, 4), [make_request(n, [ord(n)] * 12, 8) for n in "ab"]
    answers: dict[str, list[int]] = {"a": [], "b": []}
    for item in items:
        scheduler.add(item)
    while scheduler.has_work:
        for done in scheduler.commit(device.run(scheduler.schedule())):
            answers[done.seq.request.id] += done.tokens
        scheduler.check()
    assert answers == {item.id: expected(item, 0, frozenset()) for item in items}
    assert (scheduler.preemption.num_swapped, scheduler.num_preemptions) == (mode == "swap", 1)
    again = device.computed - 2 * (12 + 7)
    assert again == (0 if mode == "swap" else 16)
