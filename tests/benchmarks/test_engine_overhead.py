"""The benchmark of the engine's own time: what a round does, and how it is told."""

from __future__ import annotations

import pytest

from benchmarks.engine_overhead import CHUNK, PARTS, STEPS, Case, line, measure


@pytest.mark.parametrize("reads", [False, True])
def test_in_a_round_all_decode_and_prompts_are_read_beside_them(reads: bool) -> None:
    case = Case(3, reads=reads)
    scheduler = case.scheduler
    before, asked = [seq.num_generated for seq in scheduler.running], scheduler.prefix.queries
    [[parts]] = measure([case], rounds=1)
    assert tuple(parts) == PARTS
    assert [seq.num_generated for seq in scheduler.running] == [n + 2 * STEPS for n in before]
    assert scheduler.prefix.queries - asked == (2 * STEPS * CHUNK if reads else 0)


def test_a_line_of_the_table() -> None:
    rounds = [dict.fromkeys(PARTS, 10.0 * turn) for turn in (1, 3, 2)]
    assert line(Case(4), rounds) == (
        "| 4 decoding | 20 | 20 | 20 | 20 | 20 | 100 (50 to 150) | 25.00 |"
    )
    assert line(Case(0, reads=True), rounds).startswith("| a chunk of 512 | 20 |")
