"""What the tiers below the pool gain: `python -m benchmarks.kv_tiers`.

TTFT of one long prompt that is computed, that comes back from host memory, or from disk: three
engines in this process, in turn within each round, so that a busy machine slows all alike. Other
prompts in between push the blocks out of the pool, and for the disk out of host memory too; files
are dropped from the page cache before they are read. The answers must agree. TTFT is what the
engine takes, without HTTP.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.local_server import make_checkpoint
from benchmarks.prefix_cache import VOCAB, show
from configs.settings import Settings
from engine.build import build
from engine.loop import EngineLoop
from engine.protocol import Submit
from scheduler.request import Request, SamplingParams

BLOCK_SIZE = 16
ANSWER = 8  # tokens
BETWEEN = 3  # other prompts before the one that comes back
COMPUTED, HOST, DISK = "computed", "from host memory", "from disk"


class Bench:
    """One engine per way; each has a pool for one prompt and a little more."""

    def __init__(self, model: Path, length: int, threads: int | None, folder: Path) -> None:
        self.folder = folder
        self.length = length
        self.draw = random.Random(0)
        self.ids = itertools.count()
        self.prompt = self.tokens()
        blocks = -(-length // BLOCK_SIZE)

        def engine(**tier: object) -> EngineLoop:
            settings = Settings.of(
                model=str(model),
                cpu_threads=threads,
                block_size=BLOCK_SIZE,
                max_model_len=length + ANSWER,
                num_gpu_blocks_override=blocks + blocks // 4,
                max_num_seqs=1,
                max_num_batched_tokens=512,
                **tier,
            )
            return build(settings)

        computed = engine(enable_prefix_caching=False)
        block_bytes = computed.runner.storage.num_bytes // computed.info.num_blocks
        # All of a round fits into the first; only the newest prompt into the second.
        large, small = ((BETWEEN + 2) * blocks, blocks + 1)
        self.loops = {
            COMPUTED: computed,
            HOST: engine(host_kv_bytes=large * block_bytes),
            DISK: engine(host_kv_bytes=small * block_bytes, disk_kv_path=str(folder)),
        }

    def tokens(self) -> list[int]:
        return [self.draw.randrange(3, VOCAB) for _ in range(self.length)]

    def ask(self, way: str, prompt: list[int]) -> tuple[float, list[int]]:
        """(milliseconds to the first token, the tokens)"""
        loop, tokens, first = self.loops[way], [], 0.0
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=ANSWER, ignore_eos=True)
        start = time.perf_counter()
        name = str(next(self.ids))
        loop.take(Submit([Request(id=name, prompt_ids=tuple(prompt), sampling=sampling)]))
        while loop.scheduler.has_work:
            loop.step()
            tokens += [token for delta in loop.collect().deltas for token in delta.tokens]
            if tokens and not first:
                first = 1e3 * (time.perf_counter() - start)
        return first, tokens

    def push_out(self) -> None:
        """The prompt leaves the pool, and in the engine with a disk host memory too."""
        for way in (HOST, DISK):
            for _ in range(BETWEEN):
                self.ask(way, self.tokens())
        self._wait_for_writes()
        for file in (self.folder / "blocks").iterdir():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _wait_for_writes(self) -> None:
        before = -1
        while before != (before := self._disk_bytes()):
            time.sleep(0.5)

    def _disk_bytes(self) -> int:
        return self.loops[DISK].collect().stats.disk_bytes

    def came_back(self) -> dict[str, int]:
        """Tokens by the tier that they came from, so far."""
        host, disk = (self.loops[way].collect().stats for way in (HOST, DISK))
        return {COMPUTED: 0, HOST: host.host_hits, DISK: disk.disk_hits}

    def run(self, rounds: int) -> dict[str, list[float]]:
        """Milliseconds to the first token, by way."""
        times: dict[str, list[float]] = {way: [] for way in self.loops}
        wanted, *_ = [self.ask(way, self.prompt)[1] for way in self.loops]
        whole = (self.length - 1) // BLOCK_SIZE * BLOCK_SIZE  # the last token is always computed
        for _ in range(rounds):
            self.push_out()
            before = self.came_back()
            for way in self.draw.sample(list(self.loops), len(self.loops)):
                first, tokens = self.ask(way, self.prompt)
                times[way].append(first)
                assert tokens == wanted, f"another answer {way}"
            for way, count in self.came_back().items():
                came = count - before[way]
                assert way == COMPUTED or came == whole, f"{came} of {whole} tokens came {way}"
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: a random Llama of 56M parameters")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="that compute (default: one per core)")
    parser.add_argument("--folder", type=Path, help="where the disk tier is made (default: /tmp)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = options.model or make_checkpoint()
        bench = Bench(model, options.prompt_tokens, options.threads, Path(folder))
        times = bench.run(options.rounds)
        for loop in bench.loops.values():
            loop.close()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, a prompt of "
        f"{options.prompt_tokens:,} tokens, median (range) of {options.rounds}, equal answers\n"
    )
    print("| the prompt is | TTFT, ms | computed / this |\n|---|--:|--:|")
    for way, values in times.items():
        ratios = (a / b for a, b in zip(times[COMPUTED], values, strict=True))
        print(f"| {way} | {show(values)} | {statistics.median(ratios):.1f} |")


if __name__ == "__main__":
    main()
