"""What the step trace adds to a step, and what reading it costs the engine; no model.

python -m benchmarks.step_trace
"""

from __future__ import annotations

import argparse
import statistics
import time

import msgspec

from engine.protocol import Trace
from engine.step_trace import StepTrace
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.journal import Wait
from scheduler.plan import StepPlan
from scheduler.request import Request, SamplingParams
from scheduler.scheduler import Scheduler


def decoding(sequences: int) -> tuple[Scheduler, StepPlan]:
    """A scheduler, and a step of it that computes one token of each sequence."""
    scheduler = Scheduler(
        KVCacheManager(BlockPool(sequences), 16),
        max_num_seqs=sequences,
        max_num_batched_tokens=sequences,
    )
    sampling = SamplingParams(temperature=0, seed=0, max_tokens=2)
    for number in range(sequences):
        scheduler.add(Request(id=f"r{number}", prompt_ids=(number,), sampling=sampling))
    return scheduler, scheduler.schedule()


def fill(trace: StepTrace, scheduler: Scheduler, plan: StepPlan, steps: int) -> float:
    """Median seconds that tracing one step takes, somebody waiting in each."""
    waiting = scheduler.running[0]
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        trace.begin()
        trace.waits(waiting, Wait.SLOT)
        trace.planned(plan, scheduler)
        trace.ended(plan.id)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--keep", type=int, default=1024, help="steps kept (default 1024)")
    given = parser.parse_args()
    print(f"{given.keep} steps kept")
    print("sequences  us per step  kept KiB  reading ms")
    for sequences in given.sequences:
        scheduler, plan = decoding(sequences)
        trace = StepTrace(given.keep, sequences)
        seconds = fill(trace, scheduler, plan, steps=4 * given.keep)
        began = time.perf_counter()
        size = len(msgspec.msgpack.encode(Trace(0, trace.view())))
        reading = time.perf_counter() - began
        print(
            f"{sequences:>9}  {seconds * 1e6:>11.1f}  {size / 1024:>8.0f}  {reading * 1e3:>10.2f}"
        )


if __name__ == "__main__":
    main()
