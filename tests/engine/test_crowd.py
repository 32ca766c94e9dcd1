"""A request's answer does not depend on who else is there."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scheduler.request import Request
from tests.engine.drive import answers, engine, request
from tests.engine.guests import CONTEXT, Alone, Guest, Menu, assert_as_alone, checkpoint, serve
from tests.models import checkpoints

SAMPLING = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 1234},
    "filtered": {"temperature": 1.2, "seed": -7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "ruled": {
        "temperature": 0.8,
        "seed": 5,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.3,
        "logit_bias": {60: 3.0, 61: -100.0},
        "min_tokens": 10,
        "ignore_eos": False,
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("llama", tmp_path_factory.mktemp("crowd"))


def crowd() -> list[Request]:
    """16 others with sampling of their own."""
    rng = random.Random(1)
    return [
        request(
            f"other{i}",
            rng.choices(range(3, 320), k=rng.randint(1, 90)),
            max_tokens=40,
            temperature=rng.choice([0.0, 0.7, 1.5]),
            top_p=rng.choice([1.0, 0.8]),
            frequency_penalty=rng.choice([0.0, 1.0]),
            min_tokens=rng.choice([0, 40]),
            logprobs=rng.choice([None, 2]),
            seed=i,
        )
        for i in range(16)
    ]


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING.keys())
def test_alone_in_a_crowd_and_after_preemption(path: Path, sampling: dict[str, float]):
    item = request("me", range(50, 120), max_tokens=40, **sampling)
    alone = answers(engine(path), [item])["me"]

    others = crowd()
    among = answers(engine(path, max_num_batched_tokens=128), [*others[:8], item, *others[8:]])
    assert among["me"] == alone

    small = engine(path, num_gpu_blocks_override=14, max_num_seqs=6, max_num_batched_tokens=48)
    preempted = 0
    small.scheduler._preempt = _counting(small.scheduler._preempt, counts := [])
    tight = answers(small, [*others[:3], item])
    preempted = sum(name == "me" for name in counts)
    assert preempted > 0, "the pool is too large: the request was never preempted"
    assert tight["me"] == alone


def _counting(preempt, names: list[str]):
    def count(seq) -> None:
        names.append(seq.request.id)
        preempt(seq)

    return count


def test_seeds_differ(path: Path):
    items = [request(f"s{seed}", range(50, 90), temperature=1.0, seed=seed) for seed in range(4)]
    result = answers(engine(path), items)
    assert len({tuple(tokens) for tokens in result.values()}) == 4


# ---------------------------------------------------------------------- random histories

TRACES = 200
MENU = Menu(n=(1, 1, 2, 3), salts=("", "", "other"), stops=True)
TIERS: list[dict[str, Any]] = [
    {},
    {"host_kv_bytes": "200KiB"},
    {"host_kv_bytes": "2MiB", "preemption": "recompute"},
    {"host_kv_bytes": "2MiB", "preemption": "swap"},
]
SEEN = ("stop", "length", "abort", "hits", "preemptions", "evictions", "swaps", "host", "disk")
CONFIGURATIONS = [
    (windows, dtype) for windows in (False, True) for dtype in ("auto", "fp8_e4m3", "int8", "int4")
]


@pytest.mark.parametrize(("windows", "dtype"), CONFIGURATIONS)
def test_random_histories(windows: bool, dtype: str, tmp_path: Path) -> None:
    """Shared prefixes, forks, stops, hang-ups and preemption, in pools of any size."""
    alone = Alone(checkpoint(windows, tmp_path), dtype)
    seen: Counter[str] = Counter()
    for seed in range(TRACES // len(CONFIGURATIONS)):
        draw = random.Random(f"{windows} {dtype} {seed}")
        loop = engine(
            alone.path,
            kv_cache_dtype=dtype,
            max_model_len=CONTEXT,
            num_gpu_blocks_override=draw.randint(24, 60) if windows else draw.randint(10, 24),
            max_num_seqs=draw.randint(2, 8),
            max_num_batched_tokens=draw.choice([16, 40, 200]),
            enable_prefix_caching=(found := draw.random() < 0.8),
            admission=draw.choice(["optimistic", "optimistic", "reserve"]),
            disk_kv_path=str(tmp_path / "kv") if found and draw.random() < 0.3 else None,
            **draw.choice(TIERS),
        )
        guests = some_guests(draw)
        told = serve(loop, guests, preempt_every=draw.choice([0, 3, 7]))
        assert_as_alone(told, guests, alone)
        scheduler = loop.scheduler
        seen.update(reason for _, reason in told.values())
        seen.update(hits=scheduler.prefix.hits, preemptions=scheduler.num_preemptions)
        seen.update(evictions=scheduler.cache.pool.num_evicted)
        seen.update(swaps=scheduler.preemption.num_swapped)
        seen.update(host=scheduler.cache.tiers.host_hits, disk=scheduler.cache.tiers.disk_hits)
        loop.close()
    for what in SEEN:
        assert seen[what] > 10, (what, seen)


def some_guests(draw: random.Random) -> list[Guest]:
    guests = [
        Guest(MENU.request(draw.randrange(40), f"g{i}"), comes=draw.randrange(20))
        for i in range(draw.randint(5, 9))
    ]
    return [
        replace(guest, leaves=guest.comes + draw.randint(1, 12)) if draw.random() < 0.2 else guest
        for guest in guests
    ]
