"""`--quantization int8` through the whole engine, for every family of decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.settings import Settings
from engine import planner
from engine.build import build, check
from engine.loop import EngineLoop
from kernels import int8
from models import loader, registry
from models.layers import Linear
from tests.engine.drive import answers, engine, request
from tests.engine.poison import poison
from tests.models import checkpoints

KINDS = ("llama-biased", "qwen3", "mistral", "gemma3", "gpt2")
DTYPES = ("float32", "bfloat16")


def served(path: Path, dtype: str, **settings: Any) -> EngineLoop:
    wanted = Settings.of(
        model=str(path), dtype=dtype, cpu_threads=1, device="cpu", quantization="int8", **settings
    )
    return poison(build(wanted))


def prompts() -> list[range]:
    return [range(3 + i, 3 + i + length) for i, length in enumerate((5, 33, 1, 70))]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_rounded_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as when every matrix is rounded first and then served in float32."""
    path = checkpoints.make(kind, tmp_path)
    asked = [request(f"r{i}", prompt) for i, prompt in enumerate(prompts())]
    quantized = answers(served(path, "float32"), asked)
    pack = Linear.pack

    def rounded(linear: Linear, searched: bool = False) -> None:
        linear.weight = int8.dequantize(*int8.quantize(linear.weight))
        pack(linear, searched)

    monkeypatch.setattr(Linear, "pack", rounded)
    assert answers(engine(path), asked) == quantized


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_batch(kind: str, dtype: str, tmp_path: Path) -> None:
    loop = served(checkpoints.make(kind, tmp_path), dtype, enable_prefix_caching=False)
    asked = [request(f"r{i}", prompt) for i, prompt in enumerate(prompts())]
    together = answers(loop, asked)
    for one in asked:
        assert answers(loop, [one])[one.id] == together[one.id]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_that_were_planned(kind: str, tmp_path: Path) -> None:
    path = checkpoints.make(kind, tmp_path)
    config = loader.load_config(path)
    model = registry.build(config, torch.float32, torch.device("cpu"))
    matrices = {tensor.data_ptr() for linear in model.linears() for tensor in _parts(linear)} | {
        model.head.weight.data_ptr()
    }
    kept: list[Tensor] = [
        tensor
        for name, tensor in model.checkpoint_tensors().items()
        if tensor.data_ptr() not in matrices or tensor.ndim == 1
    ]
    if config.tie_word_embeddings:
        kept.append(model.embed.weight)
    model.quantize()
    model.prepare()
    codes = [
        tensor
        for linear in (*model.linears(), model.head)
        for tensor in linear.int8.matrix[:2]  # type: ignore[union-attr]
    ]
    settings = Settings.of(model=str(path), dtype="float32", quantization="int8")
    planned = check(settings).weight_bytes
    assert planned == sum(tensor.nbytes for tensor in (*kept, *codes))
    assert planned < check(Settings.of(model=str(path), dtype="float32")).weight_bytes


def _parts(linear: Linear) -> list[Tensor]:
    return [linear.shard(i)["weight"] for i in range(len(linear.outputs))]


def test_the_plan_counts_them_too() -> None:
    model = planner.find("llama-3.1-8b")
    settings = Settings.of(quantization="int8")
    plan = planner.plan(model, settings, prompt=100, output=10, memory=16 << 30)
    matrices = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 4096 * 128256
    outputs = 32 * (6144 + 4096 + 2 * 14336 + 4096) + 128256
    norms, embeddings = 65 * 4096, 4096 * 128256
    assert plan.weight_bytes == matrices + 4 * outputs + 2 * (norms + embeddings)
    assert plan.weight_dtype == "int8" and plan.dtype == "bfloat16"
    assert plan.memory is not None
    assert plan.memory.left_for_kv == plan.memory.usable - plan.weight_bytes
    assert not plan.warnings or "loaded" not in plan.warnings[-1]
    small = planner.plan(model, settings, prompt=100, output=10, memory=12 << 30)
    assert "loaded as bfloat16, which takes 15 GiB" in small.warnings[-1]


def test_the_engine_tells_of_it(tmp_path: Path) -> None:
    path = checkpoints.make("llama", tmp_path)
    settings = Settings.of(
        model=str(path), dtype="float32", cpu_threads=1, device="cpu", quantization="int8"
    )
    told = check(settings)
    assert told == build(settings).info
    assert told.quantization == "int8"
