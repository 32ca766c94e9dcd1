"""A ring buffer of what the scheduler did: who ran how many tokens, who waited and why."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable

from engine.protocol import Decision, DecisionKind, RequestLife, SlotUser, StepRecord, TraceView
from scheduler.journal import Journal, Wait
from scheduler.plan import StepPlan
from scheduler.scheduler import Scheduler
from scheduler.sequence import NO_SLOT, Sequence


class StepTrace(Journal):
    """The last `keep` steps, as packed numbers: nothing is rendered here.

    Shares of a step name slots only. Who holds a slot is said once, at its admission; the slots'
    holders before the oldest step kept are brought forward as steps are forgotten.

        forgotten steps  |  oldest kept ... newest
        ------ _slots -->|-- decisions: "admitted to slot 3" -->

    `begin`, `planned` and `ended` frame a step; decisions fall into the step begun last.
    """

    def __init__(
        self, keep: int, num_slots: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args:
        keep: steps, at least 1. A step of s sequences takes about 700 + 12 s bytes.
        clock: in seconds.
        """
        self._keep, self._clock = keep, clock
        self._steps: deque[StepRecord] = deque()
        self._slots: list[SlotUser | None] = [None] * num_slots
        self._lives: dict[str, RequestLife] = {}
        self._decisions: list[Decision] = []  # of the newest step; first, of the time before

    # ------------------------------------------------------------------ the frame of a step

    def begin(self) -> None:
        """A step is about to be planned."""
        if self._steps:
            self._decisions = []
        if len(self._steps) == self._keep:
            self._forget(self._steps.popleft())
        self._steps.append(StepRecord(began=self._clock(), decisions=self._decisions))

    def planned(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """The step that was begun computes `plan`."""
        record, items = self._steps[-1], plan.scheduled
        record.step = plan.id
        record.planned = self._clock()
        record.running, record.waiting = len(scheduler.running), len(scheduler.waiting)
        record.blocks_used = scheduler.cache.pool.num_used
        record.shares = array(
            "i",
            [item.slot for item in items]
            + [item.start for item in items]
            + [item.count if item.wants_token else -item.count for item in items],
        ).tobytes()

    def ended(self, plan_id: int, failed: bool = False) -> None:
        """The results of a plan are in, or it raised."""
        for record in reversed(self._steps):
            if record.step == plan_id:
                record.ended, record.failed = self._clock(), failed
                return

    def _forget(self, record: StepRecord) -> None:
        for decision in record.decisions:
            user = SlotUser(decision.request_id, decision.index)
            if decision.kind == "admitted":
                self._slots[decision.slot] = user
            elif decision.kind != "waits" and user in self._slots:
                self._slots[self._slots.index(user)] = None
            if decision.kind == "finished":
                life = self._lives[decision.request_id]
                life.unfinished -= 1
                if not life.unfinished:
                    del self._lives[decision.request_id]

    # ------------------------------------------------------------------ decisions

    def queued(self, seq: Sequence) -> None:
        request = seq.request
        if seq.index == 0:
            namesake = self._lives.get(request.id)  # an id may be used again
            self._lives[request.id] = RequestLife(
                arrival=request.arrival,
                queued=self._clock(),
                prompt_tokens=len(request.prompt_ids),
                answers=request.n,
                unfinished=request.n + (namesake.unfinished if namesake else 0),
                tenant=request.tenant,
            )

    def admitted(self, seq: Sequence) -> None:
        self._note("admitted", seq, number=seq.num_computed, slot=seq.slot)

    def preempted(self, victim: Sequence, winner: Sequence) -> None:
        self._note("preempted", victim, winner.request.id, winner.index)

    def waits(self, seq: Sequence, why: Wait) -> None:
        self._note("waits", seq, why.value)

    def finished(self, seq: Sequence, reason: str) -> None:
        self._note("finished", seq, reason, seq.num_generated)

    def _note(
        self,
        kind: DecisionKind,
        seq: Sequence,
        detail: str = "",
        number: int = 0,
        slot: int = NO_SLOT,
    ) -> None:
        self._decisions.append(
            Decision(self._clock(), kind, seq.request.id, seq.index, detail, number, slot)
        )

    # ------------------------------------------------------------------ reading

    def view(self) -> TraceView:
        """All that is kept. The newest records may still grow."""
        return TraceView(
            keep=self._keep,
            since_epoch=time.time() - self._clock(),
            slots=self._slots[:],
            requests=dict(self._lives),
            steps=list(self._steps),
        )
