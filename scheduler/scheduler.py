"""Continuous batching: what is computed next, and what became of it."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from paged_cache.block_copy import BlockCopy
from paged_cache.explain import Explanation
from paged_cache.manager import KVCacheManager, NewBlocks
from scheduler.deadlines import Deadlines
from scheduler.fairness import INPUT, OUTPUT, FairShares
from scheduler.journal import Journal, Wait
from scheduler.outlook import Outlook
from scheduler.pace import Pace
from scheduler.plan import Admitted, ScheduledSeq, Scores, SlotBlocks, StepPlan, StepResult
from scheduler.preemption import Preemption
from scheduler.random_numbers import uniform
from scheduler.request import InvalidRequest, Request
from scheduler.sequence import NO_SLOT, Sequence, Status
from scheduler.stopping import FinishReason, finish_reason
from scheduler.waiting import WaitingQueue


class Progress(msgspec.Struct, frozen=True):
    """What a step did for one sequence: its new tokens and their log-probabilities, those of a
    part of its prompt, and why it ended if it did."""

    seq: Sequence
    tokens: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    scores: Scores | None = None
    prompt_scores: Scores | None = None


class Scheduler:
    """Who waits is started in the order of its `WaitingQueue`, within a token budget per step.

    Each step gives tokens to sequences until their `num_computed` catches up with their length:
    first one token to everybody who needs just one (decodes), then chunks of prompts to running
    sequences, then to waiting ones while slots and blocks last. When blocks run out, a running
    sequence gives all of its own back and waits to be recomputed: of the worst priority, the newest
    of those that had to do so least often. The oldest one of the best priority never has to, so
    there is always one that advances.
    The idea of one counter in place of phases is vLLM's (v1 scheduler).

    Args:
        watermark: blocks that an admission leaves free for those who run already.
        reserve: admit only while everybody could grow to the full length asked for; then nobody is
            ever preempted.
        shares: what each tenant was served.
    """

    def __init__(
        self,
        cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        journal: Journal | None = None,
        watermark: int = 0,
        reserve: bool = False,
        shares: FairShares | None = None,
        clock: Callable[[], float] = time.monotonic,
        preemption: Preemption | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.cache = cache
        self._journal = journal or Journal()
        self._clock = clock
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = eos_token_ids
        self.watermark = watermark
        self.reserve = reserve
        self.preemption = preemption or Preemption()
        self.pace = pace or Pace()
        self.prefix = PrefixCounts()
        self.waiting = WaitingQueue(shares)
        self.running: list[Sequence] = []  # by rank
        self._deadlines = Deadlines()
        self._requests: dict[str, list[Sequence]] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._planned: dict[int, _Awaited] = {}  # by plan id
        self._next_plan = 0
        self._next_order = 0

    # ------------------------------------------------------------------ requests in and out

    @property
    def num_preemptions(self) -> int:
        """Sequences that gave way, since start."""
        return self.preemption.total

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
        needed = self._most_blocks(request)
        if needed > self.cache.pool.num_blocks:
            raise InvalidRequest(
                f"the request needs {needed} KV blocks of {self.cache.block_size} tokens, but the "
                f"pool has {self.cache.pool.num_blocks}: shorten the prompt or max_tokens",
                "prompt",
                "kv_capacity_exceeded",
            )
        seqs: list[Sequence] = []
        for index in range(request.n):
            blocks = self.cache.open(request.cache_salt, request.tenant)
            leader = seqs[0] if seqs else None
            seqs.append(Sequence(request, index, self._next_order, blocks, needed, leader))
            self._next_order += 1
        self._requests[request.id] = seqs
        self._deadlines.add(request)
        for seq in seqs:
            self.waiting.add(seq)
            self._journal.queued(seq)

    def _most_blocks(self, request: Request) -> int:
        """Blocks that one answer of `request` holds at the most."""
        # The last token of an answer is never read back by attention, so it needs no room.
        length = len(request.prompt_ids) + (request.sampling.max_tokens or 1) - 1
        return self.cache.most_blocks(length, self.max_num_batched_tokens)

    def abort(
        self, request_id: str, reason: str = "abort", *, index: int | None = None
    ) -> list[Progress]:
        """Ends what is left of a request, or of its answer `index`, and frees the blocks at once;
        unknown ids are ignored. The journal gets the `reason`."""
        seqs = [s for s in self._requests.get(request_id, []) if index in (None, s.index)]
        live = [s for s in seqs if s.status is not Status.FINISHED]
        for seq in live:
            self._finish(seq, reason)
        return [Progress(seq, [], "abort") for seq in live]

    def live(self) -> list[list[Sequence]]:
        """The unfinished sequences of every request, in order of arrival."""
        return [
            [seq for seq in seqs if seq.status is not Status.FINISHED]
            for seqs in self._requests.values()
        ]

    def expire(self) -> list[Progress]:
        """Ends the requests whose deadline is over, and those in the queue that cannot meet theirs
        as far as can be told from how fast the queue goes on."""
        late = self._deadlines.late(self._clock(), self._requests, self.waiting)
        return [item for request_id in late for item in self.abort(request_id, "deadline")]

    @property
    def num_deferred(self) -> int:
        """Waiting sequences that would not start if there were room: the disk is being read for
        them, or their prompt is being computed by another answer of their request."""
        leaders = (s for s in self.running if s.request.n > 1 and s.num_computed < s.num_prompt)
        return self.cache.tiers.num_reading + sum(
            seq.leader is leader and seq.status is Status.WAITING
            for leader in leaders
            for seq in self._requests[leader.request.id]
        )

    def explain(self, request: Request) -> Explanation:
        """What the cache would find of the prompt of `request`, and why not more."""
        return self.cache.explain(request.prompt_ids, request.cache_salt, request.tenant)

    def outlook(self, request: Request, found: int) -> Outlook:
        """What would become of `request` now; `found` tokens of its prompt are cached."""
        blocks, cache = self._most_blocks(request), self.cache
        if blocks > cache.pool.num_blocks:
            return Outlook("refuse", blocks, wait=None)
        prompt = len(request.prompt_ids)
        ahead = [seq for seq in self.waiting if seq.request.priority <= request.priority]
        missing = cache.most_blocks(prompt, self.max_num_batched_tokens)
        missing -= found // cache.block_size * len(cache.windows)
        spare = self.watermark if self.running else 0
        room = missing + spare <= cache.pool.num_free and self._may_grow(blocks)
        if room and self._free_slots and not ahead:
            return Outlook("admit", blocks)
        rate = self._deadlines.rate.per_second(self._clock())
        tokens = prompt + sum(1 if seq.leader else seq.num_prompt for seq in ahead)
        wait = tokens / rate if math.isfinite(rate) else None
        return Outlook("queue", blocks, len(ahead), wait)

    # ------------------------------------------------------------------ one step

    def schedule(self) -> StepPlan:
        """Plans the next step; the plan is empty when nothing can run."""
        self.cache.tiers.poll()
        step = _Step(StepPlan(self._next_plan), self.max_num_batched_tokens)
        self._next_plan += 1
        single: list[Sequence] = []
        several: list[Sequence] = []
        for seq in self.running:
            if not seq.exhausted and (todo := seq.todo):
                (single if todo == 1 else several).append(seq)
        # Decodes first: the latency of a token that somebody waits for beats a new prompt's.
        self._give_each(step, single)
        reading = len(several) + min(len(self.waiting), len(self._free_slots))
        if self.pace.stretch and step.chosen and reading:
            step.budget = min(step.budget, self.pace.room(len(step.chosen), reading))
        self._give_each(step, several)
        # From here on nobody is preempted in this step: what it computes can be found by others.
        for seq, share in step.chosen.items():
            self.cache.publish(seq.blocks, seq.tokens, seq.num_computed + share.count)
        why = Wait.PREEMPTION if step.preempted else self._admit(step)
        if self.waiting:
            first = self.waiting.first(lambda s: not self._waits_for_leader(s))
            self._journal.waits(first or next(iter(self.waiting)), why)
        else:
            self._deadlines.rate.rest()
        self._close(step)
        return step.plan

    def _give_each(self, step: _Step, seqs: list[Sequence]) -> None:
        """Gives them tokens of this step while its budget lasts."""
        for seq in seqs:
            if not step.budget:
                break
            if seq.status is Status.RUNNING:  # it may have been preempted for one before it
                self._give(step, seq)

    def _give(self, step: _Step, seq: Sequence) -> None:
        """Gives `seq` tokens of this step, preempting sequences while blocks are missing."""
        count = min(seq.todo, step.budget)
        start = seq.num_computed
        while (grown := self.cache.grow(seq.blocks, start, start + count)) is None:
            victim = self._victim()
            step.withdraw(victim)
            self._preempt(victim)
            self._journal.preempted(victim, seq)
            step.preempted = True
            if victim is seq:
                return
        if grown.new:
            seq.account.hold(seq.blocks.num_held, self._clock())
        step.choose(seq, _Share(count, grown.new, grown.copies))

    def _victim(self) -> Sequence:
        """Who gives way: never the first in rank while there are others, and of one priority nobody
        for the second time while somebody else never did. Taking turns like this, nobody is
        computed in vain forever."""
        return min(
            self.running[1:] or self.running,
            key=lambda s: (-s.request.priority, s.num_preemptions, -s.order),
        )

    def _admit(self, step: _Step) -> Wait:
        """Starts waiting sequences, in the queue's order, until a budget ends. A sequence gets the
        blocks of its whole prompt at once, so that chunks of a started prompt hardly wait for
        blocks. Who waits for something other than room is passed over.

        Returns:
            what the first one waits for, if there is one.
        """
        while step.budget and self._free_slots:
            seq = self.waiting.first(self._is_ready)
            if seq is None:
                reading = any(s.blocks.awaited for s in self.waiting)
                return Wait.DISK if reading else Wait.LEADER
            share = self._enter(seq, step.budget) if self._may_grow(seq.most_blocks) else None
            if share is None:
                return Wait.BLOCKS
            self.waiting.remove(seq)
            seq.slot, seq.status = self._free_slots.pop(), Status.RUNNING
            bisect.insort(self.running, seq, key=lambda s: s.rank)
            seq.account.enter(seq.num_computed, seq.blocks.num_held, self._clock())
            self._journal.admitted(seq)
            step.plan.admitted.append(
                Admitted(seq.slot, seq.tokens[:], seq.num_prompt, seq.request.sampling)
            )
            step.choose(seq, share)
            self.cache.publish(seq.blocks, seq.tokens, seq.num_computed + share.count)
        return Wait.BUDGET if not step.budget else Wait.SLOT

    def _is_ready(self, seq: Sequence) -> bool:
        """Whether room is all that `seq` may lack. The disk is asked for its blocks here."""
        return not self._waits_for_leader(seq) and not self.cache.fetch(
            seq.blocks, seq.tokens, self._reusable(seq)
        )

    def _waits_for_leader(self, seq: Sequence) -> bool:
        """Whether the prompt of `seq` is being computed by another answer of its request."""
        leader = seq.leader
        return (
            leader is not None
            and leader.status is Status.RUNNING
            and leader.num_computed < leader.num_prompt
        )

    def _may_grow(self, blocks: int) -> bool:
        """Whether a sequence beside all that run could get the `blocks` that it may ask for;
        without reservations that is left to be seen."""
        if not self.reserve:
            return True
        most = sum(running.most_blocks for running in self.running)
        return most + blocks <= self.cache.pool.num_blocks

    def _enter(self, seq: Sequence, budget: int) -> _Share | None:
        """Blocks for a waiting sequence: those of its leader, those that are found by content, and
        new ones. None if too few are free."""
        spare = self.watermark if self.running else 0
        forked = self._fork(seq, spare)
        if forked is not None:
            return forked
        started = self.cache.start(seq.blocks, seq.tokens, budget, spare, self._reusable(seq))
        if started is None:
            return None
        found, new = started
        self._count_found(seq, found)
        seq.num_computed = found
        return _Share(min(seq.todo, budget), new, [])

    def _reusable(self, seq: Sequence) -> int:
        """Positions before this one may be found. Those whose logits are wanted must be computed,
        whatever the cache holds."""
        return seq.length if seq.num_scored >= seq.to_score else seq.num_scored

    def _fork(self, seq: Sequence, spare: int) -> _Share | None:
        """Lets `seq` begin from the blocks of its leader, whose prompt is computed. The prompt's
        last token is computed again for its logits, in a copy of the block that it lies in."""
        leader, last = seq.leader, seq.num_prompt - 1
        if leader is None or leader.status is not Status.RUNNING or seq.num_generated:
            return None
        if self.cache.pool.num_free < spare + len(self.cache.windows):  # a copy in every group
            return None
        if not self.cache.fork(leader.blocks, seq.blocks, last):
            return None
        grown = self.cache.grow(seq.blocks, last, last + 1)
        if grown is None:
            self.cache.release(seq.blocks)
            return None
        seq.num_computed = last
        seq.num_cached = 0 if seq.num_cached is None else seq.num_cached
        return _Share(1, self.cache.entries(seq.blocks), grown.copies)

    def _count_found(self, seq: Sequence, found: int) -> None:
        """Hits of clients and hits after a preemption are told apart."""
        if seq.num_cached is None:
            seq.num_cached = found
            self.prefix.queries += len(seq.tokens)
            self.prefix.hits += found
            self._deadlines.rate.started(1 if seq.leader else seq.num_prompt, self._clock())
            self.waiting.shares.serve(seq.request.tenant, INPUT * (seq.num_prompt - found))
        else:
            self.prefix.recovered += found

    def _close(self, step: _Step) -> None:
        """Writes the chosen sequences into the plan, single tokens first, and counts their tokens
        as computed."""
        plan, awaited = step.plan, _Awaited(list(step.chosen), [], [])
        copies, disk_copies = self.cache.take_copies()
        plan.copies.extend(copies)
        plan.disk_copies.extend(disk_copies)
        for seq, share in sorted(step.chosen.items(), key=lambda item: item[1].count > 1):
            start = seq.num_computed
            seq.num_computed += share.count
            wants_token = seq.todo == 0
            number = 0.0
            if wants_token:
                sampling = seq.request.sampling
                if not sampling.greedy:
                    number = uniform(sampling.seed or 0, seq.index, seq.num_generated)
                self.waiting.shares.serve(seq.request.tenant, OUTPUT)
                seq.in_flight += 1
                awaited.tokens.append(seq)
            first, scored = seq.num_scored, min(seq.num_computed, seq.to_score) - seq.num_scored
            if scored > 0:
                seq.num_scored += scored
                awaited.scores.append(seq)
            plan.scheduled.append(
                ScheduledSeq(
                    seq.slot, start, share.count, wants_token, number, first, max(scored, 0)
                )
            )
            plan.copies.extend(share.copies)
            for new in share.new:
                plan.new_blocks.append(SlotBlocks(seq.slot, new.group, new.first, new.blocks))
        self._planned[plan.id] = awaited

    def sampled(self, plan_id: int) -> list[Sequence]:
        """Who gets a token of a plan that is not committed yet, in the plan's order."""
        return self._planned[plan_id].tokens

    def commit(self, result: StepResult) -> list[Progress]:
        """Takes the tokens of a plan in. Sequences that ended since it was made are passed over."""
        awaited = self._planned.pop(result.plan_id)
        progress = [
            Progress(seq, [], prompt_scores=scores)
            for seq, scores in zip(awaited.scores, result.prompt_scores, strict=True)
            if seq.status is not Status.FINISHED
        ]
        scores = result.scores or [None] * len(result.tokens)
        for seq, token, told in zip(awaited.tokens, result.tokens, scores, strict=True):
            if seq.status is not Status.FINISHED:
                progress.append(self._take(seq, token, told))
        return progress

    def _take(self, seq: Sequence, token: int, scores: Scores | None) -> Progress:
        """One sampled token, which may be the last of its answer."""
        seq.in_flight -= 1
        if seq.request.sampling.max_tokens == 0:
            self._finish(seq, "length")
            return Progress(seq, [], "length")
        seq.tokens.append(token)
        if seq.account.first_token is None:
            seq.account.first_token = self._clock()
        reason, stop = finish_reason(seq, self.eos_token_ids)
        if reason is not None:
            if seq.status is Status.RUNNING:
                # Its last block may have been planned full before the tokens in it were known.
                self.cache.publish(seq.blocks, seq.tokens, len(seq.tokens) - 1)
            self._finish(seq, reason)
        return Progress(seq, [token], reason, stop, scores)

    def fail(self, plan: StepPlan) -> list[Progress]:
        """Ends every request that `plan` touches, after its step raised."""
        awaited = self._planned.pop(plan.id)
        self.cache.forget_all()  # what the step should have written may not be there
        live = [seq for seq in awaited.computed if seq.status is not Status.FINISHED]
        failed = dict.fromkeys(seq.request.id for seq in live)
        return [item for request_id in failed for item in self.abort(request_id, "error")]

    # ------------------------------------------------------------------ state changes

    def _preempt(self, seq: Sequence) -> None:
        """Takes slot and blocks away; `seq` waits before those that never ran. Its blocks move to
        host memory or will be recomputed."""
        swapped = self.preemption.prefers_swap(
            seq.blocks.num_held, seq.num_computed
        ) and self.cache.swap_out(seq.blocks, seq.tokens, seq.num_computed)
        if not swapped:
            self.cache.release(seq.blocks)
        self.preemption.count(swapped)
        self._vacate(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        seq.account.preempted.append(self._clock())
        seq.num_swaps += swapped
        seq.status = Status.WAITING
        self.waiting.put_back(seq)

    def _finish(self, seq: Sequence, reason: str) -> None:
        """Ends `seq` and forgets its request once all of its sequences ended."""
        self.cache.release(seq.blocks)
        if seq.status is Status.RUNNING:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED
        seq.account.ended = self._clock()
        self._journal.finished(seq, reason)
        if all(s.status is Status.FINISHED for s in self._requests[seq.request.id]):
            del self._requests[seq.request.id]
            self._deadlines.discard(seq.request.id)

    def _vacate(self, seq: Sequence) -> None:
        self.running.remove(seq)
        seq.account.leave(seq.num_computed, self._clock())
        self._free_slots.append(seq.slot)
        seq.slot = NO_SLOT

    def check(self) -> None:
        """Raises AssertionError where an invariant does not hold: for idle moments and tests."""
        self.cache.pool.check()
        kept = [block for seq in [*self.running, *self.waiting] for block in seq.blocks.kept]
        self.cache.tiers.host.check(kept)
        counts: dict[int, int] = {}
        for seq in self.running:
            for table in seq.blocks.tables:
                for block in table.held:
                    counts[block] = counts.get(block, 0) + 1
        pool = self.cache.pool
        assert counts == {b: pool.refs(b) for b in range(pool.num_blocks) if pool.refs(b)}
        holds = [table.blocks for seq in self.waiting for table in seq.blocks.tables]
        assert not any(holds), "a waiting sequence holds blocks"
        ranks = [seq.rank for seq in self.running]
        assert ranks == sorted(ranks), "a newer sequence stands before an older one"
        self.waiting.check()
        if self.reserve:
            most = sum(seq.most_blocks for seq in self.running)
            assert most <= pool.num_blocks, "more was promised than there is"


@dataclass(slots=True)
class PrefixCounts:
    """Tokens, since start. What is found again after a preemption is no client's hit."""

    queries: int = 0
    hits: int = 0
    recovered: int = 0


@dataclass(frozen=True, slots=True)
class _Awaited:
    """Who is computed in a plan, who gets a token and who log-probabilities of its prompt."""

    computed: list[Sequence]
    tokens: list[Sequence]
    scores: list[Sequence]


class _Share(msgspec.Struct, frozen=True):
    """What one sequence gets of a step."""

    count: int
    new: list[NewBlocks]
    copies: list[BlockCopy]


class _Step:
    """The step being planned: what is left of its budget and who was chosen so far."""

    def __init__(self, plan: StepPlan, budget: int) -> None:
        self.plan = plan
        self.budget = budget
        self.chosen: dict[Sequence, _Share] = {}
        self.preempted = False

    def choose(self, seq: Sequence, share: _Share) -> None:
        self.chosen[seq] = share
        self.budget -= share.count

    def withdraw(self, seq: Sequence) -> None:
        """Takes back what `seq` was given in this step, if anything."""
        share = self.chosen.pop(seq, None)
        if share is not None:
            self.budget += share.count
