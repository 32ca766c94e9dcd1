"""Tiny random checkpoints in Hugging Face format, one per decoder kind, made by transformers.

The weights are large for their size (and norms and biases are not trivial), so that logits differ
clearly and a mistake in any part of a decoder shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 320
EOS_TOKEN_ID = 2
MAX_POSITIONS = 512

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1, "head_dim": 64}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": _LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "mistral": ("Mistral", {"sliding_window": 32}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2-sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 64,
            "sliding_window": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 64,
            "sliding_window": 32,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": _LINEAR | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 128,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": MAX_POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": EOS_TOKEN_ID,
        },
    ),
}
KINDS = tuple(_KINDS)


def make(kind: str, path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Writes the checkpoint of `kind` (one of KINDS) to the folder `path`/`kind`, once.

    `overrides` change fields of the transformers config; give such a variant its own `path`.
    Returns the folder, with `config.json`, `generation_config.json` and `model.safetensors`
    (float32) but without a tokenizer.
    """
    folder = Path(path) / kind
    if not (folder / "model.safetensors").exists():
        network(kind, seed=seed, **overrides).save_pretrained(folder)
    return folder


def network(kind: str, *, seed: int = 0, **overrides: Any) -> Any:
    """The transformers model of `kind`, float32, in eval mode, with its random weights."""
    import transformers

    family, fields = _KINDS[kind]
    shape = {} if family == "GPT2" else _SHAPE
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**{**shape, **fields, **overrides})
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + suffix)(config).eval()
    _randomize(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _randomize(model: Any, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        if parameter.ndim == 2:
            parameter.copy_(0.15 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.add_(0.2 * noise)  # a norm: of ones, or of zeros where 1 is added to them
