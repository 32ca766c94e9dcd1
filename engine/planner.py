"""How much memory a model will take, before anything is downloaded, loaded or run.

It reads a `config.json` and the headers of the weights, never the weights, and imports no torch.
The bytes of the KV cache are those of `paged_cache.layout`, which also allocates the pool.

    memory x utilization
    |-- weights --|-- work space (known once a step has run) --|-- KV blocks --|
"""

from __future__ import annotations

import bisect
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from configs.settings import EMBEDDED, Settings, SettingsError, format_bytes, nearest
from models import registry, shards
from models.config import CheckpointError, ModelConfig
from paged_cache.layout import (
    CACHE_DTYPES,
    QUANTIZED,
    KVFormat,
    KVLayout,
    group_layers,
    most_blocks,
)

AUTO: Final = "auto"
NONE: Final = "none"
_ALIASES: Final = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "fp8_e4m3",
}
_WEIGHT_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
# Tensors of a checkpoint that no decoder loads.
_NOT_LOADED: Final = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")


@dataclass(frozen=True, slots=True)
class Model:
    """A model as far as memory is concerned.

    Attributes:
        counted_from: where `parameters` comes from: "headers" of the files, or "config"
    """

    name: str
    config: ModelConfig
    parameters: int
    counted_from: str


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """All layers of one window. `groups` have a block table each, per sequence."""

    window: int
    layers: int
    groups: int
    bytes_per_token: int
    blocks_per_sequence: int


@dataclass(frozen=True, slots=True)
class Fit:
    """What a pool holds.

    Attributes:
        blocks: that fit into the memory left
        pool_blocks: that the server takes: no more than all slots at full length can use
        tokens: in these blocks, seen by every layer
        sequences_in_memory: of the planned length
        sequences: the same, but no more than the server runs at once
        longest_sequence: tokens, at most the model's context
        limited_by: "memory" or "max_num_seqs"
    """

    blocks: int
    pool_blocks: int
    tokens: int
    sequences_in_memory: int
    sequences: int
    longest_sequence: int
    limited_by: str


@dataclass(frozen=True, slots=True)
class HostFit:
    """What the tier in host memory holds: blocks, and tokens in them seen by every layer."""

    blocks: int
    tokens: int


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The KV cache in one dtype; all sizes in bytes. `fit` is None where no memory was named,
    `host` where no host memory was."""

    bytes_per_token: int
    bytes_per_block: int
    blocks_per_sequence: int
    bytes_per_sequence: int
    groups: tuple[GroupPlan, ...]
    fit: Fit | None
    host: HostFit | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: all there is, the share that may be used, and what of it the weights leave."""

    total: int
    utilization: float
    usable: int
    left_for_kv: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer.

    Attributes:
        dtype: that the model computes in
        weight_dtype: of the weights in memory; "int8" where their matrices are
        host_kv_bytes: of the tier in host memory, if there is to be one
        cache_dtype: the one that was asked for
        caches: by cache dtype: that of the weights, the one asked for and the quantized ones, as
            far as they hold heads of this size
    """

    model: Model
    context: int
    prompt: int
    output: int
    block_size: int
    max_num_seqs: int
    dtype: str
    weight_dtype: str
    weight_bytes: int
    memory: Memory | None
    host_kv_bytes: int | None
    cache_dtype: str
    caches: dict[str, CachePlan]
    warnings: tuple[str, ...]


# ---------------------------------------------------------------------- models


def _gpt2(layers: int, hidden: int, heads: int, positions: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "n_positions": positions,
    }


def _llama_like(
    family: str, layers: int, hidden: int, inner: int, heads: tuple[int, int], **more: Any
) -> dict[str, Any]:
    return {
        "architectures": [f"{family}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        **more,
    }


_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 131072}
_MISTRAL = {"vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096}
_QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}

SHAPES: Final[Mapping[str, dict[str, Any]]] = {
    "gpt2": _gpt2(12, 768, 12, 1024),
    "gpt3-175b": _gpt2(96, 12288, 96, 2048),
    "llama-2-7b": _llama_like("Llama", 32, 4096, 11008, (32, 32), **_LLAMA2),
    "llama-3.1-8b": _llama_like("Llama", 32, 4096, 14336, (32, 8), **_LLAMA3),
    "mistral-7b": _llama_like("Mistral", 32, 4096, 14336, (32, 8), **_MISTRAL),
    "qwen3-0.6b": _llama_like("Qwen3", 28, 1024, 3072, (16, 8), **_QWEN3, tie_word_embeddings=True),
    "qwen3-8b": _llama_like("Qwen3", 36, 4096, 12288, (32, 8), **_QWEN3),
}
"""Published sizes of models, in the words of their `config.json`: they need no network."""


def find(name: str, revision: str | None = None) -> Model:
    """A model by the name of a shape, a folder, a Hub id, or "embedded".

    Raises SettingsError saying in one line what is wrong with the name.
    """
    folder = Path(name).expanduser()
    try:
        if name == EMBEDDED:
            from models import embedded

            return _in_folder(name, Path(embedded.path()))
        if folder.is_dir():
            return _in_folder(name, folder)
        if name.lower() in SHAPES:
            name = name.lower()
            return _model(name, SHAPES[name], {})
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise CheckpointError(f"no folder at {folder}")
        if "/" in name:
            return _on_hub(name, revision)
    except CheckpointError as error:
        close = difflib.get_close_matches(name.rpartition("/")[2].lower(), SHAPES, n=1)
        hint = f" (the name {close[0]} needs neither network nor folder)" if close else ""
        raise SettingsError(f"{error}{hint}") from None
    raise SettingsError(
        f"unknown model {name}; the nearest known name is {nearest(name.lower(), SHAPES)}, "
        "and a folder or a Hub id (organization/name) will do"
    )


def _in_folder(name: str, folder: Path) -> Model:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    raw = shards.read_json(folder / "config.json")
    return _model(name, raw, _header_shapes(folder))


def _on_hub(name: str, revision: str | None) -> Model:
    from models import hub

    config, shapes = hub.read_headers(name, revision)
    return _model(name, shards.read_json(config), shapes or _header_shapes(config.parent))


def _header_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of every tensor in the safetensors files of a folder, by name."""
    if not any(folder.glob("*.safetensors")):
        return {}
    return shards.shapes(shards.weight_files(folder))


