"""The command: a whole run against a fake server, and mistakes told in one line."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import serve
from benchmarks.load import ClosedLoop, OpenLoop
from benchmarks.serve import main
from tests.benchmarks.fake_server import chunked, completion, plain, serving


@pytest.fixture
def url() -> Iterator[str]:
    """A server in a thread, because the command runs an event loop of its own."""
    found: list[str] = []
    up, over = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    def answer(path: str, body: bytes) -> bytes:
        if path == "/a/v1/models":
            return plain(200, {"data": [{"id": "m"}]})
        assert path in ("/a/v1/completions", "/a/v1/chat/completions")
        return chunked(completion(json.loads(body)["max_tokens"]))

    async def serve_until_over() -> None:
        async with serving(answer) as client:
            found.append(f"http://127.0.0.1:{client._port}/a")
            up.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve_until_over(),))
    thread.start()
    up.wait(10)
    yield found[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(10)


def test_tables(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--clients", "1", "2", "--output", "3:6", "--rounds", "2", "--slo-ttft", "9999"]
    assert main(["--url", url, *flags]) == 0
    told = capsys.readouterr().out
    assert "64 tokens in, 3:6 out" in told and "ignore_eos" in told
    assert told.count("(100%)") == 2 and "| ITL p50 / p90 / p99 ms |" in told


def test_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rate", "2000", "--requests", "5", "--output", "4", "--rounds", "2", "--seed", "3"]
    assert main(["--url", url, *flags, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["rate"], told["requests"], len(told["rounds"])) == (2000, 10, 2)
    assert told["settings"]["model"] == "m" and told["settings"]["seed"] == 3
    assert "ignore_eos" in told["settings"]["fields"]


def test_chats_and_their_turns(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workload", "chat", "--prompt-kind", "text", "--clients", "2", "--turns", "2"]
    assert main(["--url", url, *flags, "--output", "2", "--rounds", "1"]) == 0
    assert "| chats | turn | prompt tokens |" in capsys.readouterr().out


def test_loads() -> None:
    def of(*flags: str) -> list[object]:
        return list(serve.loops(serve._arguments(flags)))

    assert of() == [ClosedLoop(1, 4), ClosedLoop(16, 2), ClosedLoop(64, 2)]
    assert of("--clients", "3", "--requests", "7") == [ClosedLoop(3, 7)]
    assert of("--workload", "chat") == [ClosedLoop(16, 1)]
    assert of("--rate", "2", "0.5", "--max-concurrency", "8") == [
        OpenLoop(2, 100, 8),
        OpenLoop(0.5, 100, 8),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "localhost:1"], "--url must be like http://127.0.0.1:8000, got localhost:1"),
        (["--url", "http://x:99999"], "--url"),
        (["--url", "http://x", "--", "--dtype", "float32"], "not for --url"),
        (["--url", "http://x", "--shape", "gpt2"], "not for --url"),
        (["--shape", "gpt5"], "--shape"),
        (["--rate", "1", "--clients", "1"], "give one of them"),
        (["--rate", "0"], "must be a number above 0, got 0"),
        (["--max-concurrency", "1"], "goes with --rate"),
        (["--api", "chat", "--prompt-kind", "ids"], "--prompt-kind text only"),
        (["--input", "9:1"], "--input: must be like 64 or 32:256, got 9:1"),
        (["--clients", "0"], "--clients: must be a whole number of at least 1, got 0"),
        (["--plot", "/nowhere/a.png"], "--plot: there is no folder /nowhere"),
        (["--extra-body", "[1]"], "--extra-body: must be a JSON object, got [1]"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and message in told and told.count("\n") == 1


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:1"]) == 1
    told = capsys.readouterr().err
    assert "no server at 127.0.0.1:1" in told and told.count("\n") == 1


def test_a_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--url", "http://x", "--plot", "a.png"])
    assert capsys.readouterr().err == (
        "quire bench: --plot needs matplotlib: pip install matplotlib\n"
    )


def test_the_page_tells_of_every_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    flags = {flag for action in serve._parser()._actions for flag in action.option_strings}
    assert [flag for flag in sorted(flags - {"-h", "--help"}) if f"`{flag}" not in page] == []
