"""Requests that must be answered by a certain time, and those that cannot be any more."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from scheduler.request import Request
from scheduler.sequence import Sequence

WINDOW_SECONDS = 30.0
LEAST_SECONDS = 0.5  # of watching the queue before its speed is believed
LOOK_SECONDS = 0.05  # between two looks through the queue


class QueueRate:
    """How fast the queue goes on, in prompt tokens per second, while there is one."""

    def __init__(self) -> None:
        self._started: deque[tuple[float, int]] = deque()
        self._tokens = 0

    def started(self, tokens: int, now: float) -> None:
        """A prompt left the queue at `now`, in seconds."""
        self._started.append((now, tokens))
        self._tokens += tokens
        while self._started[0][0] < now - WINDOW_SECONDS:
            self._tokens -= self._started.popleft()[1]

    def rest(self) -> None:
        """The queue is empty: the time until the next one comes says nothing of its speed."""
        self._started.clear()
        self._tokens = 0

    def per_second(self, now: float) -> float:
        """Infinite as long as too little is known."""
        if not self._started or (seconds := now - self._started[0][0]) < LEAST_SECONDS:
            return math.inf
        return self._tokens / seconds


class Deadlines:
    """The live requests with a deadline. Without any, nothing is looked at."""

    def __init__(self) -> None:
        self.rate = QueueRate()
        self._timed: dict[str, Request] = {}
        self._next_look = 0.0

    def add(self, request: Request) -> None:
        """A request is queued."""
        if request.deadline is not None or request.ttft_deadline is not None:
            self._timed[request.id] = request
            self._next_look = 0.0

    def discard(self, request_id: str) -> None:
        """It is over."""
        self._timed.pop(request_id, None)

    def late(
        self, now: float, live: Mapping[str, list[Sequence]], queue: Iterable[Sequence]
    ) -> list[str]:
        """Ids of requests whose deadline is over, or will be before their turn in the queue comes.

        Args:
            live: the sequences of each request.
            queue: waiting sequences, the next one first.
        """
        if not self._timed or now < self._next_look:
            return []
        self._next_look = now + LOOK_SECONDS
        over = [n for n, request in self._timed.items() if _deadline(request, live[n]) <= now]
        return over + [name for name in self._hopeless(now, queue) if name not in over]

    def _hopeless(self, now: float, queue: Iterable[Sequence]) -> Iterator[str]:
        """Those of the queue whose turn will come too late at its present speed."""
        rate, tokens = self.rate.per_second(now), 0
        if not math.isfinite(rate):
            return
        for seq in queue:
            cost = 1 if seq.leader else seq.num_prompt
            begun = seq.index or seq.num_preemptions
            timed = None if begun else self._timed.get(seq.request.id)
            if timed is not None and now + (tokens + cost) / rate > _deadline(timed, [seq]):
                yield timed.id
            else:
                tokens += cost


def _deadline(request: Request, seqs: list[Sequence]) -> float:
    """The one that ends first, of those that still count."""
    whole = math.inf if request.deadline is None else request.deadline
    if request.ttft_deadline is None or any(seq.num_generated for seq in seqs):
        return whole
    return min(whole, request.ttft_deadline)
