"""What a look at the block pool costs the engine: `python -m benchmarks.snapshot`.

A scheduler without a model behind it fills a pool of 65,536 blocks with sequences and cached
blocks. Then the engine's answer to `Inspect` is timed: taking the picture, and encoding
it for the pipe. Both happen between two steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import msgspec

from engine.loop import EngineLoop
from engine.protocol import EngineInfo, Inspect
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.plan import StepPlan, StepResult
from scheduler.request import Request, SamplingParams
from scheduler.scheduler import Scheduler

BLOCK_SIZE = 16
INFO = EngineInfo(
    model_path="",
    architecture="none",
    device="none",
    dtype="none",
    vocab_size=1000,
    max_model_len=1 << 20,
    eos_token_ids=[],
    block_size=BLOCK_SIZE,
    num_blocks=0,
    max_num_seqs=0,
    max_num_batched_tokens=0,
    kv_bytes_per_token=0,
    weight_bytes=0,
)


class NoDevice:
    """Answers every plan with the same token."""

    def launch(self, plan: StepPlan) -> StepResult:
        return StepResult(plan.id, [7] * sum(item.wants_token for item in plan.scheduled))


def loaded(blocks: int, sequences: int) -> EngineLoop:
    """A loop whose pool is nearly full: a quarter of it cached, the rest in use."""
    draw = random.Random(0)
    tokens = blocks * BLOCK_SIZE // sequences
    cache = KVCacheManager(BlockPool(blocks), BLOCK_SIZE)
    scheduler = Scheduler(cache, max_num_seqs=sequences, max_num_batched_tokens=1 << 20)
    loop = EngineLoop(scheduler, NoDevice(), INFO)
    for share, answer in ((0.25, 1), (0.7, 1000)):  # the first ones end at once
        for i in range(sequences):
            prompt = tuple(draw.randrange(1000) for _ in range(int(tokens * share)))
            sampling = SamplingParams(temperature=0, seed=0, max_tokens=answer)
            scheduler.add(Request(id=f"{answer}-{i}", prompt_ids=prompt, sampling=sampling))
        for _ in range(4):
            loop.step()
    return loop


def microseconds(call: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return times


def show(name: str, times: list[float]) -> None:
    low, middle, high = min(times), statistics.median(times), sorted(times)[len(times) * 99 // 100]
    print(f"{name:28} {middle:8,.0f} us   [{low:,.0f}, p99 {high:,.0f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=65_536)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=500)
    options = parser.parse_args()
    loop = loaded(options.blocks, options.sequences)
    pool = loop.scheduler.cache.pool
    print(
        f"{pool.num_blocks:,} blocks, {pool.num_used:,} used and {pool.num_cached:,} cached, "
        f"{len(loop.scheduler.running)} sequences; median of {options.rounds}"
    )
    encode = msgspec.msgpack.Encoder().encode
    look = Inspect(1)
    picture = loop.inspect(look)
    show("taking it", microseconds(lambda: loop.inspect(look), options.rounds))
    show("encoding it", microseconds(lambda: encode(picture), options.rounds))
    show("both", microseconds(lambda: encode(loop.inspect(look)), options.rounds))
    print(f"{len(encode(picture)):,} bytes")


if __name__ == "__main__":
    main()
