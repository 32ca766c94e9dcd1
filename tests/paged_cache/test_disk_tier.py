import logging
import os
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from paged_cache import disk_tier
from paged_cache.disk_tier import DiskTier, DiskTierError
from paged_cache.pool import Key

IDENTITY = {"model": "m", "layout": "l"}


def key(number: int) -> Key:
    return 0, number.to_bytes(16, "big")


def content(number: int) -> bytes:
    return bytes([number]) * 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def opened(folder: Path, max_bytes: int = 1 << 20, **identity: str) -> DiskTier:
    return DiskTier(folder, max_bytes, IDENTITY | identity)


def filled(folder: Path, numbers: range) -> None:
    tier = opened(folder)
    for number in numbers:
        assert tier.save(key(number), content(number))
    tier.close(10)


def read(tier: DiskTier, number: int) -> bytes | None:
    """The content, or None for a miss."""
    tier.load(key(number))
    for _ in range(500):
        tier.wait(0.1)
        for found, good in tier.poll():
            assert found == key(number)
            return bytes(tier.take(found)) if good else None
    raise AssertionError("the disk never answers")


def files(folder: Path) -> list[Path]:
    return sorted((folder / "blocks").iterdir())


def test_blocks_outlive_the_tier(folder: Path):
    filled(folder, range(3))
    tier = opened(folder)
    assert tier.num_blocks == 3 and tier.holds(key(2)) and not tier.holds(key(3))
    assert tier.num_bytes == sum(file.stat().st_size for file in files(folder))
    assert [read(tier, n) for n in range(3)] == [content(n) for n in range(3)]
    assert tier.num_errors == 0
    tier.close(10)


def test_files_are_safetensors_and_private(folder: Path):
    filled(folder, range(1))
    [file] = files(folder)
    with safe_open(file, framework="np") as opened_file:
        assert opened_file.metadata()["model"] == "m"
        assert opened_file.get_tensor("block").tobytes() == content(0)
    modes = [path.stat().st_mode & 0o777 for path in (file, folder / "key", folder / "blocks")]
    assert modes == [0o600, 0o600, 0o700]


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "a bit":
        data[-1] ^= 1
    elif how == "truncated":
        del data[-10:]
    elif how == "empty":
        data.clear()
    elif how == "no header":
        data[8:20] = b"x" * 12
    elif how == "huge header":
        data[:8] = b"\xff" * 8
    elif how == "longer":
        data += b"12345678"
    file.write_bytes(data)


HOW = ["a bit", "truncated", "empty", "no header", "huge header", "longer"]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_file_is_a_miss_and_a_warning(folder: Path, how: str, caplog):
    filled(folder, range(2))
    damage(files(folder)[0], how)
    tier = opened(folder)
    with caplog.at_level(logging.WARNING):
        assert read(tier, 0) is None
    assert len(caplog.records) == 1 and "is not used" in caplog.text
    assert not tier.holds(key(0)) and tier.num_errors == 1 and len(files(folder)) == 1
    assert read(tier, 1) == content(1)
    assert tier.save(key(0), content(0))
    tier.close(10)
    assert len(files(folder)) == 2


def test_a_file_under_another_name_is_a_miss(folder: Path, caplog):
    filled(folder, range(1))
    [file] = files(folder)
    file.rename(file.with_name(f"0-{key(7)[1].hex()}.safetensors"))
    tier = opened(folder)
    assert read(tier, 7) is None and "its key is" in caplog.text
    tier.close(10)


@pytest.mark.parametrize("name", ["model", "layout"])
def test_a_file_of_another_model_is_a_miss(folder: Path, name: str, caplog):
    filled(folder, range(1))
    tier = opened(folder, **{name: "other"})
    assert read(tier, 0) is None and f"its {name} is" in caplog.text
    tier.close(10)


def test_a_file_with_another_servers_key_is_a_miss(folder: Path, tmp_path: Path, caplog):
    filled(folder, range(1))
    (folder / "key").unlink()
    tier = opened(folder)
    assert read(tier, 0) is None and "its checksum is wrong" in caplog.text
    tier.close(10)


def test_names_are_hashed_with_the_key_of_the_folder_and_the_identity(folder: Path, tmp_path):
    keys = []
    for place, identity in [(folder, "m"), (folder, "m"), (folder, "n"), (tmp_path / "b", "m")]:
        tier = opened(place, model=identity)
        keys.append(tier.hash_key)
        tier.close(10)
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_the_least_recently_used_gives_way_also_after_a_restart(folder: Path):
    filled(folder, range(4))
    size = files(folder)[0].stat().st_size
    for age, file in enumerate(files(folder)):
        os.utime(file, ns=(age, age))
    tier = opened(folder, max_bytes=4 * size)
    assert read(tier, 0) == content(0)
    tier.close(10)
    tier = opened(folder, max_bytes=4 * size)
    tier.save(key(9), content(9))
    tier.close(10)
    assert [n for n in (*range(4), 9) if tier.holds(key(n))] == [0, 2, 3, 9]
    assert len(files(folder)) == 4 and tier.num_bytes <= 4 * size


def test_what_a_crash_left_half_written_is_removed(folder: Path):
    filled(folder, range(1))
    half = folder / "blocks" / "0-12.tmp"
    half.write_bytes(b"x")
    opened(folder).close(10)
    assert not half.exists() and len(files(folder)) == 1


def test_one_server_at_a_time(folder: Path):
    tier = opened(folder)
    with pytest.raises(DiskTierError, match="in use by another server"):
        opened(folder)
    tier.close(10)
    opened(folder).close(10)


def test_a_key_that_others_may_read_is_refused(folder: Path):
    filled(folder, range(1))
    (folder / "key").chmod(0o644)
    for _ in range(2):
        with pytest.raises(DiskTierError, match="mode 0600"):
            opened(folder)
    (folder / "key").chmod(0o600)
    (folder / "key").write_bytes(b"short")
    with pytest.raises(DiskTierError, match="must be 32 bytes"):
        opened(folder)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskTierError, match=r"disk_kv_path .*cannot be used"):
        opened(tmp_path / "file" / "kv")


def test_a_full_disk_is_a_warning(folder: Path, monkeypatch, caplog):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    tier = opened(folder)
    monkeypatch.setattr(disk_tier.os, "fsync", full)
    for number in range(3):
        tier.save(key(number), content(number))
    tier.close(10)
    assert tier.num_errors == 3 and tier.num_blocks == 0 and files(folder) == []
    assert len(caplog.records) == 1


def test_what_waits_to_be_written_is_bounded(folder: Path, monkeypatch):
    monkeypatch.setattr(disk_tier, "QUEUED_BYTES", 250)
    tier = opened(folder)
    started = [tier.save(key(n), content(n)) for n in range(50)]
    assert started[0]
    assert tier.save(key(99), content(99), wait_until=time.monotonic() + 30)
    tier.close(10)
    assert tier.num_blocks == sum(started) + 1


def test_a_block_that_takes_too_long_is_a_miss(folder: Path, monkeypatch):
    filled(folder, range(1))
    tier = opened(folder)
    monkeypatch.setattr(disk_tier, "LOAD_SECONDS", -1.0)
    monkeypatch.setattr(tier, "_read", disk_tier.queue.SimpleQueue())
    tier._asked[key(0)] = time.monotonic()
    assert tier.poll() == [(key(0), False)]
    assert tier.poll() == []
    tier.close(10)
