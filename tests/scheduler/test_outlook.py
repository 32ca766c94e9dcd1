"""What would become of a request is what then becomes of it."""

from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.outlook import Outlook
from scheduler.scheduler import Scheduler
from tests.scheduler.fake_device import FakeDevice, make_request


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(clock: Clock, slots: int = 2, blocks: int = 16) -> Scheduler:
    cache = KVCacheManager(BlockPool(blocks), 4)
    return Scheduler(cache, max_num_seqs=slots, max_num_batched_tokens=64, clock=clock)


def test_admit_queue_refuse() -> None:
    clock = Clock()
    busy, device = scheduler(clock), FakeDevice(2, 4)
    new = make_request("new", [1] * 8, max_tokens=5)

    def ask(found: int = 0, **changes: int) -> Outlook:
        request = make_request("new", [1] * 8, **{"max_tokens": 5, **changes})
        return busy.outlook(request, found)

    def step(seconds: float) -> None:
        clock.now += seconds
        busy.commit(device.run(busy.schedule()))

    assert ask() == Outlook("admit", 3)
    assert ask(max_tokens=99) == Outlook("refuse", 27, wait=None)
    for name in ("a", "b"):
        busy.add(make_request(name, [int(name, 16)] * 20, max_tokens=12))
    busy.add(make_request("c", [3] * 10, max_tokens=1, n=2))
    step(0)
    assert ask() == Outlook("queue", 3, 2, None), "slots are taken"
    step(1)
    assert ask().ahead == 2
    assert ask(priority=-1).ahead == 0
    assert ask().wait == (8 + 10 + 1) / 40, "40 prompt tokens left the queue in the last second"
    busy.add(new)
    while busy.has_work:
        step(0.1)
    assert ask() == Outlook("admit", 3)


def test_blocks_may_be_missing() -> None:
    """What is found is not missing."""
    clock = Clock()
    busy, device = scheduler(clock, slots=4, blocks=8), FakeDevice(4, 4)
    busy.add(make_request("a", [1] * 22, max_tokens=8))
    busy.commit(device.run(busy.schedule()))
    request = make_request("new", [1] * 12, max_tokens=1)
    assert busy.outlook(request, 0).verdict == "queue"
    assert busy.outlook(request, 8).verdict == "admit"
