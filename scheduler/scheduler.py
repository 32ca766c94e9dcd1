"""Continuous batching: what is computed next, and what became of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from paged_cache.manager import KVCacheManager
from scheduler.plan import Admitted, ScheduledSeq, SlotBlocks, StepPlan, StepResult
from scheduler.random_numbers import uniform
from scheduler.request import InvalidRequest, Request
from scheduler.sequence import NO_SLOT, Sequence, Status
from scheduler.stopping import FinishReason, finish_reason


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did for one sequence: its new tokens, and why it ended if it did."""

    seq: Sequence
    tokens: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


class Scheduler:
    """First come, first served, within a token budget per step.

    Each step gives tokens to sequences until their `num_computed` catches up with their length:
    first one token to everybody who needs just one (decodes), then chunks of prompts to running
    sequences, then to waiting ones while slots and blocks last. When blocks run out, the newest
    running sequence gives all of its own back and waits, first in the queue, to be recomputed.

    Every running sequence arrived before every waiting one, so the oldest always makes progress.
    The idea of one counter in place of phases is vLLM's (v1 scheduler).
    """

    def __init__(
        self,
        cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.cache = cache
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = eos_token_ids
        self.num_preemptions = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self._requests: dict[str, list[Sequence]] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._planned: dict[int, list[Sequence]] = {}  # plan id -> who gets a token from it
        self._next_plan = 0
        self._next_order = 0

    # ------------------------------------------------------------------ requests in and out

    @property
    def has_work(self) -> bool:
        """Whether a step could do something."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues the n sequences of `request`.

        Raises:
            InvalidRequest: the id is taken, or not even an empty pool could hold the answer.
        """
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is in use", "id")
        # The last token of an answer is never read back by attention, so it needs no room.
        length = len(request.prompt_ids) + (request.sampling.max_tokens or 1) - 1
        if not self.cache.fits_empty(length):
            raise InvalidRequest(
                f"the request needs {self.cache.blocks_for(length)} KV blocks of "
                f"{self.cache.block_size} tokens, but the pool has {self.cache.pool.num_blocks}: "
                "shorten the prompt or max_tokens",
                "prompt",
                "kv_capacity_exceeded",
            )
        seqs = []
        for index in range(request.n):
            seqs.append(Sequence(request, index, self._next_order))
            self._next_order += 1
        self._requests[request.id] = seqs
        self.waiting.extend(seqs)

    def abort(self, request_id: str) -> list[Progress]:
        """Ends what is left of a request and frees its blocks at once; unknown ids are ignored."""
        live = [s for s in self._requests.get(request_id, []) if s.status is not Status.FINISHED]
        for seq in live:
            self._finish(seq)
        return [Progress(seq, [], "abort") for seq in live]

    # ------------------------------------------------------------------ one step

    def schedule(self) -> StepPlan:
        """Plans the next step; the plan is empty when nothing can run."""
        step = _Step(StepPlan(self._next_plan), self.max_num_batched_tokens)
        self._next_plan += 1
        ready = [seq for seq in self.running if not seq.exhausted]
        # Decodes first: the latency of a token that somebody waits for beats a new prompt's.
        for seq in [s for s in ready if s.todo == 1] + [s for s in ready if s.todo > 1]:
            if not step.budget:
                break
            if seq.status is Status.RUNNING:  # it may have been preempted for one before it
                self._give(step, seq)
        if not step.preempted:
            self._admit(step)
        self._close(step)
        return step.plan

    def _give(self, step: _Step, seq: Sequence) -> None:
        """Gives `seq` tokens of this step, preempting newer sequences while blocks are missing."""
        count = min(seq.todo, step.budget)
        while (new := self.cache.reserve(seq.table, seq.num_computed + count)) is None:
            victim = self.running[-1]
            step.withdraw(victim)
            self._preempt(victim)
            step.preempted = True
            if victim is seq:
                return
        step.add(seq, count, SlotBlocks(seq.slot, new.first, new.blocks))

    def _admit(self, step: _Step) -> None:
        """Starts waiting sequences, oldest first, until a budget ends. A sequence gets the blocks
        of its whole prompt at once, so that chunks of a started prompt never wait for blocks."""
        while self.waiting and step.budget and self._free_slots:
            seq = self.waiting[0]
            new = self.cache.reserve(seq.table, len(seq.tokens))
            if new is None:
                return
            self.waiting.popleft()
            seq.slot, seq.status = self._free_slots.pop(), Status.RUNNING
            self.running.append(seq)
            step.plan.admitted.append(Admitted(seq.slot, seq.tokens[:], seq.request.sampling))
            blocks = SlotBlocks(seq.slot, new.first, new.blocks)
            step.add(seq, min(seq.todo, step.budget), blocks)

    def _close(self, step: _Step) -> None:
        """Writes the chosen sequences into the plan, single tokens first, and counts their tokens
        as computed."""
        sampled = []
        for seq, (count, blocks) in sorted(step.chosen.items(), key=lambda item: item[1][0] > 1):
            start = seq.num_computed
            seq.num_computed += count
            wants_token = seq.todo == 0
            number = 0.0
            if wants_token:
                sampling = seq.request.sampling
                if not sampling.greedy:
                    number = uniform(sampling.seed or 0, seq.index, seq.num_generated)
                seq.in_flight += 1
                sampled.append(seq)
            step.plan.scheduled.append(ScheduledSeq(seq.slot, start, count, wants_token, number))
            if blocks.blocks:
                step.plan.new_blocks.append(blocks)
        self._planned[step.plan.id] = sampled

    def commit(self, result: StepResult) -> list[Progress]:
        """Takes the tokens of a plan in. Sequences that ended since it was made are passed over."""
        progress = []
        for seq, token in zip(self._planned.pop(result.plan_id), result.tokens, strict=True):
            if seq.status is Status.FINISHED:
                continue
            seq.in_flight -= 1
            seq.tokens.append(token)
            reason, stop = finish_reason(seq, self.eos_token_ids)
            if reason is not None:
                self._finish(seq)
            progress.append(Progress(seq, [token], reason, stop))
        return progress

    def fail(self, plan: StepPlan) -> list[str]:
        """Ends every request that `plan` touches, after its step raised.

        Returns:
            their ids.
        """
        slots = {item.slot for item in plan.scheduled}
        self._planned.pop(plan.id, None)
        failed = list(dict.fromkeys(s.request.id for s in self.running if s.slot in slots))
        for request_id in failed:
            self.abort(request_id)
        return failed

    # ------------------------------------------------------------------ state changes

    def _preempt(self, seq: Sequence) -> None:
        """Takes slot and blocks away; `seq` waits before everybody else and will be recomputed."""
        self.running.remove(seq)
        self._vacate(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)

    def _finish(self, seq: Sequence) -> None:
        """Ends `seq` and forgets its request once all of its sequences ended."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self._vacate(seq)
        else:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED
        if all(s.status is Status.FINISHED for s in self._requests[seq.request.id]):
            del self._requests[seq.request.id]

    def _vacate(self, seq: Sequence) -> None:
        self.cache.release(seq.table)
        self._free_slots.append(seq.slot)
        seq.slot = NO_SLOT

    def check(self) -> None:
        """Raises AssertionError where an invariant does not hold: for idle moments and tests."""
        self.cache.pool.check()
        counts: dict[int, int] = {}
        for seq in self.running:
            for block in seq.table.blocks:
                counts[block] = counts.get(block, 0) + 1
        pool = self.cache.pool
        assert counts == {b: pool.refs(b) for b in range(pool.num_blocks) if pool.refs(b)}
        assert all(not seq.table.blocks for seq in self.waiting), "a waiting sequence holds blocks"
        orders = [seq.order for seq in [*self.running, *self.waiting]]
        assert orders == sorted(orders), "a newer sequence stands before an older one"


class _Step:
    """The step being planned: what is left of its budget and who was chosen so far."""

    def __init__(self, plan: StepPlan, budget: int) -> None:
        self.plan = plan
        self.budget = budget
        self.chosen: dict[Sequence, tuple[int, SlotBlocks]] = {}
        self.preempted = False

    def add(self, seq: Sequence, count: int, blocks: SlotBlocks) -> None:
        self.chosen[seq] = (count, blocks)
        self.budget -= count

    def withdraw(self, seq: Sequence) -> None:
        """Takes back what `seq` was given in this step, if anything."""
        count, _ = self.chosen.pop(seq, (0, None))
        self.budget += count
