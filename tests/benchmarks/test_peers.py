"""Real processes behind the peers: stopping and continuing them, a server, a program on pipes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.catalogue import peers
from benchmarks.peers.checkpoint import Checkpoint, made
from benchmarks.peers.openvino import RunningDriver, asked, understood
from benchmarks.peers.peer import RunningServer, ServerPeer
from benchmarks.peers.process import ProcessGroup
from benchmarks.peers.task import TASKS, Task
from benchmarks.sse import BenchError

TASK = Task("t", "a task", "small", clients=2, requests=2, input=3, output=5)
CHATS = Task("c", "chats", "small", clients=2, requests=1, input=3, output=5, turns=2, system=7)

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""

# Refuses the first request, as a server that still loads. One word is one token.
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    asked = 0

    def do_POST(self):
        Handler.asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Handler.asked == 1 or body.get("refused"):
            return self.send_error(503)
        if "messages" in body:
            prompt = sum(len(message["content"].split()) for message in body["messages"])
        else:
            prompt = len(body["prompt"])
        choice = {"text": " a"} if "prompt" in body else {"delta": {"content": " a"}}
        events = [{"choices": [choice]}] * (body["max_tokens"] + body.get("more", 0))
        used = {"prompt_tokens": prompt, "completion_tokens": len(events)}
        events.append({"choices": [], "usage": used})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\\n\\n".encode())

    def log_message(self, *parts):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

DRIVER = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    scripts = json.loads(line)["scripts"]
    answers = [
        {"sent": 1.0, "turn": turn, "times": [2.0, 3.0], "prompt_tokens": len(ids),
         "completion_tokens": tokens + LONGER}
        for script in scripts for turn, (ids, tokens) in enumerate(script)
    ]
    print(json.dumps({"seconds": 4.0, "cpu_seconds": 1.0, "answers": answers}), flush=True)
"""


class PythonServer(ServerPeer):
    """`more` tokens than asked for in every answer, or a refusal of everything."""

    name = "fake"
    about = "a server in ten lines"

    def __init__(self, program: str = SERVER, **extra: Any) -> None:
        self._program, self._extra = program, extra

    @property
    def extra_body(self) -> dict[str, Any]:
        return self._extra

    def absent(self) -> str | None:
        return None

    def version(self) -> str:
        return "1"

    def command(self, checkpoint: Checkpoint, port: int) -> Sequence[str | Path]:
        return [Path(sys.executable), "-c", self._program, str(port)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint("small", tmp_path, sequences=2, context=64)


@pytest.fixture
def started(checkpoint: Checkpoint, tmp_path: Path) -> Iterator[RunningServer]:
    running = PythonServer().start(checkpoint, tmp_path / "log")
    yield running
    running.process.end()


def state(pid: int) -> str:
    """As /proc tells: R, S, T (stopped), Z or, of a process that is gone, an empty string."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def until(pid: int, states: str) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if state(pid) in states.split(","):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_a_group_stops_and_goes_on_and_ends_as_one(tmp_path: Path) -> None:
    group = ProcessGroup([sys.executable, "-c", PARENT], tmp_path / "log", piped=True)
    assert group.stdout is not None
    child = int(group.stdout.readline())
    group.pause()
    assert until(child, "T")
    with group.running():
        assert until(child, "S")
    assert until(child, "T") and not group.ended
    group.end()
    assert group.ended and until(child, ",Z")


def test_a_server_is_started_and_measured(started: RunningServer) -> None:
    done = started.measure(TASK, limit_s=20)
    assert len(done.answers) == 4
    assert {(one.prompt_tokens, one.completion_tokens) for one in done.answers} == {(3, 5)}


def test_chats_go_to_the_chat_route_in_words_that_measure(started: RunningServer) -> None:
    done = started.measure(CHATS, limit_s=20)
    # system + question, then also the answer of 5 words and the next question
    assert [one.prompt_tokens for one in done.answers if one.turn == 0] == [10, 10]
    assert [one.prompt_tokens for one in done.answers if one.turn == 1] == [18, 18]


def test_a_server_that_says_too_much_is_void(checkpoint: Checkpoint, tmp_path: Path) -> None:
    running = PythonServer(more=1).start(checkpoint, tmp_path / "log")
    try:
        with pytest.raises(BenchError, match="asked for 5 tokens, got 6"):
            running.measure(TASK, limit_s=20)
    finally:
        running.process.end()


def test_a_server_that_ends_at_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="it ended: no such luck"):
        PythonServer("raise SystemExit('no such luck')").start(checkpoint, tmp_path / "log")


def test_settings_are_told_as_typed_without_folders(checkpoint: Checkpoint) -> None:
    assert PythonServer("x").settings(checkpoint) == f"{Path(sys.executable).name} -c x 0"


def driver(tmp_path: Path, longer: int = 0) -> RunningDriver:
    program = DRIVER.replace("LONGER", str(longer))
    running = RunningDriver(
        ProcessGroup([sys.executable, "-c", program], tmp_path / "log", piped=True)
    )
    assert running.line(20) == "ready\n"
    return running


def test_a_program_on_pipes_is_measured_like_a_server(tmp_path: Path) -> None:
    running = driver(tmp_path)
    done = running.measure(TASK, limit_s=20)
    assert (len(done.answers), done.seconds) == (4, 4.0)
    assert (done.answers[0].ttft, done.answers[0].tpot) == (1.0, 0.25)
    with pytest.raises(TimeoutError):
        running.line(0.01)
    running.process.end()


def test_a_program_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such luck')"]
    running = RunningDriver(ProcessGroup(command, tmp_path / "log", piped=True))
    for _ in range(2):  # a pipe may break only at the second line
        with pytest.raises(BenchError, match="it ended: no such luck"):
            running.measure(TASK, limit_s=20)
    running.process.end()


def test_a_program_whose_answers_have_another_length(tmp_path: Path) -> None:
    running = driver(tmp_path, longer=1)
    with pytest.raises(BenchError, match="asked for 5 tokens, got 6"):
        running.measure(TASK, limit_s=20)
    running.process.end()


def test_scripts_of_chats_share_their_beginning() -> None:
    told = asked(CHATS)
    first, second = told["scripts"]
    assert told["clients"] == 2
    assert [(len(ids), tokens) for ids, tokens in first] == [(10, 5), (3, 5)]
    assert first[0][0][:7] == second[0][0][:7] and first[0][0] != second[0][0]
    single = asked(TASK)["scripts"]
    assert len(single) == 4 and all(len(script) == 1 for script in single)
    assert understood(TASK, {"seconds": 1.0, "cpu_seconds": 1.0, "answers": []}).answers == ()


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    write = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write('x')", "{}"]
    assert made(target, write).read_text() == "x"
    assert made(target, ["false"]) == target  # it is there: nothing is run
    with pytest.raises(Exception, match="exit status 3"):
        made(tmp_path / "other", [sys.executable, "-c", "raise SystemExit(3)"])
    assert not (tmp_path / "other").exists()


def test_tasks_and_peers_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({task.name for task in TASKS}) == len(TASKS)
    monkeypatch.setenv("BENCH_PEERS", "/nowhere")
    monkeypatch.delenv("LLAMA_SERVER", raising=False)
    known = peers()
    assert known[0].name == "quire" and len({peer.name for peer in known}) == len(known)
    for peer in known[1:]:
        assert "benchmarks.peers.install" in (peer.absent() or "")
