"""Every pair of features: a crowd gets, token for token, what its requests get alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from engine.loop import EngineLoop
from engine.runner import Runner
from tests.engine.drive import engine
from tests.engine.guests import (
    CONTEXT,
    Alone,
    Guest,
    Menu,
    Told,
    assert_as_alone,
    checkpoint,
    serve,
)

GUESTS = 10


@dataclass(frozen=True)
class Feature:
    """What one feature adds to a run, and how to see that it took part.

    Attributes:
        settings: of the engine.
        menu: fields of `Menu`.
        tight: the pool is so small that blocks run out.
        disk: blocks go on to a folder of the test's.
        again: everybody comes twice more, when much of it was computed before.
        excludes: features that no engine has beside it.
    """

    seen: Callable[[EngineLoop, Told], bool]
    settings: Mapping[str, Any] = field(default_factory=dict)
    menu: Mapping[str, Any] = field(default_factory=dict)
    windows: bool = False
    aborts: bool = False
    preempt_every: int = 0
    tight: bool = False
    again: bool = False
    disk: bool = False
    excludes: frozenset[str] = frozenset()


def pages_are(dtype: str) -> Feature:
    others = frozenset({"fp8_e4m3", "int8", "int4"} - {dtype})
    return Feature(
        lambda loop, told: (
            isinstance(loop.runner, Runner)
            and getattr(loop.runner.inputs.pages[0], "format", None) == dtype
        ),
        {"kv_cache_dtype": dtype},
        excludes=others,
    )


def reasons(told: Told) -> set[str]:
    return {reason for _, reason in told.values()}


FEATURES = {
    "prefix cache": Feature(
        lambda loop, told: loop.scheduler.prefix.hits > 0, {"enable_prefix_caching": True}
    ),
    "forks": Feature(lambda loop, told: any(index for _, index in told), menu={"n": (1, 2, 3)}),
    "windows": Feature(lambda loop, told: len(set(loop.scheduler.cache.windows)) > 1, windows=True),
    "fp8_e4m3": pages_are("fp8_e4m3"),
    "int8": pages_are("int8"),
    "int4": pages_are("int4"),
    "chunked prefill": Feature(
        lambda loop, told: loop.scheduler.max_num_batched_tokens < 32,
        {"max_num_batched_tokens": 24},
    ),
    "preemption": Feature(
        lambda loop, told: loop.scheduler.num_preemptions > 2, preempt_every=4, tight=True
    ),
    "stops": Feature(lambda loop, told: "stop" in reasons(told), menu={"stops": True}),
    "aborts": Feature(lambda loop, told: "abort" in reasons(told), aborts=True),
    # That salted requests share nothing is what the tests of the manager show.
    "cache_salt": Feature(lambda loop, told: True, menu={"salts": ("", "a", "b")}),
    "overlap": Feature(lambda loop, told: loop.overlap, {"async_scheduling": "on"}),
    "reserve": Feature(lambda loop, told: loop.scheduler.reserve, {"admission": "reserve"}),
    "host tier": Feature(
        lambda loop, told: loop.scheduler.cache.tiers.host_hits > 0,
        {"host_kv_bytes": "4MiB", "enable_prefix_caching": True},
        tight=True,
        again=True,
    ),
    "disk tier": Feature(
        lambda loop, told: (
            (disk := loop.scheduler.cache.tiers.disk) is not None and disk.num_blocks > 0
        ),
        {"enable_prefix_caching": True},
        tight=True,
        again=True,
        disk=True,
    ),
    "swap": Feature(
        lambda loop, told: loop.scheduler.preemption.num_swapped > 0,
        {"host_kv_bytes": "200KiB", "preemption": "swap"},
        preempt_every=4,
    ),
}
BASE = {
    "enable_prefix_caching": False,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "max_model_len": CONTEXT,
}
PAIRS = [(a, b) for a, b in combinations(FEATURES, 2) if b not in FEATURES[a].excludes]


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, str], Alone]:
    """The answers alone, by model and cache dtype; each request is computed once for all pairs."""
    folder, known = tmp_path_factory.mktemp("matrix"), {}

    def of(windows: bool, dtype: str) -> Alone:
        if (windows, dtype) not in known:
            known[windows, dtype] = Alone(checkpoint(windows, folder), dtype)
        return known[windows, dtype]

    return of


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_pair(pair: tuple[str, str], solo: Callable[[bool, str], Alone], tmp_path: Path) -> None:
    features = [FEATURES[name] for name in pair]
    settings: dict[str, Any] = dict(BASE)
    menu: dict[str, Any] = {}
    for feature in features:
        settings |= feature.settings
        menu |= feature.menu
    if any(f.disk for f in features):
        settings["disk_kv_path"] = str(tmp_path / "kv")
        # A few blocks of host memory, so that they go on.
        small = "24KiB" if "kv_cache_dtype" in settings else "120KiB"
        settings["host_kv_bytes"] = "200KiB" if "preemption" in settings else small
    windows = any(f.windows for f in features)
    if any(f.tight for f in features):
        blocks = 26 if windows else 12  # that is little more than one sequence may need
    else:
        blocks = 60
    alone = solo(windows, settings.get("kv_cache_dtype", "auto"))
    guests = crowd(Menu(**menu), any(f.aborts for f in features))
    loop = engine(alone.path, num_gpu_blocks_override=blocks, **settings)
    for _ in range(1 + 2 * any(f.again for f in features)):
        told = serve(loop, guests, max(f.preempt_every for f in features))
        assert_as_alone(told, guests, alone)
    for name, feature in zip(pair, features, strict=True):
        assert feature.seen(loop, told), f"{name} took no part"


def crowd(menu: Menu, aborts: bool) -> list[Guest]:
    draw = random.Random(7)
    guests = [Guest(menu.request(i, f"g{i}"), comes=draw.randrange(12)) for i in range(GUESTS)]
    if aborts:
        guests[::3] = [replace(g, leaves=g.comes + draw.randrange(1, 6)) for g in guests[::3]]
    return guests
