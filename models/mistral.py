"""Mistral 7B and its kin: Llama with one sliding window for all layers, or none."""

from models.config import CheckpointError, Fields, ModelConfig, llama_like


def parse(fields: Fields) -> ModelConfig:
    if len(set(fields.optional("layer_types") or ())) > 1:
        raise CheckpointError("config.json: mixed layer_types are not supported for Mistral")
    # Null switches the window off; a config without the key means the first Mistral's window.
    off = "sliding_window" in fields.raw and fields.optional("sliding_window") is None
    window = 0 if off else fields.integer("sliding_window", 4096)
    layers = fields.integer("num_hidden_layers")
    return llama_like(
        fields,
        layer_windows=(window,) * layers,
        num_kv_heads=fields.integer("num_key_value_heads", 8),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
    )
