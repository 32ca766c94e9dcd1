"""Decoders over fused operations against the same decoders over one operation after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import dispatch, reference
from kernels.dispatch import LayerOps
from models import registry
from models.decoder import Decoder
from tests.models import batches

CPU = torch.device("cpu")
PLAIN = dispatch.backend(CPU, "torch")
OPS = LayerOps(reference.add_rms_norm, reference.gated, reference.turn_and_store)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, object]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
}
STEPS = [[(0, 0, 7), (1, 0, 4)], [(0, 7, 1), (1, 4, 5)], [(0, 8, 1), (1, 9, 1)]]


def decoder(kind: str, **fields: object) -> Decoder:
    names = {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower()}
    config = registry.parse_config({**SIZES, **names, **fields})
    made = registry.build(config, torch.float32, CPU)
    assert isinstance(made, Decoder)
    generator = torch.Generator().manual_seed(1)
    for tensor in made.checkpoint_tensors().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    made.prepare()
    return made


def logits(model: Decoder, ops: LayerOps | None) -> list[Tensor]:
    cache = batches.Cache(model, replace(PLAIN, layers=ops), 4, torch.float32)
    return batches.run(model, cache, [torch.arange(9), torch.arange(10) + 20], STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_operations_change_nothing(kind: str) -> None:
    model, calls = decoder(kind, **KINDS[kind]), []

    def turn_and_store(*arguments: object) -> Tensor:
        calls.append(arguments)
        return reference.turn_and_store(*arguments)  # type: ignore[arg-type]

    found = logits(model, replace(OPS, turn_and_store=turn_and_store))
    assert len(calls) == len(STEPS) * model.num_layers
    for ours, plain in zip(found, logits(model, None), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_wanted_rows_of_all() -> None:
    model = decoder("Llama")
    cache = batches.Cache(model, replace(PLAIN, layers=OPS), 4, torch.float32)
    ctx, tokens = cache.context([(0, 0, 7), (1, 0, 4)]), torch.arange(11)
    every = model(tokens, ctx)
    assert model(tokens, replace(ctx, wanted=torch.tensor([6, 10]))).equal(every[[6, 10]])


def test_decoders_with_other_layers_are_left_alone() -> None:
    gemma = decoder("Gemma2", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=32)
    assert not gemma.fuses and decoder("Llama").fuses
    assert not decoder("Llama", hidden_act="relu").fuses
