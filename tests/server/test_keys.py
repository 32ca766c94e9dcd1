"""Which keys there are, and that nobody serves the world by oversight."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.settings import Settings, SettingsError
from server.keys import KeyRing, require_keys


def ring(**flat: object) -> KeyRing:
    return KeyRing.read(Settings.of(**flat).http)


def test_keys_of_settings_and_file_are_all_let_in(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nalice: sk-a:1\nalice:sk-a2\n  sk-plain  \n")
    keys = ring(api_key=["sk-1", "sk-2"], api_key_file=str(file))
    names = {key: keys.tenant(key.encode()) for key in ("sk-a:1", "sk-a2", "sk-1", "sk-plain")}
    assert names["sk-a:1"] == names["sk-a2"] == "alice"
    assert names["sk-1"] != names["sk-plain"]
    assert all(name and key not in name for key, name in names.items())
    assert keys.tenant(b"sk-2") == ring(api_key="sk-2").tenant(b"sk-2")
    for unknown in (b"", b"alice", b"alice: sk-a:1", b"sk-1,sk-2", b"# ours"):
        assert keys.tenant(unknown) is None


def test_without_keys_everybody_is_nobody() -> None:
    keys = ring()
    assert not keys
    assert keys.tenant(b"anything") == ""


def test_no_key_is_kept() -> None:
    assert "sk-secret" not in repr(vars(ring(api_key="sk-secret")))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "at least one key, got none"),
        ("# nothing\n", "at least one key, got none"),
        ("good\nname:", "line 2"),
        (":sk", "line 1"),
        ("a b:sk-secret", "line 1"),
        ("two words", "line 1"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_is_one_line_without_its_keys(
    tmp_path: Path, content: str | None, words: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=words) as error:
        ring(api_key_file=str(file))
    assert "\n" not in str(error.value) and "sk-secret" not in str(error.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::", "fe80::1%eth0"])
def test_others_need_a_key_or_the_word_that_they_need_none(host: str) -> None:
    with pytest.raises(SettingsError, match="--no-auth"):
        require_keys(host, KeyRing(), no_auth=False)
    require_keys(host, KeyRing(), no_auth=True)
    require_keys(host, KeyRing([("sk", "")]), no_auth=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1"])
def test_this_machine_alone_needs_none(host: str) -> None:
    require_keys(host, KeyRing(), no_auth=False)
