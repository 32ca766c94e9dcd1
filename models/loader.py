"""From a model's name to a decoder with its weights in place."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models import registry, shards
from models.config import CheckpointError, ModelConfig
from models.decoder import CausalLM

__all__ = [
    "CheckpointError",
    "Progress",
    "load_config",
    "load_model",
    "quiet",
    "random_init",
    "resolve",
    "resolve_dtype",
]

Progress = Callable[[str, float, float, str], None]
"""progress(phase, done, total, note); done and total in bytes, total 0 while unknown."""

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
NONE, INT8 = "none", "int8"
log = logging.getLogger(__name__)


def resolve(model: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The folder of a checkpoint: "embedded", a folder's path, or a Hub id, downloaded if needed.

    Raises CheckpointError: nothing there, not reachable, not allowed.
    """
    folder = _local(model)
    if folder is not None:
        return folder
    from models import hub

    return hub.download(model, revision, progress)


def resolve_config(model: str, revision: str | None = None) -> Path:
    """Like `resolve`, but of a Hub model only `config.json` is sure to be in the folder.

    Raises CheckpointError: as `resolve`.
    """
    folder = _local(model)
    if folder is not None:
        return folder
    from models import hub

    return hub.read_headers(model, revision)[0].parent


def _local(model: str) -> Path | None:
    """The folder of a checkpoint on this machine; None for what may be a Hub id."""
    if model == "embedded":
        from models import embedded

        return Path(embedded.path())
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json")
    if model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1:
        raise CheckpointError(f"no folder at {folder}")
    return None


def load_config(path: Path) -> ModelConfig:
    """Reads `config.json` and, if there is one, `generation_config.json` of a folder.

    Raises CheckpointError, naming the folder.
    """
    if not (path / "config.json").is_file():
        empty = not any(path.iterdir()) if path.is_dir() else True
        raise CheckpointError(
            f"{path} is empty" if empty else f"{path} is not a checkpoint: it has no config.json"
        )
    raw = shards.read_json(path / "config.json")
    generation = path / "generation_config.json"
    try:
        return registry.parse_config(
            raw, shards.read_json(generation) if generation.is_file() else None
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_model(
    path: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = NONE,
    progress: Progress | None = None,
) -> CausalLM:
    """The decoder with the weights of the folder, converted to `dtype`, ready for `forward`.

    With `quantization` "int8" its matrices are then made int8, one after the other.

    Weights are copied from the memory-mapped files into their final place, so that the peak is
    about the weights plus one tensor. Tensors that the decoder has no use for are logged.

    Raises CheckpointError: incomplete files, missing tensors, shapes unlike the config's.
    """
    files = shards.weight_files(path)
    model = registry.build(config, dtype, torch.device(device))
    _fill(model, path, files, progress or quiet)
    if quantization == INT8:
        model.quantize()
    model.prepare()
    return model


def random_init(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    quantization: str = NONE,
) -> CausalLM:
    """A decoder with random weights and no files, ready for `forward`: for benchmarks.

    Matrices are normal with deviation hidden_size ** -0.5, norms one, biases zero.
    """
    device = torch.device(device)
    model = registry.build(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in model.checkpoint_tensors().items():
        if name.endswith(".bias"):
            tensor.zero_()
        elif tensor.ndim == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, config.hidden_size**-0.5, generator=generator)
    if quantization == INT8:
        model.quantize()
    model.prepare()
    return model


def resolve_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype to compute in. "auto": bfloat16 where the device has it in hardware, else float32.

    Raises ValueError for an unknown name, and for float16 on CPUs.
    """
    device = torch.device(device)
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    if device.type == "cpu" and DTYPES[name] == torch.float16:
        raise ValueError("float16 is not supported on CPUs; use bfloat16 or float32")
    return DTYPES[name]


def _has_bfloat16(device: torch.device) -> bool:
    """GPUs from compute capability 8.0 on; CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(torch.cpu, probe, bool)():
            return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


def _fill(model: CausalLM, path: Path, files: list[Path], progress: Progress) -> None:
    """Copies every tensor of the files to its place in the model."""
    wanted = model.checkpoint_tensors()
    total = float(sum(file.stat().st_size for file in files))
    done, extra = 0.0, []
    progress("weights", done, total, path.name)
    for name, tensor in shards.tensors(files):
        # A base model saved without its head leaves out the prefix that its class puts in front.
        target = wanted.pop(name, None)
        if target is None:
            target = wanted.pop(model.prefix + name, None)
        if target is None:
            extra.append(name)
        else:
            _copy(name, tensor, target)
        done += tensor.nbytes
        progress("weights", done, total, name)
    if wanted:
        names = sorted(wanted)
        raise CheckpointError(
            f"{path} lacks {len(names)} tensors of {model.config.architecture}:"
            f" {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        )
    progress("weights", total, total, path.name)
    _report_extra(model, path, extra)


def _copy(name: str, tensor: Tensor, target: Tensor) -> None:
    if tensor.shape != target.shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(tensor.shape)} where config.json"
            f" implies {list(target.shape)}"
        )
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise CheckpointError(f"tensor {name} is {tensor.dtype}: quantized weights are not read")
    target.copy_(tensor)


def _report_extra(model: CausalLM, path: Path, names: list[str]) -> None:
    """Logs what was not used, except what is known to carry nothing."""
    if model.config.tie_word_embeddings:
        names = [name for name in names if name != "lm_head.weight"]
    unused = [name for name in names if not re.search(model.harmless, name)]
    if unused:
        log.warning("%s: %d tensors not used: %s", path, len(unused), ", ".join(unused[:3]))


def quiet(phase: str, done: float, total: float, note: str) -> None:
    """A `Progress` that tells nobody."""
