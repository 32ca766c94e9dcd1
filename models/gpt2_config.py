"""The `config.json` of GPT-2, which has key names of its own."""

from __future__ import annotations

from models.config import (
    CheckpointError,
    Fields,
    ModelConfig,
    activation,
    architecture,
    checkpoint_dtype,
    eos_token_ids,
)


def parse(fields: Fields) -> ModelConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        fields.refuse(key, False)
    fields.refuse("scale_attn_weights", True)
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    layers = fields.integer("n_layer")
    if hidden % heads:
        raise CheckpointError(f"config.json: n_embd {hidden} is not a multiple of {heads} heads")
    return ModelConfig(
        architecture=architecture(fields),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=fields.integer("n_inner", 4 * hidden),
        activation=activation(fields, "activation_function", "gelu_new"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        max_position_embeddings=fields.integer("n_positions", 1024),
        rope=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=False,
        layer_windows=(0,) * layers,
        rope_layers=(False,) * layers,
        eos_token_ids=eos_token_ids(fields),
        dtype=checkpoint_dtype(fields),
    )
