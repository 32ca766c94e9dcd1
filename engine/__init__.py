"""The step loop. `from engine import LLM, SamplingParams` is the offline front door.

The names are resolved on first use, so that `engine.client` and `engine.protocol` stay importable
without torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Torch reads it when it first allocates: weights and KV pages then come in huge pages where the
# system has them. Blocks lie scattered; in small pages each costs a walk through page tables.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from engine.llm import LLM
    from scheduler.request import SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from scheduler.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
