"""The engine alone, in a closed loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.in_process import ClosedLoop, Round, line, main
from scheduler.pace import Pace
from tests.engine import drive
from tests.models import checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("llama", tmp_path_factory.mktemp("llama"))


def test_so_many_clients_ask_one_request_after_the_other(model: Path) -> None:
    loop = drive.engine(model)
    running = []
    step = loop.step
    loop.step = lambda: (step(), running.append(len(loop.scheduler.running)))  # type: ignore
    done = ClosedLoop(loop, 3, 4, (20, 5)).run()
    loop.close()
    assert (done.tokens, len(done.first), len(done.gaps)) == (60, 12, 48)
    assert max(running) == 3
    assert 0 < max(done.gaps) <= done.seconds


def test_a_line_of_the_table() -> None:
    rounds = [Round(10, seconds, [0.02], [0.001, 0.003]) for seconds in (1.0, 0.5, 2.0)]
    assert line(rounds) == "10 (5 to 20) | 20.0 / 20.0 | 3.0 / 3.0"


def test_stretches_take_turns(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []
    made = Pace.__init__

    def note(self: Pace, stretch: float = 0.0) -> None:
        tried.append(stretch)
        made(self, stretch)

    monkeypatch.setattr(Pace, "__init__", note)
    size = ["--input", "20", "--output", "3", "--each", "1"]
    main(
        [
            "--model",
            str(model),
            "--clients",
            "2",
            "--rounds",
            "2",
            *size,
            "--prefill-stretch",
            "0",
            "2",
        ]
    )
    assert tried[-5:] == [0, 0, 2, 0, 2]
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| 2", "0"], ["| 2", "2"]]
