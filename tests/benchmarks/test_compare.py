"""The order of turns, what is kept and what the tables make of it, with peers that are made up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks import compare
from benchmarks.answers import Answer
from benchmarks.load import Round
from benchmarks.peers.checkpoint import Checkpoint
from benchmarks.peers.comparison import Comparison, noted_round, plain
from benchmarks.peers.process import ProcessGroup
from benchmarks.peers.record import Record
from benchmarks.peers.tables import tables
from benchmarks.peers.task import Task
from benchmarks.sse import BenchError

ONE = Task("one", "the first", "small", clients=1, requests=2, input=10, output=4)
TWO = Task("two", "the second", "small", clients=2, requests=1, input=10, output=4)
BIG = Task("big", "the third", "large", clients=1, requests=1, input=10, output=4)
Events = list[str]


def round_of(task: Task, seconds: float = 2.0, prompt_tokens: int = 10) -> Round:
    answer = Answer(
        due=0.0,
        sent=0.0,
        times=(0.5, 1.0, 1.5, 2.0),
        prompt_tokens=prompt_tokens,
        completion_tokens=task.output,
    )
    return Round((answer,) * task.loop.scripts, seconds, 0.1)


class FakeProcess:
    def __init__(self, name: str, events: Events) -> None:
        self.name, self.events, self.ended = name, events, False

    def pause(self) -> None:
        self.events.append(f"stop {self.name}")

    def end(self) -> None:
        self.ended = True
        self.events.append(f"end {self.name}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.events.append(f"cont {self.name}")
        yield
        self.pause()


class FakePeer:
    """Notes what is done to it; `fails` by task raises that, `dies` ends its process first."""

    about = "made up"

    def __init__(
        self,
        name: str,
        events: Events,
        *,
        seconds: float = 2.0,
        fails: dict[str, Exception] | None = None,
        dies: bool = False,
        why: str | None = None,
    ) -> None:
        self.name, self.events, self.seconds = name, events, seconds
        self.fails, self.dies, self.why = fails or {}, dies, why

    def absent(self) -> str | None:
        return self.why

    def version(self) -> str:
        return "1.0"

    def prepare(self, checkpoint: Checkpoint) -> None:
        self.events.append(f"prepare {self.name} {checkpoint.sequences}")

    def settings(self, checkpoint: Checkpoint) -> str:
        return f"{self.name} {checkpoint.shape}"

    def start(self, checkpoint: Checkpoint, log: Path) -> FakeRunning:
        if "start" in self.fails:
            raise self.fails["start"]
        return FakeRunning(self)


class FakeRunning:
    def __init__(self, peer: FakePeer) -> None:
        self._peer = peer
        self._process = FakeProcess(peer.name, peer.events)
        self.process = cast(ProcessGroup, self._process)

    def measure(self, task: Task, limit_s: float) -> Round:
        peer = self._peer
        peer.events.append(f"{'warm' if task.output == 8 else 'ask'} {peer.name} {task.name}")
        if task.name in peer.fails:
            self._process.ended = peer.dies
            raise peer.fails[task.name]
        return round_of(task, peer.seconds)


def compared(
    peers: list[FakePeer], tasks: list[Task], folder: Path, rounds: int = 2
) -> tuple[Record, Events]:
    """What a run adds to the record in `folder`, and the events of that run."""
    record = Record.read(folder / "record.json")
    for task in tasks:
        record.settle(task.name, plain(task))
    events = peers[0].events
    events.clear()
    Comparison(peers, tasks, record, folder, rounds=rounds, limit_s=9).run()
    return record, events


def test_turns_alternate_and_all_others_stand_still(tmp_path: Path) -> None:
    events: Events = []
    record, events = compared([FakePeer(n, events) for n in "abc"], [ONE, TWO], tmp_path)
    asked = [event.removeprefix("ask ") for event in events if event.startswith("ask")]
    assert asked == [f"{peer} {task}" for task in ("one", "two") * 2 for peer in "abc"]
    running: set[str] = set()
    for event in events:
        verb, peer, *_ = event.split()
        running |= {peer} if verb == "cont" else set()
        running -= {peer} if verb == "stop" else set()
        assert verb not in ("ask", "warm") or running == {peer}
    assert [event.split()[0] for event in events[6:10]] == ["cont", "warm", "ask", "stop"]
    assert len([event for event in events if event.startswith("warm")]) == 6
    assert events[-3:] == ["end c", "end b", "end a"]
    assert len(record.rounds) == 12 and not record.failures
    assert Record.read(record.file).rounds == record.rounds


def test_peers_start_once_for_each_model(tmp_path: Path) -> None:
    events: Events = []
    _, events = compared([FakePeer("a", events)], [ONE, TWO, BIG], tmp_path)
    assert [event for event in events if event.startswith(("prepare", "end"))] == [
        "prepare a 2",  # sequences: the most of the two tasks
        "end a",
        "prepare a 1",
        "end a",
    ]


def test_a_second_run_adds_what_is_missing(tmp_path: Path) -> None:
    events: Events = []
    peers = [FakePeer(name, events) for name in "ab"]
    compared(peers[:1], [ONE], tmp_path, rounds=1)
    record, events = compared(peers, [ONE], tmp_path, rounds=2)
    assert [event for event in events if event.startswith("ask")] == [
        "ask b one",
        "ask a one",
        "ask b one",
    ]
    assert len(record.peers["a"]["starts_s"]["small"]) == 2
    _, events = compared(peers, [ONE], tmp_path, rounds=2)
    assert events == []


def test_rounds_of_another_task_do_not_mix(tmp_path: Path) -> None:
    compared([FakePeer("a", [])], [ONE], tmp_path)
    with pytest.raises(ValueError, match="use another --out"):
        compared([FakePeer("a", [])], [ONE.quick(), TWO.quick(), ONE.brief()], tmp_path)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"some": "thing"}')
    with pytest.raises(ValueError, match="no record of a comparison"):
        Record.read(tmp_path / "record.json")


@pytest.mark.parametrize("error", [BenchError("it ended: oh"), TimeoutError()])
def test_a_peer_that_dies_is_left_out_from_there(tmp_path: Path, error: Exception) -> None:
    events: Events = []
    peers = [FakePeer("a", events), FakePeer("b", events, fails={"one": error}, dies=True)]
    record, events = compared(peers, [ONE, TWO], tmp_path)
    assert {(one["task"], one["peer"]) for one in record.rounds} == {("one", "a"), ("two", "a")}
    why = str(error) or "not done in 9 s"
    assert record.failures == [{"peer": "b", "what": "one", "why": why}]
    assert "ask b two" not in events


def test_a_task_that_a_peer_refuses_is_not_tried_again(tmp_path: Path) -> None:
    events: Events = []
    peers = [FakePeer("a", events, fails={"one": BenchError("status 400")})]
    record, events = compared(peers, [ONE, TWO], tmp_path)
    assert events.count("warm a one") == 1 and events.count("ask a two") == 2
    assert len(record.rounds) == 2 and len(record.failures) == 1


def test_a_peer_that_does_not_start(tmp_path: Path) -> None:
    events: Events = []
    peers = [FakePeer("a", events, fails={"start": BenchError("no")}), FakePeer("b", events)]
    record, _ = compared(peers, [ONE], tmp_path)
    assert record.failures == [{"peer": "a", "what": "small", "why": "no"}]
    assert {one["peer"] for one in record.rounds} == {"b"}


def test_an_absent_peer_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    peers = [FakePeer("a", []), FakePeer("b", [], why="not installed: do this")]
    assert compare.present(peers) == peers[:1]
    assert capsys.readouterr().err == "without b: not installed: do this\n"


def test_a_round_must_be_what_was_asked_for() -> None:
    assert noted_round(ONE, round_of(ONE))["output_tokens_per_s"] == 4.0
    with pytest.raises(BenchError, match="prompts of 10 tokens were 12"):
        noted_round(ONE, round_of(ONE, prompt_tokens=12))
    uncounted = Answer(0.0, 0.0, (1.0,), prompt_tokens=None, completion_tokens=1, counted=False)
    with pytest.raises(BenchError, match="usage"):
        noted_round(ONE, Round((uncounted,), 1.0, 0.1))


def measured(task: str, peer: str, number: int, rate: float) -> dict[str, Any]:
    known = {"task": task, "peer": peer, "round": number}
    return known | {"output_tokens_per_s": rate, "ttft_ms": rate / 10, "tpot_ms": 2.0}


def test_tables_tell_median_spread_and_ratio(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json", tasks={"one": plain(ONE), "two": plain(TWO)})
    for peer, starts in (("quire", [2.0, 4.0, 3.0]), ("b", [9.5])):
        settings = {"small": f"{peer} --well"}
        record.peers[peer] = {"about": "x", "version": "7", "settings": settings}
        record.peers[peer]["starts_s"] = {"small": starts}
    for number, (ours, other) in enumerate([(1000, 500), (3000, 400), (2000, 900)]):
        record.rounds.append(measured("one", "quire", number, ours))
        record.rounds.append(measured("one", "b", number, other))
    record.failures = [{"peer": "b", "what": "two", "why": "status 500"}]
    told = tables(record)
    assert "|  | start, s | the first | the second |" in told
    assert "| quire | 3 | 2,000 (1,000 to 3,000) |  |" in told
    assert "| b | 9.5 | 500 (400 to 900), 0.25 x |  |" in told
    assert "| b | 50 / 2 |  |" in told
    assert "- b 7: x" in told and "`b --well`" in told
    assert "- failed: b, two: status 500" in told


def test_the_estimate_takes_what_was_measured(tmp_path: Path) -> None:
    events: Events = []
    peers = [FakePeer("a", events, seconds=7.0)]
    compared(peers, [ONE], tmp_path, rounds=1)
    record = Record.read(tmp_path / "record.json")
    record.peers["a"]["starts_s"]["small"] = [11.0]
    left = Comparison(peers, [ONE], record, tmp_path, rounds=3, limit_s=9)
    assert left.seconds() == 7.0 * 2 + 11.0
    unknown = Comparison(peers, [BIG], record, tmp_path, rounds=3, limit_s=9)
    assert unknown.seconds() == BIG.guess_s * 3 + 30.0


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--peers", "nobody"], ["--workloads", "none"], ["--rounds", "0"]):
        with pytest.raises(SystemExit) as ended:
            compare.main(flags)
        assert ended.value.code == 2
        assert flags[-1] in capsys.readouterr().err.splitlines()[-1]
