"""Test mode of the KV pages: blocks that hold nothing are NaN, and no logit ever is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.inputs import StepInputs
from engine.loop import EngineLoop
from engine.runner import Runner
from scheduler.plan import StepPlan, StepResult


def poison(loop: EngineLoop) -> EngineLoop:
    """Makes `loop` fail where a step reads what nobody stored.

    A block is filled with NaN when it is taken, and when it becomes free without a key, that is
    with nothing in it to be found again. In quantized pages every byte is 255: scales are NaN.
    """
    runner, pool = loop.runner, loop.scheduler.cache.pool
    assert isinstance(runner, Runner)
    pages, dead = runner.storage.blocks, set(range(pool.num_blocks))
    take, drop = pool.take, pool.drop
    run, build, logits = runner.run, runner.inputs.build, runner.model.logits
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

    def running(plan: StepPlan) -> StepResult:
        result = run(plan)
        dead.difference_update(copied(plan))  # it may have had copies and no forward pass
        return result

    def building(plan: StepPlan) -> StepInputs:
        """Runs between the copies of a step, which may read dead blocks, and its forward pass."""
        pages[:, :, sorted(dead - copied(plan))] = nothing
        dead.clear()
        return build(plan)

    def finite(hidden: Tensor) -> Tensor:
        found: Tensor = logits(hidden)
        assert found.isfinite().all(), "a logit is NaN: the step read what nobody stored"
        return found

    pool.take, pool.drop, runner.run = taking, dropping, running  # type: ignore[method-assign]
    runner.inputs.build, runner.model.logits = building, finite  # type: ignore[method-assign]
    return loop


def copied(plan: StepPlan) -> set[int]:
    """Blocks of the pool that the copies of a plan fill."""
    return {copy.dst for copy in plan.copies if copy.kind != "to_host"}
