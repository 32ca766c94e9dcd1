"""What a sequence's account says, on a clock that one step moves by a second."""

import pytest

from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.account import Account
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from tests.scheduler.fake_device import FakeDevice, make_request


class Rig:
    """Planning takes no time, computing a second; `ended` has the sequences that ended."""

    def __init__(self, blocks: int = 64, budget: int = 32) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(
            KVCacheManager(BlockPool(blocks), 4, (0,)),
            max_num_seqs=8,
            max_num_batched_tokens=budget,
            clock=lambda: self.now,
        )
        self.device = FakeDevice(8, 4)
        self.ended: dict[str, Sequence] = {}

    def step(self) -> None:
        result = self.device.run(self.scheduler.schedule())
        self.now += 1.0
        for item in self.scheduler.commit(result):
            if item.finish_reason is not None:
                self.ended[item.seq.request.id] = item.seq

    def drain(self) -> None:
        while self.scheduler.has_work:
            self.step()

    def abort(self, name: str) -> Account:
        return self.scheduler.abort(name)[0].seq.account


def times(account: Account) -> tuple[float, float, float]:
    return account.queue, account.prefill, account.decode


def test_the_times_of_a_life():
    rig = Rig(budget=4)
    rig.scheduler.add(make_request("a", [1] * 10, max_tokens=3))
    rig.now = 5.0
    rig.drain()
    account = rig.ended["a"].account
    assert times(account) == (5.0, 3.0, 2.0)  # three chunks; the second and the third token
    assert account.ended == 10.0


def test_blocks_are_counted_as_long_as_they_are_held():
    """4 tokens per block: the prompt takes 2 blocks, the fourth token computed a third one."""
    rig = Rig()
    rig.scheduler.add(make_request("a", [1] * 6, max_tokens=5))
    rig.drain()
    account = rig.ended["a"].account
    assert account.blocks_peak == 3
    assert account.block_seconds == 3 * 2 + 2 * 3
    assert account.recomputed == 0


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(0, (2.0, 0.0, 0.0)), (1, (0.0, 3.0, 0.0)), (4, (0.0, 3.0, 3.0))],
    ids=["queued", "prefill", "decode"],
)
def test_an_abort_ends_the_phase_it_falls_into(steps: int, expected: tuple[float, float, float]):
    rig = Rig(budget=4)
    rig.scheduler.add(make_request("a", [1] * 10, max_tokens=9))
    for _ in range(steps):
        rig.step()
    rig.now += 2.0
    assert times(rig.abort("a")) == expected


def test_what_a_preemption_threw_away_is_counted_when_it_is_computed_again():
    rig = Rig(blocks=7)
    for name in "ab":
        rig.scheduler.add(make_request(name, [ord(name)] * 8, max_tokens=12))
    rig.drain()
    seqs = rig.ended
    assert [seqs[name].num_preemptions for name in "ab"] == [0, 1]
    assert [seqs[name].account.recomputed for name in "ab"] == [
        0,
        rig.device.computed - 2 * (8 + 11),
    ]
    assert seqs["b"].account.recomputed > 0
    assert sum(times(seqs["b"].account)) == seqs["b"].account.ended
