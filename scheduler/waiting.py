"""The queue: who waits, and who is next."""

from __future__ import annotations

import bisect
import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator

from scheduler.fairness import INPUT, FairShares
from scheduler.sequence import Sequence


class WaitingQueue:
    """Waiting sequences. The next one is, of the best priority,

    1. the oldest of those that ran already and gave way; else
    2. the oldest of the tenant that was served least.

    With one tenant and one priority that is first come, first served.

        priority 0   gave way   [ 3 ]
                     ann        [ 5  8  9 ]     served 900
                     bob        [ 7 ]           served 200    next: 3, 7, 5, 8, 9
        priority 1   ann        [ 6 ]
    """

    def __init__(self, shares: FairShares | None = None) -> None:
        self.shares = shares or FairShares()
        self._classes: dict[int, _Class] = {}
        self._lengths: Counter[str] = Counter()  # by tenant, without those that gave way
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they would be started, as far as that can be known."""
        for priority in sorted(self._classes):
            yield from self._classes[priority].in_order(self.shares)

    def first(self, ready: Callable[[Sequence], bool]) -> Sequence | None:
        """The next one of those that are `ready`."""
        return next(filter(ready, self), None)

    def add(self, seq: Sequence) -> None:
        """A new sequence waits."""
        tenant = seq.request.tenant
        if not self._lengths[tenant]:
            self.shares.come(tenant, (name for name, count in self._lengths.items() if count))
        self._lengths[tenant] += 1
        lines = self._class_of(seq).by_tenant
        lines.setdefault(tenant, deque()).append(seq)
        self._count += 1

    def put_back(self, seq: Sequence) -> None:
        """A sequence that was preempted waits again."""
        bisect.insort(self._class_of(seq).gave_way, seq, key=lambda s: s.order)
        self._count += 1

    def remove(self, seq: Sequence) -> None:
        """It starts, or ends."""
        tenant, kind = seq.request.tenant, self._class_of(seq)
        if seq.num_preemptions:
            kind.gave_way.remove(seq)
        else:
            line = kind.by_tenant[tenant]
            line.remove(seq)
            if not line:
                del kind.by_tenant[tenant]
            self._lengths[tenant] -= 1
            if not self._lengths[tenant]:
                del self._lengths[tenant]
                self.shares.leave(tenant)
        if not kind.gave_way and not kind.by_tenant:
            del self._classes[seq.request.priority]
        self._count -= 1

    def check(self) -> None:
        """Raises AssertionError where the lines are out of order or miscounted."""
        seqs = list(self)
        assert len(seqs) == len(self) == len(set(seqs)), "miscounted"
        for kind in self._classes.values():
            assert all(kind.by_tenant.values()), "an empty line is kept"
            for line in (kind.gave_way, *kind.by_tenant.values()):
                orders = [seq.order for seq in line]
                assert orders == sorted(orders), "a newer sequence stands before an older one"
        fresh = Counter(seq.request.tenant for seq in seqs if not seq.num_preemptions)
        assert fresh == self._lengths, "tenants are miscounted"

    def _class_of(self, seq: Sequence) -> _Class:
        return self._classes.setdefault(seq.request.priority, _Class())


class _Class:
    """The sequences of one priority, each list by age."""

    def __init__(self) -> None:
        self.gave_way: list[Sequence] = []
        self.by_tenant: dict[str, deque[Sequence]] = {}

    def in_order(self, shares: FairShares) -> Iterator[Sequence]:
        """As if nothing were served meanwhile but the prompts of those that come out."""
        yield from self.gave_way
        heads = []
        for tenant, line in self.by_tenant.items():
            rest = iter(line)
            seq = next(rest)
            heads.append((shares.counter(tenant), seq.order, seq, rest))
        heapq.heapify(heads)
        while heads:
            served, _, seq, rest = heads[0]
            yield seq
            after = next(rest, None)
            if after is None:
                heapq.heappop(heads)
                continue
            served += shares.cost(seq.request.tenant, INPUT * seq.num_prompt)
            heapq.heapreplace(heads, (served, after.order, after, rest))
