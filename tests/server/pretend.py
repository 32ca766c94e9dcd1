"""`quire` with a real engine process that computes nothing: `python -m tests.server.pretend serve`.

Loop, scheduler, pipes and signals are the real ones; there is no torch, so it starts in a second.
The model's name tells how the start goes, and tokens of a prompt what becomes of its step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from configs.settings import Settings
from engine import process
from engine.loop import EngineLoop
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.plan import StepPlan, StepResult
from scheduler.scheduler import Scheduler
from server.cli import main
from server.tokenizer import TextModel
from tests.server.fake_engine import INFO
from tests.server.text_models import chat_model, ids_of

RAISES, HANGS = 300, 301
STEP_SECONDS = 0.005


class Runner:
    """Says "a" for ever, or does what a prompt tells it to."""

    def launch(self, plan: StepPlan) -> StepResult:
        told = {token for admitted in plan.admitted for token in admitted.tokens}
        if RAISES in told:
            raise ValueError("a kernel failed")
        if HANGS in told:
            time.sleep(3600)
        time.sleep(STEP_SECONDS)
        wanted = sum(item.wants_token for item in plan.scheduled)
        return StepResult(plan.id, ids_of("a") * wanted)


class StartError(Exception):
    """As the real `engine.build` has it."""


def build(settings: Settings, report: Callable[[str, float, float, str], None]) -> EngineLoop:
    """A loop without a model. `until:FILE` starts only when there is the file."""
    word, _, file = settings.model.model.partition(":")
    if word == "until":
        report("weights", 1024, 4096, "model.safetensors")
        while not Path(file).exists():
            time.sleep(0.01)
    report("weights", 4096, 4096, "model.safetensors")
    cache = KVCacheManager(BlockPool(2048), INFO.block_size)
    scheduler = Scheduler(cache, max_num_seqs=64, max_num_batched_tokens=256)
    return EngineLoop(scheduler, Runner(), INFO)


def engine_main(settings: Settings, inbox: Connection, outbox: Connection) -> None:
    """What the engine's process runs."""
    sys.modules["engine.build"] = SimpleNamespace(build=build, StartError=StartError)  # type: ignore[assignment]
    process.main(settings, inbox, outbox)


if __name__ == "__main__":
    from tests.server import pretend  # by its own name, under which the process finds it again

    process.main = pretend.engine_main
    TextModel.load = staticmethod(lambda path: chat_model())  # type: ignore[method-assign,assignment]
    raise SystemExit(main())
