"""The safetensors files of a checkpoint: which there are, whether they are whole, their tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from models.config import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

CONVERT = (
    "convert them with transformers: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)
_LARGEST_HEADER = 100_000_000  # bytes, the limit of the format


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if the file is unreadable, malformed or a list."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, existing and complete.

    Raises CheckpointError for a folder without safetensors weights, a missing shard, or a file
    that ends early.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(files)} shards named in {index.name}:"
                f" {_some(missing)}; download it again"
            )
    elif single.is_file():
        files = [single]
    else:
        files = _only_file(folder)
    for file in files:
        check_whole(file)
    return files


def _only_file(folder: Path) -> list[Path]:
    """The one safetensors file of a folder that follows no naming convention."""
    names = [f.name for f in folder.iterdir() if f.is_file()]
    if "adapter_config.json" in names:
        raise CheckpointError(f"{folder} holds an adapter (LoRA), not a whole model")
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if len(found) == 1:
        return [folder / found[0]]
    if found:
        raise CheckpointError(
            f"{folder} has {len(found)} safetensors files and no model.safetensors.index.json"
        )
    pickled = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickled:
        raise CheckpointError(
            f"{folder} has PyTorch weights only ({_some(pickled)}), which are not read; {CONVERT}"
        )
    raise CheckpointError(
        f"{folder} has no *.safetensors files; if the model has PyTorch weights only, {CONVERT}"
    )


def check_whole(file: Path) -> None:
    """Raises CheckpointError unless the file is as long as its header says."""
    actual = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{file} is truncated: expected a header, has {actual} bytes")
        header_size = struct.unpack("<Q", start)[0]
        if header_size > _LARGEST_HEADER:
            raise CheckpointError(f"{file} is not a safetensors file")
        if actual < 8 + header_size:
            raise CheckpointError(
                f"{file} is truncated: expected at least {8 + header_size} bytes, has {actual}"
            )
        try:
            header = json.loads(stream.read(header_size))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            expected = 8 + header_size + int(max(ends, default=0))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a safetensors file") from error
    if actual < expected:
        raise CheckpointError(
            f"{file} is truncated: expected {expected} bytes, has {actual}; download it again"
        )


def tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name, memory-mapped: a tensor takes no memory once it is dropped."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def shapes(files: list[Path]) -> dict[str, list[int]]:
    """The shape of every tensor by name, from the headers alone."""
    found: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="np") as opened:
            found |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return found


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
