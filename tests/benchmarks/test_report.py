"""Figures of answers made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import pytest

from benchmarks import plot
from benchmarks.answers import Answer
from benchmarks.load import ClosedLoop, OpenLoop, Round
from benchmarks.report import (
    Limits,
    figures,
    notes,
    percentile,
    summarize,
    table,
    to_json,
    turn_table,
)
from benchmarks.sse import BenchError


def answer(ttft: float = 0.1, gaps: Sequence[float] = (0.1,) * 4, **more: object) -> Answer:
    times = [ttft]
    for gap in gaps:
        times.append(times[-1] + gap)
    known = {"prompt_tokens": 3, "completion_tokens": len(times)} | more
    return Answer(due=0, sent=0, times=tuple(times), **known)  # type: ignore[arg-type]


def a_round(*answers: Answer, seconds: float = 1, refused: int = 0) -> Round:
    return Round(answers, seconds, cpu_seconds=seconds / 10, refused=refused)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3, 1, 2], 0.5, 2), (range(1, 101), 0.99, 99), ([7], 0.99, 7), (range(1, 5), 0.5, 2)],
)
def test_percentile_is_the_nearest_rank(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_rates_are_the_median_round_and_times_are_over_all() -> None:
    rounds = [a_round(answer(0.1), answer(0.2), seconds=s) for s in (1, 2, 4)]
    result = summarize(ClosedLoop(2), rounds)
    assert (result.clients, result.rate) == (2, None)
    rates = (result.output_tokens_per_s, result.output_tokens_per_s_min)
    assert (*rates, result.output_tokens_per_s_max) == (5, 2.5, 10)
    assert result.requests_per_s == 1
    assert [one.output_tokens_per_s for one in result.rounds] == [10, 5, 2.5]
    assert (result.total.requests, result.total.output_tokens) == (6, 30)
    assert result.total.output_tokens_per_s == pytest.approx(30 / 7)
    assert result.total.prompt_tokens == 18
    assert result.total.client_cpu == pytest.approx(0.1)
    assert "| 2 | 5.0 (2.5 to 10.0) | 1.00 |" in table([result])


def test_ttft_tpot_and_itl() -> None:
    said = [answer(n / 1000, gaps=[0.010, 0.030]) for n in range(1, 101)]
    total = figures([a_round(*said)])
    assert total.itl_ms is not None
    assert astuple(total.ttft_ms) == pytest.approx((50, 90, 99, 50.5, 100))
    assert astuple(total.tpot_ms) == pytest.approx((20,) * 5)
    assert astuple(total.itl_ms) == pytest.approx((10, 30, 30, 20, 30))


def test_tokens_that_come_together_share_one_gap() -> None:
    total = figures([a_round(answer(gaps=[0.3], completion_tokens=4))])
    assert total.tpot_ms.p50 == pytest.approx(100) and total.tokens_per_event == 2
    assert total.itl_ms is not None and total.itl_ms.max == pytest.approx(300)
    (note,) = notes([summarize(ClosedLoop(1), [a_round(answer(completion_tokens=10))])])
    assert "2.0 tokens came per event" in note


def test_goodput_counts_what_keeps_to_both_limits() -> None:
    said = [
        answer(0.1, [0.01]),  # good
        answer(0.1, [0.03]),  # slow tokens
        answer(0.3, [0.01]),  # a late start
        answer(0.2, [], completion_tokens=1),  # good: exactly the limit, and no second token
    ]
    rounds = [a_round(*said, seconds=2, refused=4)]
    both = figures(rounds, Limits(ttft_ms=200, tpot_ms=20))
    assert (both.good_requests_per_s, both.good_share, both.refused) == (1, 2 / 8, 4)
    assert figures(rounds, Limits(ttft_ms=200)).good_share == 3 / 8
    assert figures(rounds, Limits(tpot_ms=20)).good_share == 3 / 8
    assert figures(rounds).good_share is None
    result = summarize(OpenLoop(5), rounds, Limits(ttft_ms=200, tpot_ms=20))
    assert "good requests/s (share)" in table([result]) and "| 1.00 (25%) |" in table([result])
    assert notes([result]) == ["5/s: the server refused 4 requests, which are in no time."]


def test_turns_of_chats_are_told_apart() -> None:
    said = [answer(0.1 * (turn + 1), turn=turn, prompt_tokens=100 * turn) for turn in (0, 1, 1, 2)]
    result = summarize(ClosedLoop(16), [a_round(*said)])
    assert [(t.turn, t.requests, t.prompt_tokens) for t in result.turns] == [
        (1, 1, 0),
        (2, 2, 100),
        (3, 1, 200),
    ]
    assert [t.ttft_ms.p50 for t in result.turns] == pytest.approx([100, 200, 300])
    assert "| 16 | 3 | 200 | 300.0 / 300.0 / 300.0 |" in turn_table([result])
    assert turn_table([summarize(ClosedLoop(1), [a_round(answer())])]) == ""


def test_json_is_flat_and_holds_every_round() -> None:
    rounds = [a_round(answer(), seconds=s) for s in (1, 2)]
    told = json.loads(json.dumps(to_json(summarize(ClosedLoop(1), rounds))))
    assert told["clients"] == 1 and told["rate"] is None and told["turns"] == []
    assert told["output_tokens_per_s"] == 3.75
    assert [one["output_tokens_per_s"] for one in told["rounds"]] == [5, 2.5]
    for part in (told, *told["rounds"]):
        for name in ("ttft_ms", "tpot_ms", "itl_ms"):
            for rank in ("p50", "p90", "p99"):
                assert part[f"{name}_{rank}"] == pytest.approx(100)


def test_a_client_that_counts_says_so() -> None:
    result = summarize(ClosedLoop(1), [a_round(answer(counted=False, prompt_tokens=None))])
    assert (result.total.counted_by, result.total.prompt_tokens) == ("events", None)
    assert "tells no usage" in notes([result])[0]


def test_a_round_without_answers() -> None:
    with pytest.raises(BenchError, match="refused every request"):
        summarize(OpenLoop(1), [a_round(refused=3)])


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loops = [(ClosedLoop(1), [a_round(answer())]), (ClosedLoop(2), [a_round(answer(gaps=[]))])]
    plot.draw(loops, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
