"""Kills an engine with -9 at random while its disk tier writes; the next start must answer right.

    make crash-test ARGS='--rounds 50'

Every life answers the same prompts in turn, with blocks going out to the disk and coming back, and
compares each answer with that of an engine without tiers.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from scheduler.request import Request
from tests.engine.drive import answers, engine, request
from tests.models import checkpoints

TINY = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 64, "max_num_seqs": 4}


def chats(life: int) -> list[Request]:
    """Some that every life has, and some of its own, so that there is always something to write."""
    common = [request(f"c{i}", [40 + i, *range(30, 110)], max_tokens=8) for i in range(6)]
    rng = random.Random(life)
    own = [request(f"o{i}", rng.choices(range(3, 300), k=90), max_tokens=8) for i in range(12)]
    return common + own


def live(checkpoint: Path, folder: Path, life: int, turns: int) -> None:
    """One life: says `ready`, then checks itself; exits 3 at a wrong answer."""
    plain = engine(checkpoint)
    want = {item.id: answers(plain, [item])[item.id] for item in chats(life)}
    loop = engine(checkpoint, host_kv_bytes="150KiB", disk_kv_path=str(folder), **TINY)
    print("ready", flush=True)
    for _ in range(turns):
        for item in chats(life):
            if answers(loop, [item])[item.id] != want[item.id]:
                print(f"life {life}: {item.id} is answered wrong", flush=True)
                sys.exit(3)
    loop.close()
    stats = loop.collect().stats
    numbers = {"hits": stats.disk_hits, "blocks": stats.disk_blocks, "errors": stats.disk_errors}
    print(json.dumps(numbers), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--life", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.life:
        checkpoint, folder, life, turns = arguments.life
        live(Path(checkpoint), Path(folder), int(life), int(turns))
        return 0
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as work:
        checkpoint = checkpoints.make("llama", Path(work))
        for life in range(arguments.rounds + 1):
            last = life == arguments.rounds
            command = [sys.executable, "-m", "tests.engine.crash_disk_tier", "--life"]
            command += [str(checkpoint), f"{work}/kv", str(life), "2" if last else "1000"]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            if child.stdout.readline() != "ready\n":
                print(f"life {life} did not start")
                return 1
            try:
                child.wait(600 if last else rng.uniform(0.05, 2.0))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.returncode not in ((0,) if last else (0, -9)):
                print(f"life {life}: exit {child.returncode}: {child.stdout.read()}")
                return 1
            files = sum(1 for _ in Path(work, "kv", "blocks").iterdir())
            print(f"life {life}: {files} files {child.stdout.read().strip()}", flush=True)
    print(f"{arguments.rounds} kills, every answer right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
