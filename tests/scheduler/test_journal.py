"""What the scheduler writes down of its decisions."""

from __future__ import annotations

from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.journal import Journal, Wait
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from tests.scheduler.fake_device import FakeDevice, make_request


class Notes(Journal):
    """One line per call."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def queued(self, seq: Sequence) -> None:
        self.lines.append(f"{name(seq)} queued")

    def admitted(self, seq: Sequence) -> None:
        self.lines.append(f"{name(seq)} admitted, {seq.num_computed} found")

    def preempted(self, victim: Sequence, winner: Sequence) -> None:
        self.lines.append(f"{name(victim)} preempted for {name(winner)}")

    def waits(self, seq: Sequence, why: Wait) -> None:
        self.lines.append(f"{name(seq)} waits: {why.value}")

    def finished(self, seq: Sequence, reason: str) -> None:
        self.lines.append(f"{name(seq)} finished: {reason}")

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


def name(seq: Sequence) -> str:
    return f"{seq.request.id}{seq.index}"


class Bench:
    """A scheduler, its device and its notes. Blocks hold 4 tokens."""

    def __init__(self, blocks: int = 32, seqs: int = 4, budget: int = 32) -> None:
        self.notes = Notes()
        self.scheduler = Scheduler(
            KVCacheManager(BlockPool(blocks), 4),
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            journal=self.notes,
        )
        self.device = FakeDevice(seqs, 4)

    def add(self, name: str, length: int, **options: int) -> None:
        """A prompt unlike all others."""
        start = ord(name) * 100
        self.scheduler.add(make_request(name, list(range(start, start + length)), **options))

    def step(self) -> list[str]:
        self.scheduler.commit(self.device.run(self.scheduler.schedule()))
        return self.notes.take()


def test_the_life_of_a_request() -> None:
    bench = Bench()
    bench.add("a", 5, max_tokens=1)
    assert bench.step() == ["a0 queued", "a0 admitted, 0 found", "a0 finished: length"]
    bench.add("a", 5, max_tokens=2)
    assert bench.step() == ["a0 queued", "a0 admitted, 4 found"]
    bench.scheduler.abort("a")
    assert bench.notes.take() == ["a0 finished: abort"]


def test_a_failed_step_is_no_abort() -> None:
    bench = Bench()
    bench.add("a", 5)
    bench.scheduler.fail(bench.scheduler.schedule())
    assert bench.notes.take()[-1] == "a0 finished: error"


def test_waits_for_a_slot() -> None:
    bench = Bench(seqs=1)
    bench.add("a", 5)
    bench.add("b", 5)
    assert bench.step()[-1] == "b0 waits: no slot"


def test_waits_for_blocks() -> None:
    bench = Bench(blocks=3)
    bench.add("a", 7, max_tokens=3)
    bench.add("b", 7, max_tokens=3)
    assert bench.step()[-1] == "b0 waits: no blocks"


def test_waits_for_the_budget() -> None:
    bench = Bench(budget=8)
    bench.add("a", 8)
    bench.add("b", 5)
    assert bench.step()[-1] == "b0 waits: budget"


def test_waits_for_the_prompt_of_its_leader() -> None:
    bench = Bench()
    bench.add("a", 5, n=2)
    assert bench.step()[-1] == "a1 waits: leader's prompt"
    assert bench.step() == ["a1 admitted, 4 found"]


def test_preempted_for_whom() -> None:
    bench = Bench(blocks=4)
    bench.add("a", 7, max_tokens=8)
    bench.add("b", 7, max_tokens=8)
    bench.step()
    bench.step()
    assert bench.step() == ["b0 preempted for a0", "b0 waits: preemption"]
    assert bench.step() == ["b0 waits: no blocks"]
