"""The step trace, unpacked: who was computed in each step, and the life of one request."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.protocol import Decision, RequestLife, SlotUser, StepRecord, TraceView


@dataclass(frozen=True, slots=True)
class Share:
    """`count` tokens of one sequence, from position `start` on; `sampled`: a new one came of it."""

    user: SlotUser
    slot: int
    start: int
    count: int
    sampled: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A record with its shares unpacked."""

    record: StepRecord
    shares: list[Share]

    @property
    def waits(self) -> Decision | None:
        """What was decided about the first of the queue, where it was not started."""
        return next((d for d in self.record.decisions if d.kind == "waits"), None)


def steps(view: TraceView) -> Iterator[Step]:
    """Every step that was planned, oldest first, with the holders of its slots."""
    slots = list(view.slots)
    for record in view.steps:
        for decision in record.decisions:
            if decision.kind == "admitted":
                slots[decision.slot] = SlotUser(decision.request_id, decision.index)
        if record.step >= 0:
            yield Step(record, list(_shares(record, slots)))


def _shares(record: StepRecord, slots: list[SlotUser | None]) -> Iterator[Share]:
    numbers = array("i")
    numbers.frombytes(record.shares)
    third = len(numbers) // 3
    rows = numbers[:third], numbers[third : 2 * third], numbers[2 * third :]
    for slot, start, count in zip(*rows, strict=True):
        user = slots[slot]
        if user is not None:
            yield Share(user, slot, start, abs(count), count > 0)


def step_fields(step: Step, view: TraceView) -> dict[str, Any]:
    """One step as `/debug/steps` tells it; times in seconds since 1970 and milliseconds."""
    record, waits = step.record, step.waits
    kinds: dict[str, list[dict[str, Any]]] = {"admitted": [], "preempted": [], "finished": []}
    for decision in record.decisions:
        if decision.kind != "waits":
            kinds[decision.kind].append(_who(decision) | _detail(decision))
    return {
        "step": record.step,
        "at": record.began + view.since_epoch,
        "plan_ms": _ms(record.began, record.planned),
        "run_ms": _ms(record.planned, record.ended) if record.ended else None,
        "failed": record.failed,
        "tokens": sum(share.count for share in step.shares),
        "running": record.running,
        "waiting": record.waiting,
        "blocks_used": record.blocks_used,
        "scheduled": [
            {
                "request_id": share.user.request_id,
                "index": share.user.index,
                "slot": share.slot,
                "start": share.start,
                "tokens": share.count,
                "sampled": share.sampled,
            }
            for share in step.shares
        ],
        "first_waiting": None if waits is None else _who(waits) | {"why": waits.detail},
        **kinds,
    }


def ids_of(view: TraceView, request_id: str, tenant: str) -> list[str]:
    """Engine requests of the response `request_id` that are `tenant`'s: one, or one per prompt."""
    several = re.compile(re.escape(request_id) + r"-\d+")
    return [
        name
        for name, life in view.requests.items()
        if life.tenant == tenant and (name == request_id or several.fullmatch(name))
    ]


def request_fields(view: TraceView, request_id: str, names: list[str]) -> dict[str, Any]:
    """The life of the engine requests `names`, as `/v1/requests/{id}/trace` tells it; times in
    seconds after the arrival."""
    lives = {name: _Life(view.requests[name]) for name in names}
    for user in view.slots:
        if user is not None and user.request_id in lives:
            lives[user.request_id].answers[user.index].waits = False
    for step in steps(view):
        _follow(lives, step)
    return {
        "id": request_id,
        "arrival": min(life.known.arrival for life in lives.values()) + view.since_epoch,
        "answers": [
            {"request_id": name, "prompt_tokens": life.known.prompt_tokens} | answer.fields()
            for name, life in lives.items()
            for answer in life.answers
        ],
    }


class _Life:
    """What was found of one engine request so far."""

    def __init__(self, known: RequestLife) -> None:
        self.known = known
        self.answers = [_Answer(index, known) for index in range(known.answers)]


@dataclass(slots=True)
class _Answer:
    index: int
    known: RequestLife
    waits: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)
    waited: Counter[str] = field(default_factory=Counter)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def take(self, decision: Decision) -> None:
        self.waits = decision.kind == "preempted"
        self.events.append(
            {"at": self._after(decision.at), "event": decision.kind} | _detail(decision)
        )

    def run(self, record: StepRecord, share: Share) -> None:
        self.steps.append(
            {
                "step": record.step,
                "at": self._after(record.began),
                "ms": _ms(record.began, record.ended) if record.ended else None,
                "start": share.start,
                "tokens": share.count,
                "sampled": share.sampled,
            }
        )

    def fields(self) -> dict[str, Any]:
        queued = {"at": self._after(self.known.queued), "event": "queued"}
        return {
            "index": self.index,
            "events": [queued, *self.events],
            "steps_waited": self.waited,
            "steps": self.steps,
        }

    def _after(self, time: float) -> float:
        return round(time - self.known.arrival, 6)


def _follow(lives: dict[str, _Life], step: Step) -> None:
    """Takes one step into the lives of the requests in question."""
    record, first = step.record, step.waits
    for decision in record.decisions:
        if decision.request_id in lives and decision.kind != "waits":
            lives[decision.request_id].answers[decision.index].take(decision)
    for share in step.shares:
        if share.user.request_id in lives:
            lives[share.user.request_id].answers[share.user.index].run(record, share)
    if first is None:
        return
    for life in lives.values():
        if life.known.queued <= record.planned:
            for answer in life.answers:
                if answer.waits:
                    answer.waited[first.detail] += 1


def _who(decision: Decision) -> dict[str, Any]:
    return {"request_id": decision.request_id, "index": decision.index}


def _detail(decision: Decision) -> dict[str, Any]:
    match decision.kind:
        case "admitted":
            return {"slot": decision.slot, "found_tokens": decision.number}
        case "preempted":
            return {"for": {"request_id": decision.detail, "index": decision.number}}
        case "finished":
            return {"reason": decision.detail, "tokens": decision.number}
        case "waits":
            return {"why": decision.detail}


def _ms(began: float, ended: float) -> float:
    return round((ended - began) * 1e3, 3)
