"""Tells checkpoints apart without reading their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from models import shards


def fingerprint(folder: Path) -> str:
    """Changes whenever the config or a weight file of a checkpoint does.

    Of a weight file it takes name, size, the header, and what tells a new content of the same
    shape: in the cache of the Hub the name of the blob, which is a hash of the content, elsewhere
    the time of the last change. Weights that were copied anew therefore count as different.

    Raises CheckpointError for a folder without usable weights.
    """
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for file in shards.weight_files(folder):
        real = file.resolve()
        info = real.stat()
        version = real.name if real.parent.name == "blobs" else str(info.st_mtime_ns)
        digest.update(f"{file.name} {info.st_size} {version} ".encode())
        with real.open("rb") as stream:
            size = stream.read(8)
            digest.update(size + stream.read(int.from_bytes(size, "little")))
    return digest.hexdigest()
