"""Counts kernels that are compiled while requests wait for them."""

from __future__ import annotations

import sys
from typing import Any


class JitCompiles:
    """Compilations by Numba and Triton since `watch`; what they load from their caches on disk is
    none."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self) -> JitCompiles:
        """Begins to count, for those of the two that this process has loaded by now."""
        if "numba" in sys.modules:
            from numba.core import event

            event.register("numba:compile", _numba_listener(self))  # type: ignore[no-untyped-call]
        if "triton" in sys.modules:
            from triton import knobs

            knobs.compilation.listener = self.triton_compiled
        return self

    def triton_compiled(self, *, cache_hit: bool, **_: Any) -> None:
        """Triton's compilation listener."""
        self.count += not cache_hit


def _numba_listener(compiles: JitCompiles) -> Any:
    from numba.core.event import Event, Listener

    class Starts(Listener):
        def on_start(self, event: Event) -> None:
            compiles.count += 1

        def on_end(self, event: Event) -> None:
            pass

    return Starts()
