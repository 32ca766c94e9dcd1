"""The step trace as a file for Perfetto (ui.perfetto.dev) or chrome://tracing.

The Trace Event Format: a JSON object with `traceEvents`, times in microseconds. Three processes are
drawn: the scheduler with its steps and counters, the slots with who was computed in each, and the
requests with their waiting and running.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from engine.protocol import Decision, SlotUser, TraceView
from server.timeline import Step, steps

Event = dict[str, Any]

SCHEDULER: Final = 1
SLOTS: Final = 2
REQUESTS: Final = 3
STEPS: Final = 1  # threads of the scheduler
QUEUE: Final = 2


def render(view: TraceView) -> Iterator[bytes]:
    """The file, in pieces of about one step."""
    encode = msgspec.json.Encoder().encode
    head = {"since_epoch_us": _us(view.since_epoch)}
    yield b'{"displayTimeUnit":"ms","otherData":' + encode(head) + b',"traceEvents":[\n'
    yield b",\n".join(map(encode, _names(view)))
    lives = _Lives(view)
    for step in steps(view):
        yield b"".join(b",\n" + encode(event) for event in [*_step(step), *lives.take(step)])
    yield b"".join(b",\n" + encode(event) for event in lives.close())
    yield b"\n]}\n"


def _names(view: TraceView) -> Iterator[Event]:
    for pid, name in ((SCHEDULER, "scheduler"), (SLOTS, "slots"), (REQUESTS, "requests")):
        yield _meta(pid, 0, "process_name", name)
    yield _meta(SCHEDULER, STEPS, "thread_name", "steps")
    yield _meta(SCHEDULER, QUEUE, "thread_name", "first of the queue waits for")
    for slot in range(len(view.slots)):
        yield _meta(SLOTS, slot + 1, "thread_name", f"slot {slot}")


def _meta(pid: int, tid: int, kind: str, name: str) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}


def _step(step: Step) -> Iterator[Event]:
    record, waits = step.record, step.waits
    ended = record.ended or record.planned  # an empty plan, or one that still runs
    yield _span(
        SCHEDULER,
        STEPS,
        f"step {record.step}" + (" failed" if record.failed else ""),
        (record.began, ended),
        {
            "tokens": sum(share.count for share in step.shares),
            "sequences": len(step.shares),
            "running": record.running,
            "waiting": record.waiting,
        },
    )
    yield _span(SCHEDULER, STEPS, "plan", (record.began, record.planned), {})
    if waits is not None:
        who = _label(waits.request_id, waits.index)
        yield _span(SCHEDULER, QUEUE, waits.detail, (record.began, ended), {"first": who})
    counts = {"running": record.running, "waiting": record.waiting}
    yield _counter("sequences", record.planned, counts)
    yield _counter("KV blocks", record.planned, {"used": record.blocks_used})
    for share in step.shares:
        yield _span(
            SLOTS,
            share.slot + 1,
            _label(share.user.request_id, share.user.index),
            (record.planned, ended),
            {"start": share.start, "tokens": share.count, "sampled": share.sampled},
        )


def _span(
    pid: int, tid: int, name: str, between: tuple[float, float], args: dict[str, Any]
) -> Event:
    began, ended = between
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": name,
        "cat": "step",
        "ts": _us(began),
        "dur": _us(ended - began),
        "args": args,
    }


def _counter(name: str, at: float, values: dict[str, int]) -> Event:
    return {"ph": "C", "pid": SCHEDULER, "tid": 0, "name": name, "ts": _us(at), "args": values}


class _Lives:
    """Waiting and running of every sequence, as asynchronous spans: they overlap freely."""

    def __init__(self, view: TraceView) -> None:
        self._now = view.steps[0].began if view.steps else 0.0
        # Of the time before a full ring nothing is known, not even who had run already.
        self._since = self._now if len(view.steps) == view.keep else 0.0
        self._requests = view.requests
        self._open: dict[SlotUser, str] = {}
        self._seen: set[SlotUser] = set()
        self._before = [user for user in view.slots if user is not None]

    def take(self, step: Step) -> Iterator[Event]:
        """Begins and ends spans as the decisions of `step` say."""
        for user in self._before:
            yield self._begin(user, "running", self._now)
        self._before = []
        for decision in step.record.decisions:
            if decision.kind != "waits":
                yield from self._decide(decision)
        self._now = max(step.record.ended, step.record.planned, self._now)

    def close(self) -> Iterator[Event]:
        """Ends what still goes on where the trace ends."""
        for name, life in self._requests.items():
            users = [SlotUser(name, index) for index in range(life.answers)]
            if life.unfinished == life.answers and self._seen.isdisjoint(users):
                self._now = max(self._now, life.queued)
                for user in users:
                    yield self._begin(user, "waiting", self._queued(user))
        for user, name in self._open.items():
            yield self._event("e", user, name, self._now)

    def _decide(self, decision: Decision) -> Iterator[Event]:
        user, at = SlotUser(decision.request_id, decision.index), decision.at
        self._now = max(self._now, at)
        if user not in self._open:
            yield self._begin(user, "waiting", min(self._queued(user), at))
        yield self._event("e", user, self._open.pop(user), at)
        if decision.kind == "admitted":
            yield self._begin(user, "running", at)
        elif decision.kind == "preempted":
            winner = _label(decision.detail, decision.number)
            yield self._event("n", user, "preempted", at, {"for": winner})
            yield self._begin(user, "waiting", at)
        else:
            yield self._event("n", user, "finished", at, {"reason": decision.detail})

    def _queued(self, user: SlotUser) -> float:
        return max(self._requests[user.request_id].queued, self._since)

    def _begin(self, user: SlotUser, name: str, at: float) -> Event:
        self._open[user] = name
        self._seen.add(user)
        return self._event("b", user, name, at)

    def _event(
        self, phase: str, user: SlotUser, name: str, at: float, args: dict[str, Any] | None = None
    ) -> Event:
        label = _label(user.request_id, user.index)
        return {
            "ph": phase,
            "pid": REQUESTS,
            "tid": 1,
            "id": label,
            "cat": "request",
            "name": name,
            "ts": _us(at),
            "args": {"sequence": label} | (args or {}),
        }


def _label(request_id: str, index: int) -> str:
    return f"{request_id}[{index}]"


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
