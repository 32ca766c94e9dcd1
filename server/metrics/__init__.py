"""What `/metrics` says, in the `vllm:` dialect that dashboards and autoscalers already read.

Times of requests are taken in this process: they are what a client sees, less the network. Where
they went (queue, prefill, decode) is said by the engine. No label takes a client's string. Every
metric is explained in docs/metrics.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from engine.protocol import EngineInfo, EngineStats, Receipt, StepOutput
from scheduler.request import Request
from server import __version__
from server.metrics import edges
from server.metrics.answer_clock import AnswerClock
from server.metrics.engine_state import EngineState, read_engine
from server.metrics.exposition import Registry
from server.metrics.failures import FAILURES, REJECTIONS
from server.metrics.process import ProcessMetrics

__all__ = ["AnswerClock", "Metrics", "Slo"]

FINISHED_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True)
class Slo:
    """What is promised, in seconds: of the first token, and of each further one on average."""

    ttft: float = 1.0
    tpot: float = 0.1


class Metrics:
    """Everything that is counted and measured of one server."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        info: EngineInfo,
        model_name: str,
        *,
        slo: Slo | None = None,
        startup: Mapping[str, float] | None = None,
        stalled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args:
        stats: gives the engine's newest snapshot; it is asked at every scrape.
        model_name: the value of that label, whatever name a client uses.
        startup: seconds that each phase of the start took.
        stalled: whether the engine has work and makes no step.
        """
        self._stats, self._stalled = stats, stalled
        self._slo = slo or Slo()
        self._orphans: dict[str, Sequence[AnswerClock]] = {}
        self._last_step = 0.0
        self.registry = registry = Registry[EngineState]({"model_name": model_name, "engine": "0"})
        read_engine(registry, info)
        counter, histogram = registry.counter, registry.histogram
        longest = edges.tokens(info.max_model_len)

        self.prompt_tokens = counter(
            "vllm:prompt_tokens_total", "Tokens of prompts that were read, cached ones included."
        )
        self.prompt_tokens_cached = counter(
            "vllm:prompt_tokens_cached_total", "Tokens of prompts that were found cached."
        )
        self.generation_tokens = counter("vllm:generation_tokens_total", "Tokens generated.")
        self._finished = {
            reason: counter(
                "vllm:request_success_total", "Answers that ended.", finished_reason=reason
            )
            for reason in FINISHED_REASONS
        }
        self._rejections = {
            reason: counter(
                "vllm:admission_rejections_total",
                "Requests turned away because of load.",
                reason=reason,
            )
            for reason in REJECTIONS
        }
        self._failures = {
            reason: counter("quire:request_failure_total", "Requests that failed.", reason=reason)
            for reason in FAILURES
        }
        self._within = {
            slo: counter(
                "quire:requests_within_slo_total",
                "Answers within the limits: of TTFT, of TPOT, of both.",
                slo=slo,
            )
            for slo in ("ttft", "tpot", "both")
        }

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds",
            "From the arrival of a request to the first token of an answer.",
            edges.FIRST_TOKEN,
        )
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds",
            "From a token to the next one, once per token.",
            edges.PER_TOKEN,
        )
        self.per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first, once per answer of two tokens or more.",
            edges.PER_TOKEN,
        )
        self.whole_request = histogram(
            "vllm:e2e_request_latency_seconds",
            "From the arrival of a request to the end of an answer.",
            edges.REQUEST,
        )
        self._queue, self._prefill, self._decode, self._inference = (
            histogram(f"vllm:request_{phase}_time_seconds", text, edges.REQUEST)
            for phase, text in (
                ("queue", "From the building of a request to its first step."),
                ("prefill", "From the first step to the first token."),
                ("decode", "From the first token to the end."),
                ("inference", "From the first step to the end."),
            )
        )
        self.request_prompt_tokens = histogram(
            "vllm:request_prompt_tokens", "Tokens of the prompt of an answer.", longest
        )
        self.request_generation_tokens = histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", longest
        )
        self.request_max_tokens = histogram(
            "vllm:request_params_max_tokens", "max_tokens of an answer.", longest
        )
        self._request_n = histogram(
            "vllm:request_params_n", "Answers that a prompt asks for.", edges.ANSWERS
        )
        self._request_preemptions = histogram(
            "vllm:request_num_preemptions", "Preemptions of an answer.", edges.PREEMPTIONS
        )
        self._step_tokens = histogram(
            "vllm:iteration_tokens_total", "Tokens computed in a step.", edges.STEP_TOKENS
        )
        self._step_seconds = histogram(
            "quire:engine_step_seconds", "From planning a step to its tokens.", edges.PER_TOKEN
        )
        self._scheduler_seconds = histogram(
            "quire:scheduler_seconds", "Planning and committing of a step.", edges.SCHEDULER
        )
        self.event_loop_lag = histogram(
            "quire:event_loop_lag_seconds",
            "How late a timer of the HTTP process rings.",
            edges.LAG,
        )

        for phase, seconds in (startup or {}).items():
            registry.constant(
                "quire:startup_seconds", "What the start took, by phase.", seconds, phase=phase
            )
        registry.constant(
            "quire:build_info",
            "Versions.",
            1,
            version=__version__,
            python=".".join(map(str, sys.version_info[:3])),
            torch=version("torch"),
        )
        self._process = ProcessMetrics()
        self._told: EngineStats | None = None  # the snapshot in the last text

    def render(self) -> bytes:
        """The exposition text."""
        self._told = self._stats()
        state = EngineState(self._told, self._last_step, self._stalled())
        return self.registry.render(state) + self._process.render()

    @property
    def quiet(self) -> bool:
        """Whether a new text would hardly differ from the last: nothing of the engine was heard
        since, and what is said of the process is still good."""
        return self._stats() is self._told and self._process.fresh

    # ------------------------------------------------------------------ answers

    def answers(self, request: Request, arrival: float) -> list[AnswerClock]:
        """The clocks of the n answers to `request`, which arrived at `arrival` (monotonic
        seconds)."""
        return [AnswerClock(self, request, arrival) for _ in range(request.n)]

    def read_prompt(self, request: Request, cached_tokens: int) -> None:
        """The prompt of `request` was computed."""
        self.prompt_tokens.inc(len(request.prompt_ids))
        self.prompt_tokens_cached.inc(cached_tokens)

    def admitted(self, request: Request) -> None:
        """The engine took `request` in."""
        self._request_n.observe(request.n)

    def abandoned(self, request: Request, clocks: Sequence[AnswerClock]) -> None:
        """The client went away before it was known whether the engine takes `request` in."""
        self._orphans[request.id] = clocks

    def finished(self, reason: str) -> None:
        """Counts an answer that ended."""
        self._finished[reason].inc()

    def within_slo(self, *, ttft: float | None = None, tpot: float | None = None) -> None:
        """Counts one of the two where it is within its limit."""
        self._within["ttft"].inc(ttft is not None and ttft <= self._slo.ttft)
        self._within["tpot"].inc(tpot is not None and tpot <= self._slo.tpot)

    def finished_within_slo(self, ttft: float | None, tpot: float | None) -> None:
        """Counts an answer that ended, where all that was measured of it is within the limits."""
        slo = self._slo
        good = ttft is not None and ttft <= slo.ttft and (tpot is None or tpot <= slo.tpot)
        self._within["both"].inc(good)

    # ------------------------------------------------------------------ the engine's words

    def heard(self, output: StepOutput) -> None:
        """Takes one message of the engine in."""
        if output.step is not None:
            step = output.step
            self._last_step = step.ended
            self._step_tokens.observe(step.tokens)
            self._step_seconds.observe(step.seconds)
            self._scheduler_seconds.observe(step.scheduler_seconds)
        if self._orphans:
            self._bury(output)
        for failure in output.failed:
            for receipt in failure.receipts:
                self._take(receipt)
        for delta in output.deltas:
            if delta.receipt is not None:
                self._take(delta.receipt)

    def _take(self, receipt: Receipt) -> None:
        self._queue.observe(receipt.queue)
        self._prefill.observe(receipt.prefill)
        self._decode.observe(receipt.decode)
        self._inference.observe(receipt.prefill + receipt.decode)
        self._request_preemptions.observe(receipt.preemptions)

    def _bury(self, output: StepOutput) -> None:
        for request_id in output.admitted:
            clocks = self._orphans.pop(request_id, ())
            if clocks:
                self._request_n.observe(len(clocks))
            for clock in clocks:
                clock.finish("abort", time.monotonic())
        for refusal in output.refused:
            self._orphans.pop(refusal.request_id, None)
        for delta in output.deltas:
            if delta.finish_reason is not None and delta.receipt is None:  # it was never admitted
                self._orphans.pop(delta.request_id, None)

    # ------------------------------------------------------------------ failures

    def failed(self, reason: str) -> None:
        """Counts a request for answers that failed, for one of `FAILURES`."""
        self._failures[reason].inc()

    def rejected(self, reason: str) -> None:
        """Counts a request that was turned away, for one of `REJECTIONS`."""
        self._rejections[reason].inc()
