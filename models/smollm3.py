"""SmolLM 3: Llama in which every fourth layer leaves queries and keys unrotated."""

from models.config import Fields, ModelConfig, llama_like, rope_config, sliding_windows


def parse(fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    interval = fields.integer("no_rope_layer_interval", 4)
    rotated = fields.optional("no_rope_layers")  # 1 means: with rotary embedding
    if rotated is None:
        rotated = [(layer + 1) % interval != 0 for layer in range(layers)]
    windows = (0,) * layers
    if fields.optional("layer_types") is not None:
        windows = sliding_windows(fields)
    elif fields.flag("use_sliding_window", False) and fields.optional("sliding_window"):
        window = fields.integer("sliding_window")
        windows = tuple(0 if rope else window for rope in rotated[:layers])
    positions = fields.integer("max_position_embeddings", 32768)
    return llama_like(
        fields,
        rope=rope_config(fields, positions, default_theta=2_000_000.0),
        rope_layers=tuple(bool(rope) for rope in rotated[:layers]),
        layer_windows=windows,
        num_kv_heads=fields.integer("num_key_value_heads", 4),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
    )
