"""/debug/steps, /v1/requests/{id}/trace and `quire trace`, over a trace that a scheduler made."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.protocol import TraceView
from engine.step_trace import StepTrace
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from server.app import create_app
from server.cli import main
from server.keys import KeyRing
from server.perfetto import render
from tests.scheduler.fake_device import FakeDevice, make_request
from tests.server.front import Door, app_over, door, live, says
from tests.server.text_models import chat_model


def record(requests: list[Request], keep: int = 100, blocks: int = 4, steps: int = 99) -> TraceView:
    """What is kept of running `requests` together; a step's times are whole seconds."""
    ticks = itertools.count(1)
    trace = StepTrace(keep, 4, clock=lambda: float(next(ticks)))
    scheduler = Scheduler(
        KVCacheManager(BlockPool(blocks), 4),
        max_num_seqs=4,
        max_num_batched_tokens=32,
        journal=trace,
    )
    device = FakeDevice(4, 4)
    for request in requests:
        scheduler.add(request)
    for _ in range(steps):
        if not scheduler.has_work:
            break
        trace.begin()
        plan = scheduler.schedule()
        trace.planned(plan, scheduler)
        scheduler.commit(device.run(plan))
        trace.ended(plan.id)
    return trace.view()


def crowded(**options: int) -> TraceView:
    """Two requests for which there is no room together: `b` gives way to `a` and waits for it."""
    return record([make_request(name, [ord(name)] * 7, max_tokens=8) for name in "ab"], **options)


def test_steps_tell_who_ran_and_who_waited() -> None:
    answer = door(says("x", steps=crowded())).get("/debug/steps").json()
    assert (answer["keep"], len(answer["steps"])) == (100, 14)
    first, third = answer["steps"][0], answer["steps"][2]
    assert [
        (s["request_id"], s["start"], s["tokens"], s["sampled"]) for s in first["scheduled"]
    ] == [
        ("a", 0, 7, True),
        ("b", 0, 7, True),
    ]
    assert (first["tokens"], first["running"], first["waiting"], first["blocks_used"]) == (
        14,
        2,
        0,
        4,
    )
    assert first["plan_ms"] > 0
    assert first["run_ms"] > 0
    assert [s["request_id"] for s in third["scheduled"]] == ["a"]
    assert third["preempted"] == [
        {"request_id": "b", "index": 0, "for": {"request_id": "a", "index": 0}}
    ]
    assert third["first_waiting"] == {"request_id": "b", "index": 0, "why": "preemption"}
    assert answer["steps"][3]["first_waiting"]["why"] == "no blocks"
    assert answer["steps"][-1]["finished"] == [
        {"request_id": "b", "index": 0, "reason": "length", "tokens": 8}
    ]


def test_the_last_steps_only() -> None:
    view = crowded(keep=6)
    front = door(says("x", steps=view))
    shown = [step["step"] for step in front.get("/debug/steps?last=4").json()["steps"]]
    assert shown == [10, 11, 12, 13]
    assert len(front.get("/debug/steps?last=50").json()["steps"]) == 6


@pytest.mark.parametrize("query", ["last=0", "last=x", "last=-1", "format=xml"])
def test_bad_queries_are_refused(query: str) -> None:
    response = door(says("x", steps=crowded())).get(f"/debug/steps?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


def test_the_life_of_a_request() -> None:
    answer = door(says("x", steps=crowded())).get("/v1/requests/b/trace").json()
    assert answer["id"] == "b"
    [life] = answer["answers"]
    assert [event["event"] for event in life["events"]] == [
        "queued",
        "admitted",
        "preempted",
        "admitted",
        "finished",
    ]
    assert life["events"][2]["for"] == {"request_id": "a", "index": 0}
    times = [event["at"] for event in life["events"]]
    assert times == sorted(times)
    assert life["steps_waited"] == {"preemption": 1, "no blocks": 5}
    assert [step["step"] for step in life["steps"]] == [0, 1, *range(8, 14)]
    assert sum(step["sampled"] for step in life["steps"]) == 8


def test_every_answer_and_every_prompt_of_a_response() -> None:
    view = record(
        [make_request("r-0", [1] * 5, n=2), make_request("r-1", [2] * 5), make_request("r-x", [3])],
        blocks=64,
    )
    answers = door(says("x", steps=view)).get("/v1/requests/r/trace").json()["answers"]
    assert [(a["request_id"], a["index"]) for a in answers] == [("r-0", 0), ("r-0", 1), ("r-1", 0)]
    assert answers[1]["steps_waited"] == {"leader's prompt": 1}


def test_a_request_that_still_runs_though_its_admission_is_forgotten() -> None:
    view = record([make_request("a", [1] * 5, max_tokens=30)], keep=3, blocks=64, steps=9)
    [life] = door(says("x", steps=view)).get("/v1/requests/a/trace").json()["answers"]
    assert [step["start"] for step in life["steps"]] == [10, 11, 12]
    assert life["steps_waited"] == {}


def test_unknown_forgotten_and_untraced_requests() -> None:
    unknown = door(says("x", steps=crowded())).get("/v1/requests/c/trace")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
    assert door(says("x", steps=crowded(keep=3))).get("/v1/requests/a/trace").status_code == 404
    off = door(says("x"))
    for path in ("/v1/requests/a/trace", "/debug/steps"):
        response = off.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "trace_off")
    assert door(says("x", alive=False)).get("/debug/steps").status_code == 503


