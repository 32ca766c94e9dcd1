"""How many requests may wait for their first token, and what those are told that come too many.

Counted here, in the process that takes requests in, from before they are handed to the engine until
their first token comes back: there is no moment at which a request is in neither count, so the
bounds hold whatever comes at once.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.request import Request
from server.errors import RETRY_AFTER_SECONDS, ApiError, invalid, unavailable

MAX_RETRY_AFTER = 60
OF_KEY = "waiting requests of one key"
WINDOW = 256  # departures from which the speed of the queue is measured


@dataclass(frozen=True)
class QueueLimits:
    """Attributes:
    requests, tokens: most requests that wait, and most tokens of their prompts.
    per_key: most waiting requests of one API key; None is no such bound.
    """

    requests: int = 2048
    tokens: int = 1 << 22
    per_key: int | None = None


@dataclass(frozen=True)
class _Bound:
    """`more` want to join those that are `there`, of `most`."""

    what: str
    there: int
    more: int
    most: int


class QueueBound:
    """The requests that wait for their first token."""

    def __init__(
        self, limits: QueueLimits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits or QueueLimits()
        self._clock = clock
        self._waiting: dict[str, Request] = {}
        self._tokens = 0
        self._of_key: Counter[str] = Counter()
        self._left: deque[float] = deque(maxlen=WINDOW)  # when the last ones did

    def enter(self, requests: Sequence[Request]) -> None:
        """Counts all of `requests`, of one key, or none.

        Raises:
            ApiError: 503 or 429 where they are too many now, 400 where they always would be.
        """
        tenant, tokens = requests[0].tenant, sum(len(r.prompt_ids) for r in requests)
        for bound in self._bounds(tenant, len(requests), tokens):
            if bound.more > bound.most:
                raise invalid(None, f"{bound.what} may be at most {bound.most}, got {bound.more}")
            if bound.there + bound.more > bound.most:
                raise self._full(bound)
        self._waiting.update((request.id, request) for request in requests)
        self._tokens += tokens
        self._of_key[tenant] += len(requests)

    def leave(self, request: Request) -> None:
        """Its first token came, or it ended; does nothing the second time."""
        if self._waiting.pop(request.id, None) is None:
            return
        self._tokens -= len(request.prompt_ids)
        self._of_key[request.tenant] -= 1
        if not self._of_key[request.tenant]:
            del self._of_key[request.tenant]
        self._left.append(self._clock())

    def _bounds(self, tenant: str, requests: int, tokens: int) -> list[_Bound]:
        limits = self._limits
        bounds = [
            _Bound("waiting requests", len(self._waiting), requests, limits.requests),
            _Bound("waiting prompt tokens", self._tokens, tokens, limits.tokens),
        ]
        if limits.per_key is not None:
            there = self._of_key[tenant]
            bounds.append(_Bound(OF_KEY, there, requests, limits.per_key))
        return bounds

    def _full(self, bound: _Bound) -> ApiError:
        message = f"{bound.what} may be at most {bound.most}, and {bound.there} are there"
        if bound.what is not OF_KEY:
            return unavailable(message, "queue_full", self.retry_after)
        headers = {"retry-after": str(self.retry_after), "x-should-retry": "true"}
        return ApiError(429, message, code="rate_limit_exceeded", headers=headers)

    @property
    def retry_after(self) -> int:
        """Whole seconds until all that wait now will have left, at the speed of the last ones."""
        if len(self._left) < 2:
            return RETRY_AFTER_SECONDS
        seconds = max(self._clock() - self._left[0], 1e-3)
        drain = len(self._waiting) * seconds / len(self._left)
        return min(max(math.ceil(drain), 1), MAX_RETRY_AFTER)
