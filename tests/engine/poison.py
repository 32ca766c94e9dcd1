"""Test mode of the KV pages: blocks that hold nothing are NaN, and no logit ever is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.inputs import StepInputs
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
    blocks, dead = runner.storage.blocks, set(range(pool.num_blocks))
    take, drop = pool.take, pool.drop
    build, logits = runner.inputs.build, runner.model.logits

    def taking(count: int) -> list[int] | None:
        taken = take(count)
        dead.update(taken or ())
        return taken

    def dropping(dropped: Iterable[int]) -> None:
        dropped = list(dropped)
        drop(dropped)
        dead.update(b for b in dropped if not pool.refs(b) and pool.key(b) is None)

    def building(plan: StepPlan) -> StepInputs:
        """Runs between the copies of a step, which may read dead blocks, and its forward pass."""
        dead.difference_update(copy.dst for copy in plan.copies)
        blocks[:, :, sorted(dead)] = 255 if blocks.dtype == torch.uint8 else float("nan")
        dead.clear()
        return build(plan)

    def finite(hidden: Tensor) -> Tensor:
        found: Tensor = logits(hidden)
        assert found.isfinite().all(), "a logit is NaN: the step read what nobody stored"
        return found

    pool.take, pool.drop = taking, dropping  # type: ignore[method-assign]
    runner.inputs.build, runner.model.logits = building, finite  # type: ignore[method-assign]
    return loop
