import pytest

from benchmarks import gpu_engine
from benchmarks.gpu_engine import Workload, crowd_lengths


def test_the_crowd_is_nano_vllm_s() -> None:
    lengths = crowd_lengths()
    assert len(lengths) == 256
    assert sum(out for _, out in lengths) == 133_966
    assert min(min(pair) for pair in lengths) >= 100 and max(max(pair) for pair in lengths) <= 1024


def test_a_step_reads_all_weights_and_a_token_all_before_it() -> None:
    work = Workload("w", "gpt2", [(10, 3), (20, 1)])
    assert work.bytes_read(weights=1000, per_token=1) == 3 * 1000 + (10 + 11 + 12) + 20


def test_it_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["gpu_engine", "--device", "cpu", "--tiny"])
    assert gpu_engine.main() == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "| off |" in line]
    names = {(cells[1].strip(), cells[4].strip()) for cells in rows}
    assert names == {
        (work.name, way) for work in gpu_engine.workloads(True) for way in ("on", "off")
    }
    assert all(float(cells[5].replace(",", "")) > 0 for cells in rows)


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["gpu_engine", "--device", "cpu", "--tiny"])
    monkeypatch.setattr(gpu_engine, "missing", lambda: ["pydantic_settings"])
    assert gpu_engine.main() == 2
    assert "pip install pydantic-settings" in capsys.readouterr().err
