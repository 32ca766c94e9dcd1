"""Published config.json files, shortened to what matters, and values that must be refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from engine import planner
from models import registry
from models.config import CheckpointError, ModelConfig, RopeConfig
from models.registry import parse_config

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_31_8B = LLAMA_2_7B | {
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_01 = {
    "architectures": ["MistralForCausalLM"],
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
MISTRAL_03 = MISTRAL_01 | {"rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_8B = QWEN3_06B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}
SMOLLM2_135M = LLAMA_2_7B | {
    "eos_token_id": 0,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}

GEMMA_2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}


def changed(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return parse_config(raw | changes)


def test_llama_2_7b():
    config = parse_config(LLAMA_2_7B)
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11008,
        activation="silu",
        norm_eps=1e-5,
        max_position_embeddings=4096,
        rope=RopeConfig(10000.0),
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        layer_windows=(0,) * 32,
        rope_layers=(True,) * 32,
        eos_token_ids=(2,),
        dtype="float16",
    )


def test_llama_31_8b():
    config = parse_config(LLAMA_31_8B)
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (8, 128, "bfloat16")
    assert config.rope == RopeConfig(500000.0, "llama3", 8.0, 8192, 1.0, 4.0)
    assert config.eos_token_ids == (128001, 128008, 128009)


def test_new_spellings_read_the_same():
    modern = {k: v for k, v in LLAMA_31_8B.items() if k not in ("rope_scaling", "torch_dtype")}
    del modern["rope_theta"]
    modern |= {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert parse_config(modern) == parse_config(LLAMA_31_8B)
    old = {k: v for k, v in LLAMA3_SCALING.items() if k != "rope_type"} | {"type": "llama3"}
    assert changed(LLAMA_31_8B, rope_scaling=old) == parse_config(LLAMA_31_8B)


def test_mistral_windows():
    assert parse_config(MISTRAL_01).layer_windows == (4096,) * 32
    assert parse_config(MISTRAL_03).layer_windows == (0,) * 32
    unsaid = {k: v for k, v in MISTRAL_01.items() if k != "sliding_window"}
    assert parse_config(unsaid).layer_windows == (4096,) * 32


def test_qwen25():
    config = parse_config(QWEN25_05B)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    assert (config.head_dim, config.layer_windows) == (64, (0,) * 24)
    assert changed(QWEN25_05B, use_sliding_window=True).layer_windows == (0,) * 21 + (32768,) * 3
    typed = changed(
        QWEN25_05B,
        use_sliding_window=True,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 12,
    )
    assert typed.layer_windows == (128, 0) * 12


def test_qwen3():
    small, large = parse_config(QWEN3_06B), parse_config(QWEN3_8B)
    assert (small.head_dim, small.num_heads, small.hidden_size) == (128, 16, 1024)
    assert small.qk_norm and small.tie_word_embeddings and not small.qkv_bias
    assert (large.num_layers, large.tie_word_embeddings) == (36, False)


def test_qwen3_yarn_extends_the_context():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = changed(QWEN3_8B, rope_scaling=scaling)
    assert config.rope == RopeConfig(1e6, "yarn", 4.0, 32768)
    assert config.max_position_embeddings == 131072


def test_smollm2():
    config = parse_config(SMOLLM2_135M)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.tie_word_embeddings, config.eos_token_ids) == (True, (0,))


def test_smollm3_leaves_every_fourth_layer_unrotated():
    raw = LLAMA_2_7B | {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 8}
    assert parse_config(raw).rope_layers == (True, True, True, False) * 2
    listed = parse_config(raw | {"no_rope_layers": [1, 0] * 4})
    assert listed.rope_layers == (True, False) * 4


def test_gemma2():
    config = parse_config(GEMMA_2_2B)
    assert config.layer_windows == (4096, 0) * 13
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert (config.attention_scale, config.activation) == (1 / 16, "gelu_tanh")
    assert config.tie_word_embeddings and config.post_norms and not config.qk_norm
    assert config.rope == RopeConfig(10000.0) and config.sliding_rope is None
    uncapped = changed(GEMMA_2_2B, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (uncapped.attention_softcap, uncapped.logit_softcap) == (0.0, 0.0)
    unsaid = {k: v for k, v in GEMMA_2_2B.items() if "softcapping" not in k}
    assert parse_config(unsaid) == config


def test_gemma3():
    config = parse_config(GEMMA_3_1B)
    assert config.layer_windows == ((512,) * 5 + (0,)) * 4 + (512, 512)
    assert (config.rope, config.sliding_rope) == (RopeConfig(1e6), RopeConfig(1e4))
    assert (config.attention_softcap, config.logit_softcap) == (0.0, 0.0)
    assert config.qk_norm and config.num_kv_heads == 1


def test_gemma3_spellings_read_the_same():
    old = GEMMA_3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    absent = {"rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"}
    modern = {key: value for key, value in old.items() if key not in absent}
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)]
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = parse_config(modern | {"layer_types": kinds, "rope_parameters": ropes})
    assert config == parse_config(old)
    assert (config.rope, config.sliding_rope) == (RopeConfig(1e6, "linear", 8.0), RopeConfig(1e4))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"layer_types": ["chunked_attention"] * 26}, "'chunked_attention' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "not given per layer type"),
    ],
)
def test_gemma3_variants_are_refused(changes, says):
    with pytest.raises(CheckpointError, match=re.escape(says)):
        changed(GEMMA_3_1B, **changes)


def test_gpt2():
    config = parse_config(GPT2)
    assert (config.intermediate_size, config.head_dim, config.activation) == (3072, 64, "gelu_tanh")
    assert config.rope is None and config.tie_word_embeddings
    assert (config.max_position_embeddings, config.dtype) == (1024, "float32")


def test_eos_of_generation_config_wins():
    assert parse_config(LLAMA_2_7B, {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert parse_config(LLAMA_2_7B, {"temperature": 0.6}).eos_token_ids == (2,)
    assert changed(LLAMA_2_7B, eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported"),
        ({"architectures": ["MambaForCausalLM"]}, "supported: GPT2LMHeadModel, Gemma2ForCausalLM"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "reads images too"),
        ({"architectures": None}, "no model class"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "no 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized (gptq)"),
        ({"hidden_act": "relu6"}, "hidden_act='relu6'"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5"),
        ({"hidden_size": 4097}, "4097 is not a multiple of 32"),
        ({"hidden_size": "big"}, "hidden_size must be a positive integer, not 'big'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"vocab_size": None}, "no 'vocab_size'"),
        ({"torch_dtype": "float64"}, "'float64'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be"),
        ({"head_dim": 127}, "head_dim 127 is odd"),
    ],
)
def test_refused_in_one_line(changes, says):
    with pytest.raises(CheckpointError) as caught:
        changed(LLAMA_2_7B, **changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
    ],
)
def test_gpt2_variants_are_refused(changes):
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        changed(GPT2, **changes)


@pytest.mark.parametrize(
    ("raw", "parameters"), [(GEMMA_2_2B, 2_614_341_888), (GEMMA_3_1B, 999_885_952)]
)
def test_published_parameter_counts(raw, parameters):
    """By arithmetic, and of what a decoder of this config allocates."""
    config = parse_config(raw)
    assert planner.parameters(config) == parameters
    made = registry.build(config, torch.bfloat16, torch.device("meta"))
    assert sum(tensor.numel() for tensor in made.checkpoint_tensors().values()) == parameters
