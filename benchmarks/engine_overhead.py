"""What the engine itself takes of a step: the real loop around a runner that computes nothing.

    python -m benchmarks.engine_overhead [--profile]

CPU time of one thread, in microseconds per step, in the order in which a step does it:

    schedule   what runs next, and blocks for it
    inputs     slot state and input tensors of the plan, on CPU tensors
    commit     tokens into sequences, and who ends
    loop       the rest of a step: deadlines, trace, times, deltas
    message    the snapshot, and all of it as MessagePack for the HTTP process

In every step a sixteenth of the decoding sequences fills a block and gets another. Beside some of
them prompts of 2,048 tokens are read, a chunk of 512 in each step.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec
import torch

from benchmarks.schedule import BLOCK_SIZE, prompts
from engine.inputs import InputBuilder
from engine.loop import EngineLoop
from engine.protocol import EngineInfo, Submit
from engine.state import SlotState
from engine.step_trace import StepTrace
from kernels import dispatch
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.plan import StepPlan, StepResult
from scheduler.request import Request
from scheduler.scheduler import Progress, Scheduler

CPU = torch.device("cpu")
LENGTH, CHUNK, CONTEXT = 64, 512, 4096
CHUNKS = 4  # of a prompt that is read
STEPS = 64  # of a round
MOST_ROUNDS = CONTEXT // STEPS - 4  # before the answers end
TRACED = 1024  # steps that the trace keeps, as by default
INNER = ("schedule", "inputs", "commit")
PARTS = (*INNER, "loop", "message")

T = TypeVar("T")


class Stopwatch:
    """CPU seconds of this thread, by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def time(self, part: str, call: Callable[[], T]) -> T:
        """Counts what `call` takes."""
        start = time.thread_time()
        result = call()
        self.seconds[part] += time.thread_time() - start
        return result


class TimedScheduler(Scheduler):
    """Tells a stopwatch what planning and committing take."""

    watch: Stopwatch

    def schedule(self) -> StepPlan:
        return self.watch.time("schedule", super().schedule)

    def commit(self, result: StepResult) -> list[Progress]:
        return self.watch.time("commit", lambda: super(TimedScheduler, self).commit(result))


class IdleRunner:
    """Makes the inputs of a step, and every token a 7."""

    def __init__(self, num_slots: int, watch: Stopwatch) -> None:
        self._state = SlotState(num_slots, CONTEXT, BLOCK_SIZE, CPU)
        self._inputs = InputBuilder(self._state, (), (0,), BLOCK_SIZE, dispatch.backend(CPU))
        self._watch = watch

    def launch(self, plan: StepPlan) -> StepResult:
        self._watch.time("inputs", lambda: self._build(plan))
        return StepResult(plan.id, [7] * sum(item.wants_token for item in plan.scheduled))

    @torch.inference_mode()
    def _build(self, plan: StepPlan) -> None:
        self._state.apply(plan)
        self._inputs.build(plan)