def _model(name: str, raw: dict[str, Any], shapes: Mapping[str, list[int]]) -> Model:
    config = registry.parse_config(raw)
    if not shapes:
        return Model(name, config, parameters(config), "config")
    loaded = (
        math.prod(shape)
        for tensor, shape in shapes.items()
        if not _NOT_LOADED.search(tensor)
        and not (config.tie_word_embeddings and tensor == "lm_head.weight")
    )
    return Model(name, config, sum(loaded), "headers")


def parameters(config: ModelConfig) -> int:
    """How many numbers the weights are, by arithmetic on the config."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    gpt2 = config.rope is None  # learned positions, norms with a bias
    norm = 2 * hidden if gpt2 else hidden
    layer = (4 if config.post_norms else 2) * norm
    layer += config.qkv_bias * (query + 2 * kv) + config.o_bias * hidden
    layer += config.mlp_bias * (_gates(config) * inner + hidden)
    layer += config.qk_norm * 2 * config.head_dim
    layer += sum(inputs * outputs for inputs, outputs in _matrices(config))
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    positions = config.max_position_embeddings * hidden if gpt2 else 0
    return tables + positions + config.num_layers * layer + norm


def _gates(config: ModelConfig) -> int:
    """Matrices that the first half of an MLP consists of: GPT-2's has no gate."""
    return 1 if config.rope is None else 2


def _matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrices of one layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    up = _gates(config) * inner
    return [(hidden, query + 2 * kv), (query, hidden), (hidden, up), (inner, hidden)]


def weight_bytes(config: ModelConfig, count: int, size: int, quantization: str) -> int:
    """Bytes of `count` weights, of `size` bytes each unless they are quantized.

    int8 has a float32 scale per output beside its codes. The head becomes int8 too; where it is
    tied to the embeddings, these stay, and it is there twice.
    """
    if quantization == NONE:
        return count * size
    head = (config.hidden_size, config.vocab_size)
    matrices = [*_matrices(config) * config.num_layers, head]
    codes = sum(inputs * outputs for inputs, outputs in matrices)
    kept = count - codes + config.tie_word_embeddings * head[0] * head[1]
    return kept * size + codes + 4 * sum(outputs for _, outputs in matrices)


