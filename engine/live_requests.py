"""The list of live requests, as people see it."""

from __future__ import annotations

from collections.abc import Iterable

from engine.protocol import RequestView
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence, Status


def live_requests(
    scheduler: Scheduler, deferred: Iterable[Request], now: float
) -> list[RequestView]:
    """All requests at `now` (monotonic seconds): running ones, then the queue in its order, then
    `deferred` ones, which do not stand in it yet."""
    places: dict[str, int] = {}
    for place, seq in enumerate(scheduler.waiting, 1):
        places.setdefault(seq.request.id, place)
    views = [_view(seqs, places, now) for seqs in scheduler.live()]
    views.sort(key=lambda view: view.position or 0)
    return views + [_new(request, "deferred", None, now) for request in deferred]


def _view(seqs: list[Sequence], places: dict[str, int], now: float) -> RequestView:
    request = seqs[0].request
    runs = any(seq.status is Status.RUNNING for seq in seqs)
    view = _new(
        request, "running" if runs else "waiting", None if runs else places[request.id], now
    )
    view.generated_tokens = sum(len(seq.tokens) - seq.num_prompt for seq in seqs)
    view.blocks = sum(seq.blocks.num_held for seq in seqs)
    return view


def _new(request: Request, state: str, position: int | None, now: float) -> RequestView:
    return RequestView(
        id=request.id,
        tenant=request.tenant,
        state=state,
        position=position,
        priority=request.priority,
        prompt_tokens=len(request.prompt_ids),
        age_seconds=max(now - request.arrival, 0.0),
    )
