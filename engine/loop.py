"""The engine's loop: messages in, one step, one message out. Synchronous, on one thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llguidance import LLMatcher

from engine.fragmentation import Fragmentation
from engine.grammar import GrammarCache, GrammarCompiler, GrammarError
from engine.jit_compiles import JitCompiles
from engine.live_requests import live_requests
from engine.protocol import (
    Abort,
    CacheView,
    EngineInfo,
    EngineStats,
    Explain,
    Explained,
    Failure,
    Inspect,
    Inspection,
    ListRequests,
    Question,
    ReadTrace,
    Receipt,
    Refusal,
    Reply,
    RequestList,
    SequenceView,
    Shutdown,
    StepOutput,
    StepReport,
    Submit,
    ToEngine,
    TokenDelta,
    Trace,
    TraceView,
)
from engine.step_meter import StepMeter
from engine.step_trace import StepTrace
from scheduler.plan import StepPlan, StepResult
from scheduler.request import InvalidRequest, Request
from scheduler.scheduler import Progress, Scheduler
from scheduler.sequence import Sequence, Status

logger = logging.getLogger("quire.engine")

# A step that raises ends the requests in it. So many in a row mean that the device, not a
# request, is broken: better to die and be restarted than to fail everybody slowly.
MAX_FAILED_STEPS = 8

COMPILE_WAIT = 0.005  # seconds between two looks at the inbox while grammars alone are worked on
# While all that could run waits for the disk, the inbox is looked at so often.
DISK_WAIT_SECONDS = 0.02


class Launched(Protocol):
    """A step that is being computed."""

    def result(self) -> StepResult:
        """Waits for its end."""


class PlanRunner(Protocol):
    """What the loop needs of a runner; tests put a fake here."""

    def launch(self, plan: StepPlan) -> Launched:
        """Computes the plan, or begins to."""


class Inbox(Protocol):
    """Where messages come from."""

    def drain(self, wait: bool) -> list[ToEngine]:
        """All messages that are there; with `wait`, at least one.

        Raises:
            EOFError: nobody will ever write again.
        """


@dataclass(frozen=True, slots=True)
class _Step:
    """A plan, and what became of launching it."""

    plan: StepPlan
    launched: Launched | Exception


class EngineLoop:
    """Scheduler and runner, stepped in turn.

        plain        plan 1 | compute 1 | commit 1 | plan 2 | compute 2 | commit 2
        overlapped   plan 1 | compute 1            | compute 2          | compute 3
                            | plan 2               | commit 1 | plan 3  | commit 2 | plan 4

    Args:
        overlap: plan and launch a step before the tokens of the one before it are read. What only
            those tokens could tell (that an answer has ended) is noticed a step late, and the
            surplus token thrown away.
        trace: what it keeps of the steps; the same one is the scheduler's journal.
        meter: takes the time of the steps.
        jit_compiles: what was compiled since the engine was ready.
        at_end: called by `close`.

    Attributes:
        progress: steps begun; it grows as long as there is work and the loop is alive.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: PlanRunner,
        info: EngineInfo,
        trace: StepTrace | None = None,
        grammars: GrammarCache | None = None,
        meter: StepMeter | None = None,
        jit_compiles: JitCompiles | None = None,
        at_end: Callable[[], None] | None = None,
        overlap: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.info = info
        self.overlap = overlap
        self.progress = 0
        self._grammars = grammars or _grammars_of(info)
        self._deferred: dict[str, tuple[Request, Future[LLMatcher]]] = {}
        self._trace = trace
        self._meter = meter or StepMeter()
        self._jit_compiles = jit_compiles or JitCompiles()
        self._report: StepReport | None = None
        self._pending: _Step | None = None  # launched, its tokens not read yet
        self._fragmentation = Fragmentation(scheduler)
        self._at_end = at_end
        self._output = StepOutput(stats=EngineStats())
        self._steps = self._failed_in_a_row = 0
        self._prompt_tokens = self._generation_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step could do something, or a grammar is being compiled."""
        return self.scheduler.has_work or self._pending is not None or bool(self._deferred)

    def run(self, inbox: Inbox, send: Callable[[StepOutput | Reply], None]) -> None:
        """Serves until `Shutdown` or the end of the inbox."""
        while True:
            try:
                messages = inbox.drain(wait=not self.has_work)
            except EOFError:
                return
            for message in messages:
                if isinstance(message, Shutdown):
                    return
                if isinstance(message, Question):
                    send(self._answer(message))
                else:
                    self.take(message)
            if self.has_work:
                self.step()
            send(self.collect())

    def close(self) -> None:
        """Gives back what outlives the loop; nothing may be called after it."""
        if self._at_end is not None:
            self._at_end()

    def _answer(self, question: Question) -> Reply:
        match question:
            case Inspect():
                return self.inspect(question)
            case ReadTrace():
                return Trace(question.id, self._trace.view() if self._trace else TraceView())
            case ListRequests():
                deferred = [request for request, _ in self._deferred.values()]
                requests = live_requests(self.scheduler, deferred, time.monotonic())
                return RequestList(question.id, requests)
            case Explain():
                found = self.scheduler.explain(question.request)
                outlook = self.scheduler.outlook(question.request, found.found)
                return Explained(question.id, found, outlook)

    def take(self, message: Submit | Abort) -> None:
        """Queues or ends requests. What it has to say is in the next `collect`."""
        if isinstance(message, Abort):
            for request_id in message.request_ids:
                self._abort(request_id)
            for request_id, index in message.answers:
                self._tell(self.scheduler.abort(request_id, index=index))
            return
        for request in message.requests:
            grammar = request.sampling.grammar
            if grammar is None:
                self._submit(request)
            else:
                self._deferred[request.id] = request, self._grammars.get(grammar)

    def _abort(self, request_id: str) -> None:
        deferred = self._deferred.pop(request_id, None)
        if deferred is None:
            self._tell(self.scheduler.abort(request_id))
        else:
            self._output.deltas.extend(
                TokenDelta(request_id, index, [], "abort") for index in range(deferred[0].n)
            )

    def _submit_compiled(self) -> None:
        """Queues the requests whose grammar is ready."""
        ready = [pair for pair in self._deferred.values() if pair[1].done()]
        for request, compiled in ready:
            del self._deferred[request.id]
            error = compiled.exception()
            if error is None:
                self._submit(request)
            elif isinstance(error, GrammarError):
                assert request.sampling.grammar is not None
                self._refuse(request.id, request.sampling.grammar.refusal(str(error)))
            else:
                raise error

    def _refuse(self, request_id: str, error: InvalidRequest) -> None:
        self._output.refused.append(Refusal(request_id, error.message, error.param, error.code))

    def _submit(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
        except InvalidRequest as error:
            self._refuse(request.id, error)
        else:
            self._prompt_tokens += len(request.prompt_ids)
            self._output.admitted.append(request.id)

    def step(self) -> None:
        """One step. An exception ends the requests in it, no others."""
        if self._deferred:
            self._submit_compiled()
        if not self.scheduler.has_work and self._pending is None:
            wait([pair[1] for pair in self._deferred.values()], COMPILE_WAIT, FIRST_COMPLETED)
            return
        self._meter.begin()
        text = "the deadline is over, or would be before an answer"
        self._tell_ended(self.scheduler.expire(), text, "deadline_exceeded")
        if self.overlap:
            self._overlapped_step()
        else:
            self._plain_step()

    def _plain_step(self) -> None:
        """Plans, computes and commits a step."""
        plan = self._plan()
        if plan is not None:
            self._commit(self._launch(plan))

    def _overlapped_step(self) -> None:
        """Plans and launches a step, then commits the one before it."""
        plan, before = self._plan(), self._pending
        step = None if plan is None else self._launch(plan)
        self._pending = None
        good = before is None or self._commit(before)
        if step is None:
            return
        if isinstance(step.launched, Exception):
            self._fail(step.plan, step.launched)
        elif not good:
            self._end(step.plan, "the step before it failed")  # whose tokens and KV it reads
        else:
            self._pending = step

    def _plan(self) -> StepPlan | None:
        """The next step; None if nothing can run."""
        if self._trace:
            self._trace.begin()
        plan = self.scheduler.schedule()
        if self._trace:
            self._trace.planned(plan, self.scheduler)
        self._meter.planned()
        if not plan.empty:
            self.progress += 1
            return plan
        self.scheduler.commit(StepResult(plan.id, []))
        if self._pending is None:
            self.scheduler.cache.tiers.wait_for_disk(DISK_WAIT_SECONDS)
        return None

    def _launch(self, plan: StepPlan) -> _Step:
        try:
            return _Step(plan, self.runner.launch(plan))
        except Exception as error:
            return _Step(plan, error)

    def _commit(self, step: _Step) -> bool:
        """Takes the results of a step in; whether there are any."""
        plan = step.plan
        try:
            if isinstance(step.launched, Exception):
                raise step.launched
            result = step.launched.result()
        except Exception as error:
            self._fail(plan, error)
            return False
        seconds = self._meter.computed()
        if plan.num_tokens > len(plan.scheduled):  # it read prompts
            self.scheduler.preemption.computing.observe(plan.num_tokens, seconds)
        self.scheduler.pace.observe(plan, seconds)
        self._failed_in_a_row = 0
        self._steps += 1
        if result.broken:
            self._end_broken(result)
        self._tell(self.scheduler.commit(result))
        if self._trace:
            self._trace.ended(plan.id)
        self._report = self._meter.ended(plan.num_tokens)
        return True

    def _end_broken(self, result: StepResult) -> None:
        """Ends requests whose grammar cannot go on, before their tokens are taken in."""
        seqs = self.scheduler.sampled(result.plan_id)
        for place, why in result.broken.items():
            seq = seqs[place]
            grammar = seq.request.sampling.grammar
            if seq.status is not Status.FINISHED and grammar is not None:
                self._refuse(seq.request.id, grammar.refusal(why))
                self.scheduler.abort(seq.request.id)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= MAX_FAILED_STEPS:
            raise error
        requests = self._end(plan, f"{type(error).__name__} in the engine's step")
        fields = {
            "requests": [request.id for request in requests],
            "request_ids": list(dict.fromkeys(request.x_request_id for request in requests)),
        }
        logger.error("step %d failed", plan.id, exc_info=error, extra={"fields": fields})

    def _end(self, plan: StepPlan, text: str) -> list[Request]:
        """Ends the requests of a plan that has no results, and returns them."""
        if self._trace:
            self._trace.ended(plan.id, failed=True)
        ended = self.scheduler.fail(plan)
        self._tell_ended(ended, text, "request_failed")
        return list({item.seq.request.id: item.seq.request for item in ended}.values())

    def _tell_ended(self, progress: list[Progress], text: str, code: str) -> None:
        """Says why requests were ended, once for each of them."""
        failures: dict[str, Failure] = {}
        for item in progress:
            request_id = item.seq.request.id
            failure = failures.setdefault(request_id, Failure(request_id, text, code, []))
            failure.receipts.append(_receipt(item.seq))
        self._output.failed.extend(failures.values())

    def _tell(self, progress: list[Progress]) -> None:
        for item in progress:
            self._generation_tokens += len(item.tokens)
            self._output.deltas.append(
                TokenDelta(
                    item.seq.request.id,
                    item.seq.index,
                    item.tokens,
                    item.finish_reason,
                    item.stop_reason,
                    item.seq.num_cached or 0,
                    item.scores,
                    item.prompt_scores,
                    None if item.finish_reason is None else _receipt(item.seq),
                )
            )

    def inspect(self, message: Inspect) -> Inspection:
        """A look at the cache between two steps."""
        scheduler, problem = self.scheduler, None
        if message.verify:
            try:
                scheduler.check()
            except AssertionError as error:
                problem = str(error) or "an invariant does not hold"
        pool, tiers = scheduler.cache.pool, scheduler.cache.tiers
        view = CacheView(
            block_size=scheduler.cache.block_size,
            windows=list(scheduler.cache.windows),
            states=bytes(pool.states),
            tags=bytes(pool.tags),
            host_blocks=tiers.host.num_slots,
            host_blocks_used=tiers.host.num_used,
            disk_blocks=tiers.disk.num_blocks if tiers.disk else 0,
            sequences=[_view(seq) for seq in [*scheduler.running, *scheduler.waiting]],
        )
        return Inspection(message.id, view, problem)

    def collect(self) -> StepOutput:
        """All that was said since the last call, with a fresh snapshot."""
        output, scheduler = self._output, self.scheduler
        pool, tiers = scheduler.cache.pool, scheduler.cache.tiers
        disk = tiers.disk
        stats = EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._deferred),
            waiting_deferred=scheduler.num_deferred + len(self._deferred),
            blocks_total=pool.num_blocks,
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_evicted=pool.num_evicted,
            prefix_queries=scheduler.prefix.queries,
            prefix_hits=scheduler.prefix.hits,
            prefix_recovered=scheduler.prefix.recovered,
            preemptions=scheduler.num_preemptions,
            preemptions_swap=scheduler.preemption.num_swapped,
            preemptions_recompute=scheduler.preemption.num_recomputed,
            host_blocks_total=tiers.host.num_slots,
            host_blocks_used=tiers.host.num_used,
            host_hits=tiers.host_hits,
            fragmentation=self._fragmentation.measure(),
            jit_compiles=self._jit_compiles.count,
            disk_blocks=disk.num_blocks if disk else 0,
            disk_bytes=disk.num_bytes if disk else 0,
            disk_errors=disk.num_errors if disk else 0,
            disk_hits=tiers.disk_hits,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
        )
        report, self._report = self._report, None
        self._output = StepOutput(stats=stats)
        return StepOutput(
            stats=stats,
            admitted=output.admitted,
            refused=output.refused,
            failed=output.failed,
            deltas=output.deltas,
            step=report,
        )


def _receipt(seq: Sequence) -> Receipt:
    account = seq.account
    return Receipt(
        queue=account.queue,
        prefill=account.prefill,
        decode=account.decode,
        recomputed_tokens=account.recomputed,
        preemptions=seq.num_preemptions,
        blocks_peak=account.blocks_peak,
        block_seconds=account.block_seconds,
        preempted_at=[moment - account.arrived for moment in account.preempted],
    )


def _view(seq: Sequence) -> SequenceView:
    return SequenceView(
        request_id=seq.request.id,
        index=seq.index,
        status=seq.status.value,
        tokens=len(seq.tokens),
        computed=seq.num_computed,
        preemptions=seq.num_preemptions,
        swaps=seq.num_swaps,
        tables=[table.blocks for table in seq.blocks.tables],
    )


def _grammars_of(info: EngineInfo) -> GrammarCache:
    return GrammarCache(GrammarCompiler(Path(info.model_path), info.vocab_size, info.eos_token_ids))