# ---------------------------------------------------------------------- plans


def layout(config: ModelConfig, dtype: str, block_size: int, num_blocks: int = 1) -> KVLayout:
    """The layout that the server would give this model."""
    return KVLayout(
        block_size=block_size,
        num_blocks=num_blocks,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        groups=group_layers(config.layer_windows),
        format=KVFormat(dtype),
    )


def plan(
    model: Model,
    settings: Settings,
    *,
    prompt: int,
    output: int,
    memory: int | None = None,
    cache_dtype: str = AUTO,
) -> Plan:
    """What `settings` make of `model` in `memory` bytes.

    Args:
        prompt, output: tokens of every sequence.
        cache_dtype: one of CACHE_DTYPES, or "auto" for that of the settings.

    Raises:
        SettingsError: an unknown dtype, or memory that does not even hold the weights.
    """
    # "auto" is what the server makes of it on a GPU.
    dtype = "bfloat16" if settings.model.dtype == AUTO else settings.model.dtype
    size = _WEIGHT_BYTES[dtype]
    quantization = settings.model.quantization
    weight_dtype = dtype if quantization == NONE else quantization
    weights = weight_bytes(model.config, model.parameters, size, quantization)
    wanted = settings.cache.kv_cache_dtype if cache_dtype == AUTO else cache_dtype
    chosen = _cache_dtype(wanted, dtype)
    context = _context(model, settings)
    left = None
    if memory is not None:
        left = _left(model, memory, settings.cache.gpu_memory_utilization, weights, weight_dtype)
    caches = {
        name: _cache(
            layout(model.config, name, settings.cache.block_size),
            settings,
            context,
            prompt + output,
            left,
        )
        for name in CACHE_DTYPES
        if name in (dtype, chosen, *QUANTIZED) and KVFormat(name).holds(model.config.head_dim)
    }
    if chosen not in caches:
        raise SettingsError(f"{chosen} pages do not hold heads of {model.config.head_dim}")
    return Plan(
        model=model,
        context=context,
        prompt=prompt,
        output=output,
        block_size=settings.cache.block_size,
        max_num_seqs=settings.scheduling.max_num_seqs,
        dtype=dtype,
        weight_dtype=weight_dtype,
        weight_bytes=weights,
        memory=left,
        host_kv_bytes=settings.cache.host_kv_bytes,
        cache_dtype=chosen,
        caches=caches,
        warnings=(
            *_warnings(context, prompt + output, caches[chosen]),
            *_loading_warnings(model.parameters * size, dtype, left),
        ),
    )


def _cache_dtype(name: str, weights: str) -> str:
    name = weights if name == AUTO else _ALIASES.get(name, name)
    if name not in CACHE_DTYPES:
        raise SettingsError(
            f"unknown KV cache dtype {name}; the nearest is {nearest(name, CACHE_DTYPES)} "
            f"(there are: {AUTO}, {', '.join(CACHE_DTYPES)})"
        )
    return name


def _context(model: Model, settings: Settings) -> int:
    longest, wanted = model.config.max_position_embeddings, settings.model.max_model_len
    if wanted is not None and wanted > longest:
        raise SettingsError(
            f"max_model_len must be at most the {longest} positions of {model.name}, got {wanted}"
        )
    return wanted or longest


def _left(model: Model, total: int, utilization: float, weights: int, dtype: str) -> Memory:
    usable = int(total * utilization)
    if weights >= usable:
        raise SettingsError(
            f"{model.name} does not fit: its weights take {format_bytes(weights)} as {dtype}, and "
            f"{utilization:g} of {format_bytes(total)} is {format_bytes(usable)}, "
            f"{format_bytes(weights - usable)} too little"
        )
    return Memory(total, utilization, usable, usable - weights)


