"""`quire run-batch`: every line ends in one of the two files, once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import batch, cli
from tests.server.front import app_over, live, says


def line(name: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"prompt": "hi", **body}}


def written(path: Path, lines: list[Any]) -> Path:
    text = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    path.write_text("".join(f"{one}\n" for one in text))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def test_answers_and_failures(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    lines = [
        line("a"),
        {**line("b", "/v1/chat/completions"), "body": chat},
        line("bad", temperature=9),
        "{",
        line("a"),
        line("c", "/v1/embeddings"),
        line("streamed", stream=True),
        "",
        {**line("d"), "method": "GET"},
        {**line("e"), "body": None},
        [1],
        {**line("f"), "custom_id": None},
    ]
    source, out = written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with live(app_over(says("hello"))) as url:
        command = ["run-batch", str(source), str(out), "--url", url, "--concurrency", "3"]
        assert cli.main(command) == cli.FAILED
    answers = {one["custom_id"]: one for one in read(out)}
    assert set(answers) == {"a", "b"}
    assert len(read(out)) == 2
    assert answers["a"]["error"] is None
    response = answers["a"]["response"]
    assert response["status_code"] == 200
    assert response["request_id"].startswith("req-")
    assert response["body"]["choices"][0]["text"] == "hello"
    assert answers["b"]["response"]["body"]["choices"][0]["message"]["content"] == "hello"
    failures = read(tmp_path / "out.errors.jsonl")
    refused = next(one for one in failures if one["custom_id"] == "bad")
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"]["error"]["param"] == "temperature"
    codes = [(one["custom_id"], one["error"]["code"]) for one in failures if one["error"]]
    assert sorted(codes, key=str) == sorted(
        [
            (None, "invalid_json_line"),
            (None, "invalid_json_line"),
            (None, "missing_required_parameter"),
            ("a", "duplicate_custom_id"),
            ("c", "invalid_url"),
            ("d", "invalid_method"),
            ("e", "missing_required_parameter"),
            ("streamed", "invalid_request"),
        ],
        key=str,
    )
    assert all(one["error"]["message"].startswith("line ") for one in failures if one["error"])


def test_a_stopped_batch_goes_on(tmp_path: Path) -> None:
    """What is answered is kept, the line that was cut off and the failures are asked for again."""
    source = written(tmp_path / "in.jsonl", [line(str(i)) for i in range(4)])
    out = tmp_path / "out.jsonl"
    kept = json.dumps({"custom_id": "2", "response": "kept"})
    out.write_text(kept + "\n" + '{"custom_id": "3", "respo')
    engine = says("hello")
    with live(app_over(engine)) as url:
        assert cli.main(["run-batch", str(source), str(out), "--url", url]) == cli.OK
        assert len(engine.submitted) == 3
        assert cli.main(["run-batch", str(source), str(out), "--url", url]) == cli.OK
        assert len(engine.submitted) == 3
    assert sorted(one["custom_id"] for one in read(out)) == ["0", "1", "2", "3"]
    assert read(out)[0] == json.loads(kept)
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_concurrency_is_bounded_and_a_full_server_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = most = calls = 0

    async def serve(request: httpx.Request) -> httpx.Response:
        nonlocal running, most, calls
        running, calls = running + 1, calls + 1
        call = calls
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        if call == 1:
            raise httpx.ConnectError("refused")
        if call == 2:
            return httpx.Response(503, headers={"retry-after": "1"})
        return httpx.Response(200, text="no JSON" if call == 3 else "{}")

    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(batch.asyncio, "sleep", note)
    lines = [json.dumps(line(str(i))).encode() for i in range(50)]
    ends: list[None] = []

    async def run() -> None:
        http = httpx.AsyncClient(transport=httpx.MockTransport(serve), base_url="http://x")
        with batch.Answers(tmp_path / "out", tmp_path / "errors") as answers:
            await batch.run(http, lines, answers, concurrency=3, progress=lambda: ends.append(None))

    asyncio.run(run())
    assert most == 3
    assert sorted(waits) == [0.5, 1]
    assert len(ends) == len(read(tmp_path / "out")) == 50


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "ATTEMPTS", 1)
    source, out = written(tmp_path / "in.jsonl", [line("a")]), tmp_path / "out.jsonl"
    command = ["run-batch", str(source), str(out), "--url", "http://127.0.0.1:9"]
    assert cli.main(command) == cli.FAILED
    [failure] = read(tmp_path / "out.errors.jsonl")
    assert (failure["response"], failure["error"]["code"]) == (None, "connection_error")


def test_a_model_of_its_own(tmp_path: Path) -> None:
    """The embedded one, without a port."""
    source = written(tmp_path / "in.jsonl", [line(str(i), max_tokens=2) for i in range(3)])
    out = tmp_path / "out.jsonl"
    settings = ["--cpu-threads", "1", "--kv-cache-memory-bytes", "16MiB"]
    command = [sys.executable, "-m", "server", "run-batch", str(source), str(out), *settings]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == cli.OK, ended.stderr
    assert "3/3" in ended.stderr
    answers = read(out)
    assert sorted(one["custom_id"] for one in answers) == ["0", "1", "2"]
    assert {one["response"]["body"]["model"] for one in answers} == {"quire-embedded"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing", "out"], "missing cannot be read"),
        (["in", "in"], "three files"),
        (["in", "out", "--errors", "in"], "three files"),
        (["in", "other"], "other is no output of a batch: see line 1"),
        (["in", "no/such/folder"], "cannot be used"),
        (["in", "out", "--concurrency", "0"], "--concurrency must be at least 1, got 0"),
        (["in", "out", "--url", "nowhere"], "--url must be like"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "in", [line("a")])
    written(tmp_path / "other", ["text"])
    command = ["run-batch", "--url", "http://127.0.0.1:9", *arguments]
    assert cli.main(command) == cli.MISUSED
    assert words in capsys.readouterr().err
