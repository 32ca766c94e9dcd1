"""How much of the KV memory holds something useful: `python -m benchmarks.kv_waste`.

The real scheduler and block pool run mixed-length loads without a model, beside two allocators
that give every request one contiguous piece, for the same requests in the same memory. Lengths are
log-normal with the means of the loads in the PagedAttention paper (Kwon et al., SOSP 2023), and the
memory is that of its 13B model on a GPU of 40 GB; its figures stand beside.

Throughput is simulated: a step takes as long with many sequences as with few. That is what sharing
gains where memory alone is the limit, more than a GPU that also has to compute would show.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.plan import StepResult
from scheduler.request import Request, SamplingParams
from scheduler.scheduler import Scheduler

SLOTS = 15_700  # tokens that fit beside the weights of the paper's 13B model
LONGEST = 2048
BLOCK_SIZE = 16
ANY = 1 << 20  # more sequences and tokens per step than the memory ever allows


@dataclass(frozen=True)
class Load:
    """Mean tokens of prompts and answers, and a prefix that all prompts share."""

    name: str
    prompt: float
    answer: float
    prefix: int = 0


CHATS = Load("ShareGPT-like", 161, 338)
INSTRUCTIONS = Load("Alpaca-like", 19, 58)
TRANSLATION = Load("translation", 30, 35)


@dataclass(frozen=True)
class Job:
    """One request: tokens in and out."""

    prompt: int
    answer: int

    @property
    def length(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Moment:
    """One step: tokens that are stored, slots that requests hold, and how many sequences run."""

    useful: int
    held: int
    running: int


def jobs(load: Load, count: int, seed: int = 0) -> list[Job]:
    draw = random.Random(seed)

    def length(mean: float) -> int:
        deviation = 0.9  # of the logarithm: some answers are ten times as long as others
        found = draw.lognormvariate(math.log(mean) - deviation**2 / 2, deviation)
        return max(1, min(round(found), LONGEST // 2 - load.prefix))

    return [Job(load.prefix + length(load.prompt), length(load.answer)) for _ in range(count)]


# ---------------------------------------------------------------------- contiguous memory


class Arena:
    """One contiguous piece per request, as large as `reserve` says; the first gap that is large
    enough takes it."""

    def __init__(self, reserve: Callable[[Job], int]) -> None:
        self.reserve = reserve

    def run(self, todo: Iterable[Job]) -> list[Moment]:
        """Steps while somebody waits: first come, first served."""
        waiting, running = deque(todo), dict[int, tuple[Job, int, int]]()  # start: job, size, done
        moments = []
        while waiting:
            while waiting and (at := self._gap(running, self.reserve(waiting[0]))) is not None:
                job = waiting.popleft()
                running[at] = job, self.reserve(job), job.prompt
            held = sum(size for _, size, _ in running.values())
            useful = sum(done for _, _, done in running.values())
            moments.append(Moment(useful, held, len(running)))
            running = {
                at: (job, size, done + 1)
                for at, (job, size, done) in running.items()
                if done + 1 < job.length
            }
        return moments

    def _gap(self, running: dict[int, tuple[Job, int, int]], size: int) -> int | None:
        at = 0
        for start in [*sorted(running), SLOTS]:
            if start - at >= size:
                return at
            if start < SLOTS:
                at = start + running[start][1]
        return None


def power_of_two(job: Job) -> int:
    """The answer's true length is known up to a factor of two, as in the paper."""
    return job.prompt + int(2 ** math.ceil(math.log2(job.answer)))


RESERVATIONS: dict[str, Callable[[Job], int]] = {
    "longest": lambda job: LONGEST,
    "power of two": power_of_two,
    "oracle": lambda job: job.length,
}
PAPER_USEFUL = {"longest": 20.4, "power of two": 26.8, "oracle": 38.2, "paged": 96.3}

# ---------------------------------------------------------------------- pages


@dataclass(frozen=True)
class Paged:
    """What a run of the real scheduler showed.

    Attributes:
        shared: per step, blocks saved by sharing, of all that the tables name.
    """

    moments: list[Moment]
    shared: list[float]
    answered: int  # tokens

    @property
    def tokens_per_step(self) -> float:
        return self.answered / len(self.moments)


