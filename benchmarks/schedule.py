"""Times the scheduler alone: adding, planning and committing, without a device.

`python -m benchmarks.schedule` serves prompts that nobody sent before from a full pool, so that
every block taken evicts another and nothing is found: all that the cache keeps in mind for
`/debug/kv/explain` is then pure cost. The same load runs with that memory and without, in turn;
times are this process's CPU time, and the difference is the median over the rounds.
"""

import argparse
import random
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from paged_cache.explain import PrefixMemory
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.plan import StepResult
from scheduler.request import Request, SamplingParams
from scheduler.scheduler import Scheduler

BLOCKS, BLOCK_SIZE, SLOTS, BUDGET = 4096, 16, 64, 2048


class Forgetful(PrefixMemory):
    """Remembers nothing."""

    def opened(self, root: bytes, owner: str) -> None:
        pass

    def started(self, root: bytes, tokens: Sequence[int]) -> None:
        pass


def scheduler(*, remembers: bool) -> Scheduler:
    pool = BlockPool(BLOCKS)
    cache = KVCacheManager(pool, BLOCK_SIZE)
    if not remembers:
        pool.evicted = deque(maxlen=0)
        cache.memory = Forgetful()
    return Scheduler(cache, max_num_seqs=SLOTS, max_num_batched_tokens=BUDGET)


def prompts(
    numbers: random.Random, lengths: Iterable[int], max_tokens: int = 128, name: str = "r"
) -> Iterator[Request]:
    """Greedy requests with random prompts of these lengths; ids begin with `name`."""
    for place, length in enumerate(lengths):
        ids = tuple(numbers.randrange(2**17) for _ in range(length))
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=max_tokens, ignore_eos=True)
        yield Request(id=f"{name}{place}", prompt_ids=ids, sampling=sampling)


def run(tested: Scheduler, requests: list[Request]) -> tuple[float, int]:
    """Seconds and steps to serve `requests`, all there from the beginning."""
    begin, steps = time.process_time(), 0
    for request in requests:
        tested.add(request)
    while tested.has_work:
        plan = tested.schedule()
        wanted = sum(item.wants_token for item in plan.scheduled)
        tested.commit(StepResult(plan.id, [7] * wanted))
        steps += 1
    return time.process_time() - begin, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    numbers = random.Random(0)
    variants = {True: scheduler(remembers=True), False: scheduler(remembers=False)}
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.rounds + 1):
        load = list(prompts(numbers, [options.prompt_tokens] * options.requests))
        for remembers, tested in random.sample(list(variants.items()), 2):
            seconds, steps = run(tested, load)
            times[remembers].append(seconds / steps * 1e6)
    assert not any(tested.prefix.hits for tested in variants.values()), "a prompt was sent before"
    on, off = times[True][1:], times[False][1:]
    more = statistics.median(a / b - 1 for a, b in zip(on, off, strict=True))
    print(
        f"with memory {statistics.median(on):.1f} us per step, without "
        f"{statistics.median(off):.1f}: {more * 100:+.1f} %"
    )


if __name__ == "__main__":
    main()
