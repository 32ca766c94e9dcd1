"""Our decoders give the logits of transformers: whole prompts and ragged batches over pages."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from models import loader
from models.decoder import CausalLM
from tests.models import checkpoints
from tests.models.batches import Cache, run

CPU = torch.device("cpu")
LENGTHS = (90, 61, 33, 7)
# Prefill in chunks, decodes beside chunks, a sequence that joins late, one that waits a while.
STEPS = [
    [(0, 0, 40), (1, 0, 17)],
    [(0, 40, 13), (1, 17, 43), (2, 0, 32)],
    [(2, 32, 1), (0, 53, 35), (3, 0, 5)],
    [(3, 5, 1), (1, 60, 1), (0, 88, 1)],
    [(0, 89, 1), (3, 6, 1)],
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(checkpoints.VOCAB_SIZE, (n,), generator=generator) for n in LENGTHS]


@pytest.fixture(scope="module", params=checkpoints.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, folder: Path) -> CausalLM:
    return load(kind, folder, torch.float32)


@pytest.fixture(scope="module")
def reference(kind: str) -> torch.nn.Module:
    return checkpoints.network(kind)


@pytest.fixture(scope="module")
def expected(reference: torch.nn.Module, prompts: list[Tensor]) -> list[Tensor]:
    return transformers_logits(reference, prompts)


def load(kind: str, folder: Path, dtype: torch.dtype) -> CausalLM:
    path = checkpoints.make(kind, folder)
    return loader.load_model(path, loader.load_config(path), dtype=dtype, device=CPU)


@torch.no_grad()
def transformers_logits(reference: torch.nn.Module, prompts: list[Tensor]) -> list[Tensor]:
    return [reference(prompt[None]).logits[0].float() for prompt in prompts]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-4
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_whole_prompts(model, prompts, expected):
    cache = Cache(model, dispatch.backend(CPU, "torch"), 16, torch.float32)
    steps = [[(i, 0, len(prompt))] for i, prompt in enumerate(prompts)]
    assert_close(run(model, cache, prompts, steps), expected)


@pytest.mark.parametrize(("backend", "block_size"), [("torch", 32), ("numba", 16), ("numba", 32)])
def test_ragged_batches(model, prompts, expected, backend, block_size):
    cache = Cache(model, dispatch.backend(CPU, backend), block_size, torch.float32)
    assert_close(run(model, cache, prompts, STEPS), expected)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_wanted_rows_of_all(model, prompts, backend):
    cache = Cache(model, dispatch.backend(CPU, backend), 16, torch.float32)
    ctx, tokens = (
        cache.context([(0, 0, 40), (1, 0, 17)]),
        torch.cat([prompts[0][:40], prompts[1][:17]]),
    )
    every = model(tokens, ctx)
    assert len(every) == len(tokens)
    for wanted in ([39, 56], [56], []):
        found = model(tokens, replace(ctx, wanted=torch.tensor(wanted, dtype=torch.int64)))
        assert found.equal(every[wanted])


def test_bfloat16(kind, folder, prompts, reference, expected):
    """bfloat16 keeps 8 bits, and these weights are far larger than trained ones: the logits of
    transformers move by 1 to 4 %. Ours must not move further."""
    model = load(kind, folder, torch.bfloat16)
    cache = Cache(model, dispatch.backend(CPU, "numba"), 16, torch.bfloat16)
    exact = torch.cat(expected)
    ours = torch.cat(run(model, cache, prompts, STEPS))
    theirs = torch.cat(transformers_logits(copy.deepcopy(reference).bfloat16(), prompts))
    assert relative_error(ours, exact) < 1.05 * relative_error(theirs, exact)
