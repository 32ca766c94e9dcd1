"""The GPU benchmarks run, tiny, under Triton's interpreter; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tune_decode
from kernels.decode_choices import BATCHES, CONTEXTS, TABLE, Choice, HeadShape, choose, derive

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    line = [sys.executable, "-m", *command]
    done = subprocess.run(line, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_attention(tmp_path: Path) -> None:
    target = tmp_path / "attention.json"
    shown = run("benchmarks.gpu_attention", "--device", "cpu", "--json", str(target))
    found = json.loads(target.read_text())
    assert found["ceiling"] > 0 and len(found["rows"]) == 4
    row = found["rows"][-1]
    assert row["cache_bytes"] == 2 * 2 * 130 * 2 * 32 * 2
    assert row["of_ceiling"] == pytest.approx(
        row["cache_bytes"] / row["ours"]["median"] * 1e6 / found["ceiling"]
    )
    assert "gather + sdpa" in row["peers"], found["absent"]
    assert "flash-attention 3 left out" in shown


@pytest.mark.timeout(300)
def test_the_tuner_adds_to_the_table(tmp_path: Path) -> None:
    target = tmp_path / "table.json"
    target.write_text(TABLE.read_text())
    run("benchmarks.tune_decode", "--device", "cpu", "--out", str(target))
    old, new = (json.loads(path.read_text()) for path in (TABLE, target))
    added = new["choices"].pop("sm_0 4/2x32 64")
    assert len(added) == 1 and Choice(*added[0][2:]).tile in (32, 64)
    assert new["choices"] == old["choices"]


def test_the_rule_writes_the_committed_table(tmp_path: Path) -> None:
    """Until a GPU has tuned it: then this test goes."""
    target = tmp_path / "table.json"
    assert tune_decode.main(["--derive", "90", "--out", str(target)]) == 0
    assert target.read_text() == TABLE.read_text()


def test_entries_cover_what_is_at_most_as_large() -> None:
    shape = HeadShape(32, 8, 128, 256, 90)
    for seqs, longest in ((1, 1), (BATCHES[-1], CONTEXTS[-1]), (1000, 1 << 20)):
        assert choose(shape, seqs, longest) == derive(128, 256)