class Case:
    """An engine in which `decodes` sequences decode, beside prompts that are read in chunks if
    `reads`."""

    def __init__(self, decodes: int, *, reads: bool = False) -> None:
        self.decodes, self.reads = decodes, reads
        self.watch = Stopwatch()
        slots = decodes + reads
        trace = StepTrace(TRACED, slots)
        self.scheduler = TimedScheduler(
            KVCacheManager(BlockPool(slots * CONTEXT // BLOCK_SIZE), BLOCK_SIZE),
            max_num_seqs=slots,
            max_num_batched_tokens=decodes + CHUNK,
            journal=trace,
        )
        self.scheduler.watch = self.watch
        runner = IdleRunner(slots, self.watch)
        self._loop = EngineLoop(self.scheduler, runner, _info(slots), trace)
        self._encode = msgspec.msgpack.Encoder().encode
        self._numbers, self._rounds = random.Random(0), 0
        lengths = [LENGTH + place % BLOCK_SIZE for place in range(decodes)]
        self._take(prompts(self._numbers, lengths, CONTEXT - LENGTH - BLOCK_SIZE, "decode"))
        running = self.scheduler.running
        while self.scheduler.waiting or not all(seq.num_generated for seq in running):
            self._loop.step()
        self._loop.collect()

    @property
    def name(self) -> str:
        chunk = [f"a chunk of {CHUNK}"] if self.reads else []
        return " + ".join([f"{self.decodes:,} decoding"] * bool(self.decodes) + chunk)

    def round(self) -> dict[str, float]:
        """Microseconds per step by part, over STEPS steps."""
        self._rounds += 1
        if self.reads:
            lengths = [CHUNK * CHUNKS] * (STEPS // CHUNKS)
            self._take(prompts(self._numbers, lengths, 1, f"read{self._rounds}-"))
        watch = self.watch
        watch.seconds = dict.fromkeys(PARTS, 0.0)
        for _ in range(STEPS):
            watch.time("loop", self._loop.step)
            watch.time("message", lambda: self._encode(self._loop.collect()))
        watch.seconds["loop"] -= sum(watch.seconds[part] for part in INNER)
        return {part: 1e6 * watch.seconds[part] / STEPS for part in PARTS}

    def _take(self, requests: Iterable[Request]) -> None:
        self._loop.take(Submit(list(requests)))


def _info(slots: int) -> EngineInfo:
    return EngineInfo(
        model_path="",
        architecture="none",
        device="cpu",
        dtype="float32",
        vocab_size=1 << 17,
        max_model_len=CONTEXT,
        eos_token_ids=[],
        block_size=BLOCK_SIZE,
        num_blocks=slots * CONTEXT // BLOCK_SIZE,
        max_num_seqs=slots,
        max_num_batched_tokens=slots + CHUNK,
        kv_bytes_per_token=1,
        weight_bytes=1,
    )


def measure(cases: Sequence[Case], rounds: int) -> list[list[dict[str, float]]]:
    """The rounds of each case: they take turns, after one round each that does not count."""
    for case in cases:
        case.round()
    turns = [[case.round() for case in cases] for _ in range(rounds)]
    return [list(found) for found in zip(*turns, strict=True)]


def line(case: Case, rounds: list[dict[str, float]]) -> str:
    """A row of the table."""
    totals = [sum(parts.values()) for parts in rounds]
    total = statistics.median(totals)
    cells = [f"{statistics.median(parts[part] for parts in rounds):,.0f}" for part in PARTS]
    per_sequence = f"{total / (case.decodes + case.reads):,.2f}"
    spread = f"{total:,.0f} ({min(totals):,.0f} to {max(totals):,.0f})"
    return f"| {' | '.join([case.name, *cells, spread, per_sequence])} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 64, 256, 1024])
    parser.add_argument(
        "--beside", type=int, nargs="*", default=[0, 63, 255], help="decodes beside a chunk"
    )
    parser.add_argument("--rounds", type=int, default=9, help=f"of {STEPS} steps")
    parser.add_argument("--profile", action="store_true", help="functions, by their own time")
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    args = parser.parse_args(argv)
    if not 0 <= args.rounds <= MOST_ROUNDS:
        parser.error(f"--rounds must be at most {MOST_ROUNDS}, got {args.rounds}")
    torch.set_num_threads(1)
    cases = [Case(count) for count in args.sequences]
    cases += [Case(count, reads=True) for count in args.beside]
    profile = cProfile.Profile() if args.profile else contextlib.nullcontext()
    with profile:
        found = measure(cases, args.rounds)
    if args.json:
        named = [{"case": c.name, "rounds": r} for c, r in zip(cases, found, strict=True)]
        print(json.dumps(named, indent=2))
    else:
        print(f"| | {' | '.join(PARTS)} | all, median (range) | per sequence |")
        print("|---|" + "--:|" * (len(PARTS) + 2))
        print("\n".join(line(*pair) for pair in zip(cases, found, strict=True)))
    if isinstance(profile, cProfile.Profile):
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