def paged(load: Load, todo: list[Job], *, n: int = 1, prefix_cache: bool = True) -> Paged:
    """Steps while somebody waits: the scheduler as it is, with random tokens for a model."""
    pool = BlockPool(SLOTS // BLOCK_SIZE)
    cache = KVCacheManager(pool, BLOCK_SIZE, prefix_cache=prefix_cache)
    scheduler = Scheduler(cache, max_num_seqs=4096, max_num_batched_tokens=ANY)
    draw = random.Random(1)
    prefix = [draw.randrange(ANY) for _ in range(load.prefix)]
    for i, job in enumerate(todo):
        own = [draw.randrange(ANY) for _ in range(job.prompt - load.prefix)]
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=job.answer, ignore_eos=True)
        prompt = tuple(prefix + own)
        scheduler.add(Request(id=str(i), prompt_ids=prompt, sampling=sampling, n=n))
    moments, shared, answered = [], [], 0
    while scheduler.waiting:
        plan = scheduler.schedule()
        held = pool.num_used * BLOCK_SIZE
        tables = [seq.blocks.tables[0].blocks for seq in scheduler.running]
        named = sum(map(len, tables))
        # A shared block is full but for the last of a prompt, so what is unused lies in tails.
        unused = sum(
            len(table) * BLOCK_SIZE - seq.num_computed
            for seq, table in zip(scheduler.running, tables, strict=True)
        )
        moments.append(Moment(held - unused, held, len(tables)))
        shared.append(1 - pool.num_used / named)
        wanted = sum(item.wants_token for item in plan.scheduled)
        answered += wanted
        scheduler.commit(StepResult(plan.id, [draw.randrange(ANY) for _ in range(wanted)]))
    return Paged(moments, shared, answered)


# ---------------------------------------------------------------------- tables


def show_waste(count: int) -> dict[str, list[Moment]]:
    print(f"\n{CHATS.name} lengths, {count} requests, {SLOTS:,} slots, blocks of {BLOCK_SIZE}\n")
    print("| memory | useful, of what is held | paper | useful, of all | sequences at once |")
    print("|---|--:|--:|--:|--:|")
    todo = jobs(CHATS, count)
    runs = {name: Arena(reserve).run(todo) for name, reserve in RESERVATIONS.items()}
    runs["paged"] = paged(CHATS, todo).moments
    for name, moments in runs.items():
        held = sum(m.useful for m in moments) / sum(m.held for m in moments)
        pool = statistics.mean(m.useful / SLOTS for m in moments)
        running = statistics.mean(m.running for m in moments)
        print(
            f"| {name} | {100 * held:.1f} % | {PAPER_USEFUL[name]} % "
            f"| {100 * pool:.1f} % | {running:.1f} |"
        )
    return runs


def show_forks(count: int) -> None:
    print("\nSeveral answers to each prompt: blocks saved by sharing the prompt\n")
    print("| answers | " + " | ".join(f"{load.name}" for load in (INSTRUCTIONS, CHATS)) + " |")
    print("|--:|--:|--:|")
    for n in range(2, 7):
        saved = [
            statistics.mean(paged(load, jobs(load, count // n), n=n).shared)
            for load in (INSTRUCTIONS, CHATS)
        ]
        print(f"| {n} | " + " | ".join(f"{100 * share:.1f} %" for share in saved) + " |")
    print("| paper, 2 to 6 | 6.1 to 9.8 % | 16.2 to 30.5 % |")


def show_prefixes(count: int) -> None:
    print(f"\nA system prompt before {TRANSLATION.name} requests (simulated throughput)\n")
    print("| tokens shared | blocks saved | against paged, not shared | against oracle | paper |")
    print("|--:|--:|--:|--:|--:|")
    for length, figure in ((80, "1.67x"), (341, "3.58x")):
        load = Load(TRANSLATION.name, TRANSLATION.prompt, TRANSLATION.answer, length)
        todo = jobs(load, count)
        shared, apart = paged(load, todo), paged(load, todo, prefix_cache=False)
        oracle = Arena(RESERVATIONS["oracle"]).run(todo)
        contiguous = statistics.mean(m.running for m in oracle)
        print(
            f"| {length} | {100 * statistics.mean(shared.shared):.1f} % "
            f"| {shared.tokens_per_step / apart.tokens_per_step:.2f}x "
            f"| {shared.tokens_per_step / contiguous:.2f}x | {figure} |"
        )


def plot(runs: dict[str, list[Moment]], file: Path) -> None:
    """Stacked bars: what the pool's slots hold, on average over the steps."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    parts = {
        "useful": [statistics.mean(m.useful / SLOTS for m in run) for run in runs.values()],
        "held, but empty": [
            statistics.mean((m.held - m.useful) / SLOTS for m in run) for run in runs.values()
        ],
        "free": [statistics.mean(1 - m.held / SLOTS for m in run) for run in runs.values()],
    }
    bottom = [0.0] * len(runs)
    for (name, shares), color in zip(parts.items(), ("#2a7f62", "#e0a458", "#d9d9d9"), strict=True):
        heights = [100 * share for share in shares]
        axes.bar(list(runs), heights, bottom=bottom, label=name, color=color)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set(ylabel="% of the KV memory", ylim=(0, 100), title="While requests wait for memory")
    figure.legend(loc="outside lower center", ncols=len(parts))
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--plot", type=Path, help="draw the first table (needs matplotlib)")
    options = parser.parse_args()
    runs = show_waste(options.requests)
    show_forks(options.requests)
    show_prefixes(options.requests)
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