def _cache(
    shape: KVLayout, settings: Settings, context: int, length: int, memory: Memory | None
) -> CachePlan:
    blocks = most_blocks(shape.windows, shape.block_size, length, chunk=1)
    host_bytes = settings.cache.host_kv_bytes
    return CachePlan(
        bytes_per_token=shape.bytes_per_token,
        bytes_per_block=shape.bytes_per_block,
        blocks_per_sequence=blocks,
        bytes_per_sequence=blocks * shape.bytes_per_block,
        groups=tuple(_groups(shape, length)),
        fit=None if memory is None else _fit(shape, settings, context, length, memory.left_for_kv),
        host=None if host_bytes is None else _host_fit(shape, host_bytes),
    )


def _host_fit(shape: KVLayout, num_bytes: int) -> HostFit:
    blocks = shape.blocks_in(num_bytes)
    return HostFit(blocks, shape.tokens_in(blocks))


def _groups(shape: KVLayout, length: int) -> Iterable[GroupPlan]:
    for window in sorted(set(shape.windows)):
        groups = [group for group in shape.groups if group.window == window]
        layers = sum(len(group.layers) for group in groups)
        yield GroupPlan(
            window=window,
            layers=layers,
            groups=len(groups),
            bytes_per_token=layers * shape.bytes_per_page // shape.block_size,
            blocks_per_sequence=most_blocks(
                (window,) * len(groups), shape.block_size, length, chunk=1
            ),
        )


def _fit(shape: KVLayout, settings: Settings, context: int, length: int, num_bytes: int) -> Fit:
    slots = settings.scheduling.max_num_seqs
    chunk = settings.scheduling.max_num_batched_tokens

    def most(tokens: int, step: int) -> int:
        return most_blocks(shape.windows, shape.block_size, tokens, step)

    fits = shape.blocks_in(num_bytes)
    pool = min(fits, most(context, chunk) * slots)
    sequences = shape.sequences_in(fits, length, chunk)
    longest = bisect.bisect_right(range(1, context + 1), pool, key=lambda n: most(n, chunk))
    return Fit(
        blocks=fits,
        pool_blocks=pool,
        tokens=shape.tokens_in(fits),
        sequences_in_memory=sequences,
        sequences=min(sequences, slots),
        longest_sequence=longest,
        limited_by="memory" if sequences <= slots else "max_num_seqs",
    )


def _warnings(context: int, length: int, cache: CachePlan) -> Iterable[str]:
    if length > context:
        yield (
            f"prompt and output are {length:,} tokens together, more than the context of "
            f"{context:,}: the server would refuse them"
        )
    if cache.host is not None and cache.host.blocks < 1:
        yield (
            "host_kv_bytes must hold at least one KV block of "
            f"{format_bytes(cache.bytes_per_block)}: the server would refuse it"
        )
    if cache.fit is not None and cache.fit.longest_sequence < context:
        yield (
            f"the whole context of {context:,} tokens does not fit: the server would offer "
            f"{cache.fit.longest_sequence:,}"
        )


def _loading_warnings(num_bytes: int, dtype: str, memory: Memory | None) -> Iterable[str]:
    if memory is not None and num_bytes > memory.total:
        yield (
            f"the weights are loaded as {dtype}, which takes {format_bytes(num_bytes)}, more than "
            f"the {format_bytes(memory.total)} there are"
        )


# ---------------------------------------------------------------------- curves


def attention_variants(config: ModelConfig) -> dict[str, ModelConfig]:
    """The model with as many KV heads as heads (MHA), some (GQA) and one (MQA).

    A model that is itself one of the three stands for it; else GQA shares a KV head among four
    heads, or the nearest larger number that divides them.
    """
    heads = config.num_heads
    grouped = config.num_kv_heads
    if not 1 < grouped < heads:
        grouped = max(n for n in range(1, max(heads // 4, 1) + 1) if heads % n == 0)
    counts = {"MHA": heads, "GQA": grouped, "MQA": 1}
    return {
        f"{name}, {count} KV head{'s' * (count > 1)}": replace(config, num_kv_heads=count)
        for name, count in counts.items()
        if name != "GQA" or 1 < count < heads
    }


def curve(
    config: ModelConfig, dtype: str, block_size: int, lengths: Iterable[int]
) -> list[tuple[int, int]]:
    """(tokens, bytes) of one sequence at each of `lengths`."""
    shape = layout(config, dtype, block_size)
    return [
        (n, most_blocks(shape.windows, block_size, n, chunk=1) * shape.bytes_per_block)
        for n in lengths
    ]
