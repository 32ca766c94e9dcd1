"""The seed experiment on a tiny GPT-2: four ways to the same tokens, timed one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kv_cache_speedup import PROMPT, Result, Run, disagreement, draw, main, measure
from benchmarks.kv_cache_speedup import systems as made
from tests.models import checkpoints

COUNT = 6


def test_all_four_agree_and_every_token_has_a_time(tmp_path: Path) -> None:
    folder = checkpoints.make("gpt2", tmp_path)
    systems = made(folder, torch.float32, "cpu", threads=1)
    assert disagreement(systems, COUNT) is None

    def late(count: int) -> Run:
        run = systems[1].uncached(count)
        return replace(run, tokens=[*run.tokens[:4], -1, *run.tokens[5:]])

    wrong = [systems[0], replace(systems[1], name="other", uncached=late)]
    assert disagreement(wrong, COUNT) == "other without a cache differs from token 4 on"

    results = measure(systems, COUNT, rounds=2)
    for result in results:
        runs = [*result.cached, *result.uncached]
        assert [len(run.seconds) for run in runs] == [COUNT] * 4
        assert all(run.tokens == runs[0].tokens for run in runs)
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_line_of_the_table() -> None:
    cached = [Run([1, 2], [0.5, total - 0.5]) for total in (1.0, 4.0, 2.0)]
    uncached = [Run([1, 2], [1.0, 7.0])] * 3
    result = Result("Quire", 2, cached, uncached)
    assert result.line == (
        "| Quire | 2 | 2.00 (1.00 to 4.00) | 1.0 | 8.00 (8.00 to 8.00) | 0.2 | 4.00 |"
    )
    assert result.milliseconds(cached=True) == [500, 1500]


def test_a_length_beyond_the_context_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tokens", "1009"])
    assert f"between 1 and {1024 - len(PROMPT)}, got 1009" in capsys.readouterr().err