def test_a_tenant_sees_its_own_requests_only() -> None:
    mine = msgspec.structs.replace(make_request("mine", [1, 2]), tenant="alice")
    other = msgspec.structs.replace(make_request("other", [3, 4]), tenant="bob")
    app = create_app(
        says("x", steps=record([mine, other], blocks=64)),
        chat_model(),
        served_model_names=("m",),
        keys=KeyRing([("key-a", "alice"), ("key-b", "bob")]),
    )
    asked = {"headers": {"authorization": "Bearer key-a"}}
    assert Door(app).get("/v1/requests/mine/trace", **asked).status_code == 200
    assert Door(app).get("/v1/requests/other/trace", **asked).status_code == 404
    assert Door(app).get("/v1/requests/mine/trace").status_code == 401


# ---------------------------------------------------------------------- Perfetto


def check_trace_events(document: Any) -> list[dict[str, Any]]:
    """Holds a document to the Trace Event Format, and to what Perfetto's importer drops silently:
    spans of one thread that overlap without one holding the other, asynchronous spans that do not
    pair, and instants outside of their span."""
    events: list[dict[str, Any]] = document["traceEvents"]
    assert document["displayTimeUnit"] in ("ms", "ns")
    threads: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    open_spans: dict[Any, list[str]] = defaultdict(list)
    for event in events:
        assert event["ph"] in "XCMben", event
        assert isinstance(event["pid"], int), event
        assert isinstance(event["tid"], int), event
        assert event["name"], event
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            continue
        assert event["ts"] >= 0, event
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
            span = (event["ts"], -event["dur"])
            threads[event["pid"], event["tid"]].append(span)
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
    for spans in threads.values():
        ends: list[float] = []
        for start, negative in sorted(spans):
            while ends and ends[-1] <= start:
                ends.pop()
            assert not ends or start - negative <= ends[-1], "spans of one thread overlap"
            ends.append(start - negative)
    for event in sorted((e for e in events if e["ph"] in "ben"), key=lambda e: e["ts"]):
        stack = open_spans[event["cat"], event["id"]]
        if event["ph"] == "b":
            stack.append(event["name"])
        elif event["ph"] == "e":
            assert stack
            assert stack.pop() == event["name"]
    assert not any(open_spans.values()), "an asynchronous span never ends"
    return events


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 9}, {"keep": 5}, {"keep": 1}, {"steps": 5}, {"steps": 0}],
    ids=lambda options: str(options),
)
def test_perfetto_takes_it(options: dict[str, int]) -> None:
    check_trace_events(json.loads(b"".join(render(crowded(**options)))))


def test_what_perfetto_shows() -> None:
    events = check_trace_events(json.loads(b"".join(render(crowded()))))
    shown = [e["name"] for e in events if e["ph"] == "X" and e["pid"] == 1 and e["tid"] == 1]
    assert [name for name in shown if name != "plan"] == [f"step {n}" for n in range(14)]
    slots = [(e["tid"], e["name"]) for e in events if e["ph"] == "X" and e["pid"] == 2]
    assert slots[:3] == [(1, "a[0]"), (2, "b[0]"), (1, "a[0]")]
    lives = [(e["id"], e["name"]) for e in events if e["ph"] == "b"]
    assert lives == [
        ("a[0]", "waiting"),
        ("a[0]", "running"),
        ("b[0]", "waiting"),
        ("b[0]", "running"),
        ("b[0]", "waiting"),
        ("b[0]", "running"),
    ]
    [preempted] = [e for e in events if e["name"] == "preempted"]
    assert preempted["args"] == {"sequence": "b[0]", "for": "a[0]"}


def test_the_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    with live(app_over(says("x", steps=crowded()))) as url:
        assert main(["trace", "--url", url, str(path)]) == 0
        assert main(["trace", "--url", url, str(tmp_path / "none" / "out.json")]) == 1
    check_trace_events(json.loads(path.read_bytes()))
    assert "cannot be written" in capsys.readouterr().err
    with live(app_over(says("x"))) as url:
        assert main(["trace", "--url", url, str(path)]) == 1
    assert "trace_off" in capsys.readouterr().err
