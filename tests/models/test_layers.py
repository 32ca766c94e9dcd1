"""The parts of a decoder against plain torch, and rotary frequencies against transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.config import RopeConfig
from models.layers import CenteredRMSNorm, HeadNorm, Linear, RMSNorm, can_pack
from models.loader import random_init
from models.registry import parse_config
from models.rotary import Rotary, inverse_frequencies, rotate

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def filled_linear(inputs: int, outputs: tuple[int, ...], dtype: torch.dtype, bias: bool) -> Linear:
    torch.manual_seed(inputs)
    linear = Linear(inputs, outputs, bias=bias, dtype=dtype, device=CPU)
    linear.weight.normal_()
    if bias:
        linear.bias.normal_()
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(64, (96, 32, 32)), (33, (7,)), (1, (1,)), (1024, (2048,))]
)
def test_packed_linear(inputs, outputs, bias, dtype):
    linear = filled_linear(inputs, outputs, dtype, bias)
    weight = linear.weight.double()
    offset = linear.bias.double() if bias else None
    packable = can_pack(linear.weight)
    linear.pack()
    assert (linear.weight is None) == packable
    for rows in (0, 1, 3, 5, 70):
        x = torch.randn(rows, 2 * inputs).to(dtype)[:, :inputs]  # strided, as views are
        expected = F.linear(x.double(), weight, offset)
        assert linear(x).dtype == dtype
        error = (linear(x).double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("outputs", [257, 4161])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_any_size_names_only_its_outputs(outputs, dtype):
    row = torch.rand(1, 512, dtype=dtype) + 1
    table = -row.repeat(outputs, 1)
    table[-2] /= 2
    head = Linear(512, (outputs,), dtype=dtype, device=CPU)
    head.weight = table
    before = table.clone()
    head.pack(searched=True)
    assert table.equal(before), "the embedding, where they are tied"
    for rows in (1, 3, 70):
        x = row.repeat(rows, 1)
        assert head.scores(x).shape == (rows, outputs)
        assert head.best(x).tolist() == [outputs - 2] * rows, "all scores are negative"


def test_shards_are_views_of_one_weight():
    linear = filled_linear(8, (6, 2, 2), torch.float32, True)
    linear.shard(1)["weight"].fill_(7.0)
    linear.shard(2)["bias"].fill_(9.0)
    assert linear.weight[6:8].eq(7.0).all() and not linear.weight[8:].eq(7.0).any()
    assert linear.bias[8:].eq(9.0).all()
    assert linear.shard(0)["weight"].shape == (6, 8)


def test_head_norm_uses_one_weight_for_queries_and_one_for_keys():
    norm = HeadNorm(4, 2, 16, 1e-6, dtype=torch.float32, device=CPU)
    norm.weight.normal_()
    norm.expand()
    heads = torch.randn(5, 6, 16)
    query = F.rms_norm(heads[:, :4], (16,), norm.weight[0], 1e-6)
    key = F.rms_norm(heads[:, 4:], (16,), norm.weight[1], 1e-6)
    torch.testing.assert_close(norm(heads), torch.cat((query, key), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [RMSNorm, CenteredRMSNorm])
def test_fused_norm_equals_torch(norm_type, dtype):
    norm = norm_type(96, 1e-6, dtype=dtype, device=CPU)
    norm.weight.normal_()
    norm.expand()
    x = torch.randn(5, 96).to(dtype)
    assert norm.fused is not None
    assert_near(norm(x), norm.apply(x))
    weight = norm.weight.double() + (norm_type is CenteredRMSNorm)
    assert_near(norm(x), F.rms_norm(x.double(), (96,), weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3"])
def test_fused_rotation_equals_torch(family, dtype):
    fields = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 8}
    config = parse_config(fields | {"architectures": [f"{family}ForCausalLM"]})
    model = random_init(config, dtype, CPU)
    attention = model.layers[0].attention
    query_key = torch.randn(5, 8, 32).to(dtype)[:, :6]
    rotation = model.rotary(torch.arange(5) * 7)
    fused = attention.turn(query_key, rotation)
    assert attention.fused is not None
    attention.fused = None
    assert_near(fused, attention.turn(query_key, rotation))


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[actual.dtype]


def test_rotation_preserves_length_and_relative_angle():
    rotary = Rotary(RopeConfig(10000.0), 32, 64, CPU)
    query, key = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(a: int, b: int) -> float:
        turned = [rotate(x, rotary(torch.tensor([p]))) for x, p in ((query, a), (key, b))]
        assert turned[0].norm().item() == pytest.approx(query.norm().item(), rel=1e-5)
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(60, 56), rel=1e-3)
    assert rotate(query, rotary(torch.tensor([0]))).equal(query)


def test_rotation_is_computed_in_float32():
    rotary = Rotary(RopeConfig(10000.0), 64, 4096, CPU)
    heads = torch.randn(3, 2, 64).bfloat16()
    rotation = rotary(torch.tensor([1, 100, 4000]))
    exact = rotate(heads.float(), rotation)
    assert rotate(heads, rotation).equal(exact.bfloat16())


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 64.0,
            "beta_slow": 2.0,
            "attention_factor": 1.2,
            "truncate": False,
        },
    ],
)
def test_frequencies(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {
        "vocab_size": 100,
        "hidden_size": 4096,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "intermediate_size": 128,
        "max_position_embeddings": 131072,
        "rope_parameters": scaling | {"rope_theta": 500000.0},
    }
    theirs = LlamaRotaryEmbedding(LlamaConfig(**fields))
    config = parse_config(fields | {"architectures": ["LlamaForCausalLM"]})
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("bias", [False, True])
def test_padding_adds_nothing(bias: bool) -> None:
    linear = filled_linear(5, (3, 4), torch.float32, bias)
    x = torch.randn(2, 5)
    before = linear(x)
    linear.pad(8, (4, 6))
    after = linear(F.pad(x, (0, 3), value=7.0))
    assert after.shape == (2, 10)
    torch.testing.assert_close(after[:, [0, 1, 2, 4, 5, 6, 7]], before)
    assert after[:, [3, 8, 9]].eq(0).all()
