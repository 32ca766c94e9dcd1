"""Test mode of the KV pages: blocks that hold nothing are NaN, and no logit ever is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from engine.graphs import DecodeGraphs
from engine.launched import LaunchedStep
from engine.loop import EngineLoop
from engine.runner import Runner
from scheduler.plan import StepPlan


def poison(loop: EngineLoop) -> EngineLoop:
    """Makes `loop` fail where a step reads what nobody stored.

    A block is filled with NaN when it is taken, and when it becomes free without a key, that is
    with nothing in it to be found again. In quantized pages every byte is 255: scales are NaN.
    """
    runner, pool = loop.runner, loop.scheduler.cache.pool
    assert isinstance(runner, Runner)
    pages, dead = runner.storage.blocks, set(range(pool.num_blocks))
    take, drop = pool.take, pool.drop
    launch, forward, logits = runner.launch, runner._forward, runner.model.logits
    nothing = 255 if pages.dtype == torch.uint8 else float("nan")
    if runner.host is not None:
        runner.host.pages.fill_(nothing)

    def taking(count: int) -> list[int] | None:
        taken = take(count)
        dead.update(taken or ())
        return taken

    def dropping(blocks: Iterable[int]) -> None:
        dropped = list(blocks)
        drop(dropped)
        dead.update(b for b in dropped if not pool.refs(b) and pool.key(b) is None)

    def launching(plan: StepPlan) -> LaunchedStep:
        launched = launch(plan)
        dead.difference_update(copied(plan))  # it may have had copies and no forward pass
        return launched

    def computing(plan: StepPlan, graphs: DecodeGraphs | None) -> Any:
        """After the copies of a step, which may read dead blocks, before its forward pass."""
        pages[:, :, sorted(dead - copied(plan))] = nothing
        dead.clear()
        return forward(plan, graphs)

    def finite(hidden: Tensor) -> Tensor:
        found: Tensor = logits(hidden)
        assert found.isfinite().all(), "a logit is NaN: the step read what nobody stored"
        return found

    pool.take, pool.drop, runner.launch = taking, dropping, launching  # type: ignore[method-assign]
    runner._forward, runner.model.logits = computing, finite  # type: ignore[method-assign]
    return loop


def copied(plan: StepPlan) -> set[int]:
    """Blocks of the pool that the copies of a plan fill."""
    return {copy.dst for copy in plan.copies if copy.kind != "to_host"}
