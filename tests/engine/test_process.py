"""The engine's process, without a model."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest

from configs.settings import Settings
from engine import build, process, stall_watch
from engine.protocol import FromEngine, Ready
from tests.server.fake_engine import INFO


def test_what_the_start_left_is_frozen_when_the_loop_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    loop = SimpleNamespace(
        info=INFO,
        run=lambda inbox, send: frozen.append(gc.get_freeze_count()),
        close=lambda: None,
    )
    watch = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr(build, "build", lambda settings, progress: loop)
    monkeypatch.setattr(stall_watch, "StallWatch", lambda loop, timeout: watch)
    sent: list[FromEngine] = []
    try:
        process._serve(Settings.of(), None, sent.append, lambda *told: None)  # type: ignore[arg-type]
    finally:
        gc.unfreeze()
    assert sent == [Ready(INFO)]
    assert len(frozen) == 1
    assert frozen[0] > 0
