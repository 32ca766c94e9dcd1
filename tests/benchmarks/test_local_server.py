"""The random checkpoint that is served where no URL is given."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import local_server


def test_a_checkpoint_is_made_once_and_never_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        commands.append(command)
        Path(command[-1]).mkdir(exist_ok=True)
        if len(commands) == 1:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(local_server, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        local_server.make_checkpoint("gpt2")
    assert not (tmp_path / "gpt2").exists()
    for _ in range(2):
        assert local_server.make_checkpoint("gpt2") == tmp_path / "gpt2"
        assert (tmp_path / "gpt2").is_dir()
    assert len(commands) == 2 and commands[1][-3:-1] == ["--shape", "gpt2"]
