"""Settings: one name everywhere, one order of precedence, one line per mistake."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from configs.settings import (
    FIELDS,
    Settings,
    SettingsError,
    format_bytes,
    parse_bytes,
    presets,
)


def mistake(flags: dict[str, object], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as error:
        Settings.read(flags, environ or {})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("port: 1\nblock-size: 32\nmax_num_seqs: 5\nlog_level: debug\n")
    environ = {"QUIRE_PORT": "2", "QUIRE_BLOCK_SIZE": "64", "QUIRE_CONFIG": str(file)}
    settings = Settings.read({"port": "3"}, environ)
    assert settings.http.port == 3
    assert settings.cache.block_size == 64
    assert settings.scheduling.max_num_seqs == 5
    assert settings.scheduling.max_num_batched_tokens == 2048
    assert settings.observability.log_level == "debug"


def test_the_config_flag_wins_over_the_variable(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("port: 1")
    two.write_text("port: 2")
    assert Settings.read({"config": str(one)}, {"QUIRE_CONFIG": str(two)}).http.port == 1


def test_defaults_do_not_look_at_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_PORT", "1")
    monkeypatch.setenv("PORT", "2")
    monkeypatch.setenv("MODEL", "{}")
    assert Settings() == Settings.of() == Settings.read({}, {})
    assert Settings.read({}).http.port == 1


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads(name: str) -> None:
    settings = Settings.read({"config": name}, {})
    assert settings != Settings()


def test_the_presets_are_there() -> None:
    assert {"embedded-cpu", "small-gpu", "h200"} <= presets().keys()


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 << 30), ("512MB", 512_000_000), ("1.5 kib", 1536), ("64", 64), ("2tb", 2 * 10**12)],
)
def test_byte_sizes(text: str, count: int) -> None:
    assert Settings.of(kv_cache_memory_bytes=text).cache.kv_cache_memory_bytes == count
    assert parse_bytes(count) == count


@pytest.mark.parametrize("text", ["4 g", "GiB", "-1", "1e9", "0"])
def test_what_is_no_byte_size(text: str) -> None:
    assert mistake({"kv_cache_memory_bytes": text}).startswith("kv_cache_memory_bytes must be ")


def test_format_bytes() -> None:
    sizes = [0, 1023, 1536, 4 << 20, 1 << 30, 5 << 40]
    assert [format_bytes(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "4 MiB",
        "1 GiB",
        "5 TiB",
    ]


def test_unknown_names_are_told_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("max_num_seq: 5")
    assert "the nearest is max_num_seqs" in mistake({"config": str(file)})
    assert "the nearest is QUIRE_BLOCK_SIZE" in mistake({}, {"QUIRE_BLOKC_SIZE": "8"})
    assert "the nearest is served_model_name" in mistake({"served_model": "x"})


def test_config_is_no_key_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("config: h200")
    assert "unknown key of" in mistake({"config": str(file)})


@pytest.mark.parametrize("text", ["- a", "{", "just words", "\x00"])
def test_a_file_that_is_not_settings(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert str(file) in mistake({"config": str(file)})


def test_an_empty_file_is_fine_and_a_missing_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# nothing yet\n")
    assert Settings.read({"config": str(file)}, {}) == Settings()
    assert "presets embedded-cpu, h200, small-gpu" in mistake({"config": "h100"})


def test_a_mistake_names_field_limit_value_and_place() -> None:
    assert (
        mistake({}, {"QUIRE_BLOCK_SIZE": "20"})
        == "block_size must be one of 8, 16, 32, 64, 128, got 20 (from QUIRE_BLOCK_SIZE)"
    )
    assert mistake({"port": "http"}) == "port must be a valid integer, got http"
    assert mistake({"port": 70000}) == "port must be less than or equal to 65535, got 70000"
    assert "'auto', 'cpu' or 'cuda', got tpu" in mistake({"device": "tpu"})
    assert mistake({"max_num_batched_tokens": 4}) == (
        "max_num_batched_tokens must be at least max_num_seqs (128), got 4"
    )
    assert mistake({"port": -1, "block_size": 7}).count(";") == 1


def test_weights_of_tenants() -> None:
    assert Settings.of(tenant_weights="ann=2, bob=.5").scheduling.weights == {"ann": 2, "bob": 0.5}
    for wrong in ("ann", "ann=", "ann=0", "ann=-1", "=2"):
        with pytest.raises(SettingsError, match="tenant_weights must be names with a number"):
            Settings.of(tenant_weights=wrong)


def test_a_stretch_makes_steps_longer() -> None:
    assert Settings.of(prefill_stretch="1.5").scheduling.prefill_stretch == 1.5
    for wrong in (1, 0.5, -2, "nan", "inf"):
        with pytest.raises(SettingsError, match="prefill_stretch must be above 1, or 0"):
            Settings.of(prefill_stretch=wrong)


def test_a_key_is_never_shown() -> None:
    assert "4711" not in mistake({"api_key": 4711})
    settings = Settings.of(api_key="4711")
    assert "4711" not in repr(settings)
    assert [key.get_secret_value() for key in settings.http.api_key] == ["4711"]
    several = Settings.read({}, {"QUIRE_API_KEY": "a, b"}).http.api_key
    assert [key.get_secret_value() for key in several] == ["a", "b"]


def test_names_come_from_the_model_unless_given(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert Settings().model.names == ("quire-embedded",)
    assert Settings.of(model=str(tmp_path / "tiny")).model.names == ("tiny",)
    assert Settings.of(model="org/tiny").model.names == ("org/tiny",)
    assert Settings.read({}, {"QUIRE_SERVED_MODEL_NAME": "a, b"}).model.names == ("a", "b")
    assert Settings.of(served_model_name=["a", "b,c"]).model.names == ("a", "b", "c")


def test_an_empty_variable_is_not_set_and_service_links_are_not_ours() -> None:
    environ = {
        "QUIRE_API_KEY": "",
        "QUIRE_PORT": "tcp://10.0.0.1:8000",
        "QUIRE_SERVICE_HOST": "10.0.0.1",
        "QUIRE_SERVICE_PORT_HTTP": "8000",
        "QUIRE_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert Settings.read({}, environ) == Settings()


def test_the_tree_is_frozen_and_travels_between_processes() -> None:
    settings = Settings.of(block_size=8, api_key="k")
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(ValueError, match="frozen"):
        settings.cache.block_size = 16  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        settings.cache = Settings().cache  # type: ignore[misc]


def test_there_are_few_and_all_are_described() -> None:
    assert len(FIELDS) < 60
    assert all(setting.description for setting in FIELDS.values())


def test_importing_settings_is_light() -> None:
    script = "import sys, configs.settings; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"torch", "fastapi", "numpy", "yaml"} & set(done.stdout.split())
