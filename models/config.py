"""The sizes and switches of one decoder, read from the `config.json` of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")


class CheckpointError(Exception):
    """A checkpoint that cannot be served, said in one line: what, where and, if known, the cure."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base wavelength and how it is stretched beyond the trained context.

    Attributes:
        scaling: one of ROPE_TYPES; the fields after `factor` matter to some of them only
        original_max_positions: trained context in tokens (llama3, yarn)
        attention_factor: multiplies cos and sin (yarn); None derives it from `factor`
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A validated decoder. Sizes are counts of elements, `layer_windows` counts tokens.

    Attributes:
        architecture: the class name in `config.json`, such as LlamaForCausalLM
        activation: silu, gelu, gelu_tanh or relu
        max_position_embeddings: positions a token may have are 0 .. this - 1
        rope: None for learned positions
        layer_windows: per layer; 0 attends to everything, w to the last w tokens
        rope_layers: per layer; False leaves queries and keys unrotated
        eos_token_ids: every token that ends an answer
        dtype: of the checkpoint's tensors: float32, bfloat16 or float16
        attention_scale: of the scores; None is head_dim ** -0.5
        attention_softcap: scores become cap * tanh(score / cap); 0 leaves them
        logit_softcap: the same for the logits
        sliding_rope: of the layers with a window, if it is not that of the others
        post_norms: attention and MLP have a norm behind them too
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_windows: tuple[int, ...]
    rope_layers: tuple[bool, ...]
    eos_token_ids: tuple[int, ...]
    dtype: str
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    sliding_rope: RopeConfig | None = None
    post_norms: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json: {self.num_heads} attention heads cannot share"
                f" {self.num_kv_heads} key/value heads evenly"
            )
        if self.rope is not None and self.head_dim % 2:
            raise CheckpointError(f"config.json: rotary head_dim {self.head_dim} is odd")
        if not len(self.layer_windows) == len(self.rope_layers) == self.num_layers:
            raise CheckpointError(
                f"config.json: per-layer lists do not have {self.num_layers} entries"
            )


class Fields:
    """Typed look-ups in the dict of a `config.json`.

    A key that is null counts as missing. A missing key without default, or a value of the wrong
    type, raises CheckpointError naming the key.
    """

    def __init__(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None):
        self.raw = raw
        self.generation = generation or {}

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive count."""
        return self._get(key, default, lambda v: type(v) is int and v > 0, "a positive integer")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as float."""
        value = self._get(
            key, default, lambda v: type(v) in (int, float) and v > 0, "a positive number"
        )
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._get(key, default, lambda v: type(v) is bool, "true or false")

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, default, lambda v: isinstance(v, str), "a string")

    def optional(self, key: str) -> Any:
        """Whatever the key holds, None if it is missing."""
        return self.raw.get(key)

    def refuse(self, key: str, *unless: object) -> None:
        """Raises if the key holds anything but null or one of the values `unless`."""
        value = self.raw.get(key)
        if value is not None and value not in unless:
            raise CheckpointError(f"config.json: {key}={value!r} is not supported")

    def _get(self, key: str, default: Any, valid: Callable[[Any], bool], kind: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json has no {key!r}")
            return default
        if not valid(value):
            raise CheckpointError(f"config.json: {key} must be {kind}, not {value!r}")
        return value


def architecture(fields: Fields) -> str:
    """The one architecture name of a config."""
    names = fields.optional("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config.json names no model class under 'architectures'")
    return names[0]


def llama_like(fields: Fields, **differences: Any) -> ModelConfig:
    """The config of a family that uses Llama's key names; `differences` override its fields."""
    layers = fields.integer("num_hidden_layers")
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    positions = fields.integer("max_position_embeddings", 2048)
    if fields.optional("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of {heads}")
    bias = fields.flag("attention_bias", False)
    rope = differences.pop("rope", None) or rope_config(fields, positions)
    if rope.scaling == "yarn":
        positions = max(positions, int(rope.original_max_positions * rope.factor))
    values: dict[str, Any] = {
        "architecture": architecture(fields),
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", hidden // heads),
        "intermediate_size": fields.integer("intermediate_size"),
        "activation": activation(fields, "hidden_act"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "max_position_embeddings": positions,
        "rope": rope,
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", False),
        "qk_norm": False,
        "layer_windows": (0,) * layers,
        "rope_layers": (True,) * layers,
        "eos_token_ids": eos_token_ids(fields),
        "dtype": checkpoint_dtype(fields),
    }
    return ModelConfig(**(values | differences))


def activation(fields: Fields, key: str, default: str | None = "silu") -> str:
    """Our name of the activation function that `key` holds."""
    name = fields.text(key, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: {key}={name!r} is not supported (known: {', '.join(ACTIVATIONS)})"
        )
    return ACTIVATIONS[name]


def checkpoint_dtype(fields: Fields) -> str:
    """`dtype`, or `torch_dtype` as older checkpoints spell it; float32 if neither is there."""
    name = fields.text("dtype", fields.text("torch_dtype", "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"config.json: dtype {name!r} is not one of {', '.join(DTYPES)}")
    return name


def eos_token_ids(fields: Fields) -> tuple[int, ...]:
    """End-of-sequence ids: those of generation_config.json if it names any, else config.json's."""
    value = fields.generation.get("eos_token_id")
    if value is None:
        value = fields.optional("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"config.json: eos_token_id must be ids, not {value!r}")
    return tuple(ids)


def sliding_windows(fields: Fields) -> tuple[int, ...]:
    """Per-layer windows as Qwen spells them: a switch, then a list of layer types or a threshold.

    Raises CheckpointError for layer types other than full and sliding attention.
    """
    layers = fields.integer("num_hidden_layers")
    if fields.optional("sliding_window") is None or not fields.flag("use_sliding_window", False):
        return (0,) * layers
    window = fields.integer("sliding_window")
    types = fields.optional("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 28)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return typed_windows(types, window)


def typed_windows(types: Sequence[str], window: int) -> tuple[int, ...]:
    """`window` for the layers of sliding attention, 0 for those of full attention.

    Raises CheckpointError for any other type.
    """
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise CheckpointError(f"config.json: layer type {min(unknown)!r} is not supported")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def rope_config(fields: Fields, max_positions: int, default_theta: float = 10000.0) -> RopeConfig:
    """Reads `rope_parameters`, or `rope_theta` with `rope_scaling` as older checkpoints have it.

    Raises CheckpointError for scalings that change with the length of a sequence (dynamic,
    longrope), and for partly rotated heads.
    """
    raw = fields.optional("rope_parameters") or fields.optional("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in raw.values()):
        raise CheckpointError("config.json: rope parameters per layer type are not supported")
    scaling = Fields(raw)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json: rope scaling {kind!r} is not supported (known: {', '.join(ROPE_TYPES)})"
        )
    for holder in (fields, scaling):
        holder.refuse("partial_rotary_factor", 1, 1.0)
    theta = scaling.number("rope_theta", fields.number("rope_theta", default_theta))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, scaling.number("factor"))
    original = scaling.integer("original_max_position_embeddings", max_positions)
    original = fields.integer("original_max_position_embeddings", original)
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            scaling.number("factor"),
            original,
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
        )
    for key in ("mscale", "mscale_all_dim"):
        scaling.refuse(key)
    given = scaling.optional("attention_factor") is not None
    return RopeConfig(
        theta,
        kind,
        scaling.number("factor", max_positions / original),
        original,
        attention_factor=scaling.number("attention_factor") if given else None,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
    )
