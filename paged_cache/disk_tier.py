"""The tier on disk: KV blocks as safetensors files that outlive the server.

    FOLDER/lock                               held while a server uses the folder
    FOLDER/key                                secret that the names are hashed with, mode 0600
    FOLDER/blocks/0-3f9c....safetensors       KV group and chained hash of what the block holds

Names are found at start, contents are read and checked when they are asked for. A file that is
damaged, or of another model or layout, is removed and counts as not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import queue
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paged_cache.pool import Key
from paged_cache.prefix import DIGEST_BYTES, KEY_BYTES

logger = logging.getLogger("quire.disk")

FORMAT = "quire-kv 1"
QUEUED_BYTES = 256 << 20
"""Blocks that wait to be written take at most so much memory; beyond it they are not kept."""

LOAD_SECONDS = 10.0
"""A block that did not come in this time is computed instead."""

_NAME = re.compile(rf"(\d+)-([0-9a-f]{{{2 * DIGEST_BYTES}}})\.safetensors")


class DiskTierError(ValueError):
    """The folder cannot be used. The message is one line for the operator."""


class DamagedBlock(ValueError):
    """A file does not hold what its name says."""


class DiskTier:
    """Blocks by key, least recently used first out.

    One thread writes and one reads; every method returns at once unless it says otherwise, and is
    for the thread of the engine.

    Args:
        folder: made if it is not there.
        max_bytes: of all files.
        identity: what a block must have been made by to be used: written into every file.

    Raises:
        DiskTierError: the folder cannot be written, is in use, or its key is readable by others.

    Attributes:
        hash_key: secret for `PrefixHasher`, different for every identity.
        num_bytes: of all files.
        num_errors: files that could not be written, or read and used.
    """

    def __init__(self, folder: Path, max_bytes: int, identity: Mapping[str, str]) -> None:
        self._blocks = folder / "blocks"
        self._max_bytes = max_bytes
        self._identity = dict(identity)
        try:
            self._blocks.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = _lock(folder / "lock")
            try:
                self._secret = _secret(folder / "key")
                self._index = self._scan()
            except BaseException:
                os.close(self._lock_file)
                raise
        except OSError as error:
            raise DiskTierError(
                f"disk_kv_path {folder} cannot be used: {error.strerror or error}"
            ) from None
        text = json.dumps(self._identity, sort_keys=True).encode()
        self.hash_key = hashlib.blake2b(text, key=self._secret, digest_size=KEY_BYTES).digest()
        self.num_bytes = sum(self._index.values())
        self.num_errors = 0
        self._mutex = threading.Lock()  # of the index and the counters
        self._asked: dict[Key, float] = {}  # when
        self._loaded: dict[Key, memoryview] = {}
        self._to_read: queue.SimpleQueue[Key | None] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[tuple[Key, memoryview | None]] = queue.SimpleQueue()
        self._finished: list[tuple[Key, memoryview | None]] = []
        self._to_write: queue.Queue[tuple[Key, bytes] | None] = queue.Queue()
        self._queued_bytes = 0
        self._reader = threading.Thread(target=self._read_all, name="disk-reader", daemon=True)
        self._writer = threading.Thread(target=self._write_all, name="disk-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    @property
    def num_blocks(self) -> int:
        return len(self._index)

    def holds(self, key: Key) -> bool:
        """Whether there is a file for this content."""
        return key in self._index

    # ------------------------------------------------------------------ reading

    def load(self, key: Key) -> None:
        """Begins to read a block; `poll` tells when that has ended."""
        self._asked[key] = time.monotonic()
        self._to_read.put(key)

    def poll(self) -> list[tuple[Key, bool]]:
        """The blocks whose reading has ended since the last call, and whether they can be had with
        `take`; among the others are those that took too long."""
        while not self._read.empty():
            self._finished.append(self._read.get())
        ended = []
        for key, data in self._finished:
            if self._asked.pop(key, None) is not None:
                if data is not None:
                    self._loaded[key] = data
                ended.append((key, data is not None))
        self._finished = []
        latest = time.monotonic() - LOAD_SECONDS
        for key in [key for key, asked in self._asked.items() if asked < latest]:
            del self._asked[key]
            ended.append((key, False))
        return ended

    def wait(self, seconds: float) -> None:
        """Waits until a block has been read, if one is being read."""
        if self._asked:
            with contextlib.suppress(queue.Empty):
                self._finished.append(self._read.get(timeout=seconds))

    def take(self, key: Key) -> memoryview:
        """The content of a block that was read, once."""
        return self._loaded.pop(key)

    def discard(self, key: Key) -> None:
        """Nobody wants a block any more that was read."""
        self._loaded.pop(key, None)

    def _read_all(self) -> None:
        while (key := self._to_read.get()) is not None:
            self._read.put((key, self._content(key)))

    def _content(self, key: Key) -> memoryview | None:
        path = self._path(key)
        try:
            data = self._checked(key, path.read_bytes())
        except FileNotFoundError:
            self._forget(key)
            return None
        except (DamagedBlock, OSError) as error:
            logger.warning("KV block %s is not used: %s", path, error)
            self._forget(key)
            self.num_errors += 1
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with self._mutex:
            if key in self._index:
                self._index.move_to_end(key)
        with contextlib.suppress(OSError):
            os.utime(path)  # so that the order of use outlives the server
        return data

    def _forget(self, key: Key) -> None:
        with self._mutex:
            self.num_bytes -= self._index.pop(key, 0)

    # ------------------------------------------------------------------ writing

    def save(self, key: Key, data: bytes, wait_until: float = 0.0) -> bool:
        """Keeps a block, in the background. Where too many wait to be written already, it is left
        out, or, before `wait_until` (monotonic seconds), waits for room.

        Returns:
            whether it will be written.
        """
        while self._queued_bytes + len(data) > QUEUED_BYTES and self._queued_bytes:
            if time.monotonic() >= wait_until:
                return False
            time.sleep(0.005)
        with self._mutex:
            self._queued_bytes += len(data)
        self._to_write.put((key, data))
        return True

    def _write_all(self) -> None:
        failing = False  # only the first of many failures in a row is worth a line
        while (item := self._to_write.get()) is not None:
            key, data = item
            try:
                if not self.holds(key):
                    self._write(key, data)
                failing = False
            except OSError as error:
                self.num_errors += 1
                if not failing:
                    logger.warning("KV block %s is not written: %s", self._path(key), error)
                failing = True
            with self._mutex:
                self._queued_bytes -= len(data)

    def _write(self, key: Key, data: bytes) -> None:
        header = _header(self._metadata(key) | {"checksum": self._checksum(key, data)}, len(data))
        size = len(header) + len(data)
        self._make_room(size)
        path = self._path(key)
        unfinished = path.with_suffix(".tmp")
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(header)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            unfinished.unlink()
            raise
        unfinished.replace(path)
        with self._mutex:
            self._index[key] = size
            self.num_bytes += size

    def _make_room(self, size: int) -> None:
        while True:
            with self._mutex:
                if not self._index or self.num_bytes + size <= self._max_bytes:
                    return
                key, freed = self._index.popitem(last=False)
                self.num_bytes -= freed
            self._path(key).unlink(missing_ok=True)

    # ------------------------------------------------------------------ files

    def _path(self, key: Key) -> Path:
        return self._blocks / f"{key[0]}-{key[1].hex()}.safetensors"

    def _scan(self) -> OrderedDict[Key, int]:
        """Sizes by key, least recently used first; what a crash left half written is removed."""
        found: list[tuple[int, Key, int]] = []
        with os.scandir(self._blocks) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match is not None:
                    info = entry.stat()
                    key = (int(match[1]), bytes.fromhex(match[2]))
                    found.append((info.st_mtime_ns, key, info.st_size))
                elif entry.name.endswith(".tmp"):
                    os.unlink(entry)
        return OrderedDict((key, size) for _, key, size in sorted(found))

    def _metadata(self, key: Key) -> dict[str, str]:
        return {"format": FORMAT, "key": f"{key[0]}-{key[1].hex()}", **self._identity}

    def _checksum(self, key: Key, data: bytes | memoryview) -> str:
        digest = hashlib.blake2b(key=self._secret, digest_size=16)
        digest.update(json.dumps(self._metadata(key), sort_keys=True).encode())
        digest.update(data)
        return digest.hexdigest()

    def _checked(self, key: Key, file: bytes) -> memoryview:
        """The block in the bytes of a file. Raises DamagedBlock unless all of it is right."""
        metadata, data = _parse(file)
        for name, wanted in self._metadata(key).items():
            if metadata.get(name) != wanted:
                raise DamagedBlock(f"its {name} is {metadata.get(name)!r}, not {wanted!r}")
        if metadata.get("checksum") != self._checksum(key, data):
            raise DamagedBlock("its checksum is wrong")
        return data

    def close(self, seconds: float) -> None:
        """Waits until all is written, at most so long, and gives the folder back."""
        self._to_read.put(None)
        self._to_write.put(None)
        self._writer.join(seconds)
        if self._writer.is_alive():
            logger.warning("not all KV blocks were written in %g s", seconds)
        os.close(self._lock_file)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DiskTierError(f"disk_kv_path {path.parent} is in use by another server") from None
    return descriptor


def _secret(path: Path) -> bytes:
    """The key in `path`, made at the first use. The caller holds the lock."""
    if not path.exists():
        unfinished = path.with_suffix(".tmp")
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise DiskTierError(f"{path} must be readable by its owner only (mode 0600), is {mode:04o}")
    secret = path.read_bytes()
    if len(secret) != KEY_BYTES:
        raise DiskTierError(f"{path} must be {KEY_BYTES} bytes, has {len(secret)}: remove it")
    return secret


def _header(metadata: dict[str, str], num_bytes: int) -> bytes:
    """The beginning of a safetensors file of one tensor."""
    tensor = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    text = json.dumps({"__metadata__": metadata, "block": tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(file: bytes) -> tuple[dict[str, Any], memoryview]:
    """Metadata and content of such a file."""
    start = 8 + int.from_bytes(file[:8], "little")
    try:
        header = json.loads(file[8:start])
        metadata, (begin, end) = header["__metadata__"], header["block"]["data_offsets"]
    except (ValueError, KeyError, TypeError):
        raise DamagedBlock("it has no readable header") from None
    if not isinstance(metadata, dict) or begin != 0 or start + end != len(file):
        raise DamagedBlock(f"it is cut off or too long, at {len(file)} bytes")
    return metadata, memoryview(file)[start:]
