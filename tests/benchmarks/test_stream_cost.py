"""The benchmark of streams: every token of every stream arrives, round after round."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import make_checkpoint
from benchmarks.stream_cost import Cost, Load, line, measure

LOAD = Load(streams=3, rate=600, tokens=20)


async def test_rounds_count_the_events_of_all_streams(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 64}
    (tmp_path / "tokenizer.json").write_text(json.dumps(make_checkpoint.tokenizer(1000)))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(make_checkpoint.tokenizer_config(config))
    )
    costs = await measure(tmp_path, LOAD, rounds=2)
    least = 3 * 20 // 2  # tokens that end amid a character wait for the next one
    assert len(costs) == 2 and costs[0].events == costs[1].events
    assert least < costs[0].events <= 3 * (20 + 3)  # a role, an end and a usage each
    assert all(cost.cpu > 0 for cost in costs)


def test_a_line_of_the_table() -> None:
    costs = [Cost(1000, 2.0, 0.1), Cost(1000, 2.0, 0.3), Cost(1000, 2.0, 0.2)]
    assert line(LOAD, costs) == "| 3 | 500 | 200.0 (100.0 to 300.0) | 10.0% |"
