"""What `quire kv` draws."""

from __future__ import annotations

import pytest

from server.cli import main
from server.kv_map import draw
from tests.server.front import app_over, live, says
from tests.server.test_debug import VIEW


def test_draws_blocks_and_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    with live(app_over(says("x", view=VIEW))) as url:
        assert main(["kv", "--url", url]) == 0
    drawn = capsys.readouterr().out
    assert "5 blocks of 16 tokens: 2 free, 1 cached, 1 used, 1 shared" in drawn
    assert "       0  usc..\n" in drawn
    assert "r[1]  running, 32 of 40 tokens computed, 3 blocks" in drawn


def test_a_large_pool_shows_the_busiest_of_several_blocks() -> None:
    kv = {
        "blocks": "." * 5000 + "u" + "." * 5000,
        "block_size": 16,
        "num_blocks": 10001,
        "counts": {"free": 10000, "used": 1},
        "sequences": [],
    }
    lines = draw(kv).splitlines()
    assert lines[1] == "one letter is 5 blocks"
    assert sum(line.count("u") for line in lines[2:-1]) == 1


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
