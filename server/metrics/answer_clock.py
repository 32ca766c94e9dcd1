"""The times of one answer, seen at the HTTP edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scheduler.request import Request

if TYPE_CHECKING:
    from server.metrics import Metrics


class AnswerClock:
    """Observes the times of one answer as its tokens come in."""

    __slots__ = ("_arrival", "_count", "_first", "_last", "_metrics", "_request")

    def __init__(self, metrics: Metrics, request: Request, arrival: float) -> None:
        self._metrics, self._request, self._arrival = metrics, request, arrival
        self._count = 0
        self._first = self._last = 0.0

    @property
    def ttft(self) -> float | None:
        """Seconds from the arrival to the first token; None without one."""
        return self._first - self._arrival if self._count else None

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two."""
        return (self._last - self._first) / (self._count - 1) if self._count > 1 else None

    def tokens(self, count: int, now: float) -> None:
        """`count` more tokens have come in at `now`, monotonic seconds. Tokens of one step share
        the time since the last one."""
        if not count:
            return
        metrics = self._metrics
        metrics.generation_tokens.inc(count)
        gaps = count
        if not self._count:
            ttft = now - self._arrival
            metrics.first_token.observe(ttft)
            metrics.within_slo(ttft=ttft)
            self._first = self._last = now
            gaps = count - 1
        if gaps:
            metrics.between_tokens.observe((now - self._last) / gaps, gaps)
        self._last = now
        self._count += count

    def finish(self, reason: str, now: float) -> None:
        """The answer has ended: `stop`, `length`, `abort` or `error`."""
        metrics, ttft, tpot = self._metrics, self.ttft, self.tpot
        metrics.finished(reason)
        metrics.whole_request.observe(now - self._arrival)
        metrics.request_prompt_tokens.observe(len(self._request.prompt_ids))
        metrics.request_generation_tokens.observe(self._count)
        metrics.request_max_tokens.observe(self._request.sampling.max_tokens or 0)
        if tpot is not None:
            metrics.per_output_token.observe(tpot)
            metrics.within_slo(tpot=tpot)
        metrics.finished_within_slo(ttft, tpot)
