"""The decoder of the Llama family, declared by its `ModelConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.compiled_step import can_compile, compile_step
from models.config import ModelConfig
from models.context import ForwardContext
from models.fused_decoder import can_fuse, fused_forward
from models.layers import (
    ACTIVATIONS,
    PANEL,
    Embedding,
    HeadNorm,
    Linear,
    RMSNorm,
    can_pack,
    fused_layers,
)
from models.rotary import Rotary, Rotation, rotate

if TYPE_CHECKING:
    from kernels.cpu_step import Step
    from kernels.pages import Pages


class CausalLM:
    """What the engine may ask of any decoder.

    A family gives `forward`, `checkpoint_tensors` and `linears`, and extends `prepare`.

    No weight asks for gradients, and steps run in torch's inference mode (`engine.runner`): here
    nothing enters it a second time.

    `embed` holds the token table; `head` projects to the vocabulary and, with tied embeddings,
    uses the same storage (on CPUs `prepare` adds a packed copy of it).

    Attributes:
        prefix: of the names in the checkpoint; some checkpoints leave it out
        harmless: regular expression of checkpoint tensors that a decoder does not need
    """

    prefix = ""
    harmless = r"rotary_emb\.inv_freq$"

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, **factory)
        tied = config.tie_word_embeddings
        head_device = torch.device("meta") if tied else device
        self.head = Linear(
            config.hidden_size, (config.vocab_size,), dtype=dtype, device=head_device
        )
        if tied:
            self.head.weight = self.embed.weight

    @property
    def kv_heads(self) -> int:
        return self.config.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.config.head_dim

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Per layer: how many tokens it attends to, 0 for all."""
        return self.config.layer_windows

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by its name there: views of the fused weights, so that
        copying into them fills the model. Only before `prepare`."""
        raise NotImplementedError

    def linears(self) -> tuple[Linear, ...]:
        """Every matrix of the layers."""
        raise NotImplementedError

    def quantize(self) -> None:
        """Makes `prepare` keep all matrices, the head too, as int8."""
        for linear in (*self.linears(), self.head):
            linear.quantize()

    def prepare(self) -> None:
        """Derives what forward needs from the loaded weights. Call it once, after loading."""
        self.head.pack(searched=True)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """int64 [tokens] -> [wanted rows, hidden_size], the final norm applied"""
        raise NotImplementedError

    def __call__(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        return self.forward(token_ids, ctx)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: rows of `forward` -> float32 [rows, vocab_size]"""
        return self.head.scores(hidden)

    def likeliest(self, hidden: Tensor) -> Tensor:
        """int64 [rows], the next token of the largest score, the first of equal ones."""
        return self.head.best(hidden)


class Decoder(CausalLM):
    """Llama and the families that differ from it by switches of the config.

    Attributes:
        compiled: whether all layers run in one compiled call, where that knows the cache's format
        fuses: whether fused operations of a backend may take the place of the layers' own
    """

    prefix = "model."

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        layer_type: type[DecoderLayer] | None = None,
    ):
        super().__init__(config, dtype, device)
        layer_type = layer_type or DecoderLayer
        self.rotary = Rotary(config.rope, config.head_dim, config.max_position_embeddings, device)
        self.layers = [
            layer_type(config, layer, dtype=dtype, device=device)
            for layer in range(config.num_layers)
        ]
        self.norm = layer_type.norm_type(
            config.hidden_size, config.norm_eps, dtype=dtype, device=device
        )
        self.compiled = False
        self.fuses = False
        self._step: Step | None = None
        self._stepped: tuple[Pages, ...] | None = None

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """int64 [tokens] -> [wanted rows, hidden_size], the final norm applied"""
        if self.compiled and (step := self._step_over(ctx)):
            tables, slots = ctx.groups[0].block_tables, ctx.groups[0].slot_mapping.int()
            lens, starts = ctx.context_lens, ctx.starts()
            return step(token_ids, ctx.positions, lens, tables, slots, starts, ctx.wanted)
        x = self.embed(token_ids)
        if ctx.backend.layers is not None and self.fuses:
            return ctx.pick(fused_forward(self, x, ctx.backend.layers, ctx))
        rotation = self.rotary(ctx.positions)
        for layer in self.layers:
            x = layer(x, rotation, ctx)
        return ctx.pick(self.norm(x))

    def _step_over(self, ctx: ForwardContext) -> Step | None:
        """The compiled step, made when a cache is first seen."""
        if self._stepped is not ctx.pages:
            self._step, self._stepped = compile_step(self, ctx), ctx.pages
        return self._step

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = {
            "model.embed_tokens.weight": self.embed.weight,
            "model.norm.weight": self.norm.weight,
        }
        if not self.config.tie_word_embeddings:
            tensors["lm_head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.checkpoint_tensors().items():
                tensors[f"model.layers.{index}.{name}"] = tensor
        return tensors

    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for layer in self.layers for linear in layer.linears)

    def prepare(self) -> None:
        super().prepare()
        self.norm.expand()
        for layer in self.layers:
            layer.prepare()
        self.compiled = can_compile(self)
        self.fuses = can_fuse(self)


class DecoderLayer:
    """Attention, then the gated MLP, each behind its norm and added to the stream.

    Attributes:
        norm_type, head_norm_type: the kinds of norm; a family may have its own
    """

    norm_type, head_norm_type = RMSNorm, HeadNorm

    def __init__(self, config: ModelConfig, layer: int, **factory: Any):
        hidden = config.hidden_size
        self.attention_norm = self.norm_type(hidden, config.norm_eps, **factory)
        self.attention = Attention(config, layer, self.head_norm_type, **factory)
        self.mlp_norm = self.norm_type(hidden, config.norm_eps, **factory)
        self.mlp = GatedMLP(config, **factory)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.attention.qkv, self.attention.output, self.mlp.gate_up, self.mlp.down

    def __call__(self, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """[tokens, hidden_size] -> the same shape"""
        x = self.attention(self.attention_norm(x), rotation, ctx).add_(x)
        return self.mlp(self.mlp_norm(x)).add_(x)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        attention, mlp = self.attention, self.mlp
        tensors = {
            "input_layernorm.weight": self.attention_norm.weight,
            "post_attention_layernorm.weight": self.mlp_norm.weight,
        }
        if attention.head_norm is not None:
            query, key = attention.head_norm.weight
            tensors["self_attn.q_norm.weight"] = query
            tensors["self_attn.k_norm.weight"] = key
        shards = {
            "self_attn.q_proj": attention.qkv.shard(0),
            "self_attn.k_proj": attention.qkv.shard(1),
            "self_attn.v_proj": attention.qkv.shard(2),
            "self_attn.o_proj": attention.output.shard(0),
            "mlp.gate_proj": mlp.gate_up.shard(0),
            "mlp.up_proj": mlp.gate_up.shard(1),
            "mlp.down_proj": mlp.down.shard(0),
        }
        for name, shard in shards.items():
            tensors |= {f"{name}.{part}": tensor for part, tensor in shard.items()}
        return tensors

    def prepare(self) -> None:
        self.attention.prepare()
        self.mlp.prepare()
        for norm in (self.attention_norm, self.mlp_norm):
            norm.expand()


class Attention:
    """Grouped-query attention over the paged cache; one matmul for queries, keys and values.

    qkv row of a token  [ q0 q1 .. | k0 .. | v0 .. ]    heads of head_dim; q and k turn together
    """

    def __init__(
        self, config: ModelConfig, layer: int, head_norm_type: type[HeadNorm], **factory: Any
    ):
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.qkv = Linear(config.hidden_size, sizes, bias=config.qkv_bias, **factory)
        self.output = Linear(heads * head_dim, (config.hidden_size,), bias=config.o_bias, **factory)
        self.head_norm = (
            head_norm_type(heads, kv_heads, head_dim, config.norm_eps, **factory)
            if config.qk_norm
            else None
        )
        self.head_scale: Tensor | None = None
        self.eps = config.norm_eps
        self.fused: Any = None
        self.layer = layer
        self.window = config.layer_windows[layer]
        self.rotated = config.rope_layers[layer]
        self.row_shape = (heads + 2 * kv_heads, head_dim)
        self.qk_v = (heads + kv_heads, kv_heads)
        self.q_k = (heads, kv_heads)
        self.options = {
            "scale": config.attention_scale or head_dim**-0.5,
            "window": self.window,
            "softcap": config.attention_softcap,
        }

    def __call__(self, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """[tokens, hidden_size] -> the same shape"""
        tokens = x.shape[0]
        query_key, value = self.qkv(x).view(tokens, *self.row_shape).split_with_sizes(self.qk_v, 1)
        query, key = self.turn(query_key, rotation).split_with_sizes(self.q_k, 1)
        out = ctx.attend(self.layer, query, key, value, **self.options)
        return self.output(out.view(tokens, -1))

    def turn(self, query_key: Tensor, rotation: Rotation) -> Tensor:
        """Norm and rotation of every head: [tokens, heads + kv_heads, head_dim] -> the same"""
        if self.fused is not None and query_key.numel() <= self.fused.LARGEST:
            return self.fused.rotate(query_key, *rotation, self.head_scale, self.eps)
        if self.head_norm is not None:
            query_key = self.head_norm(query_key)
        return rotate(query_key, rotation) if self.rotated else query_key

    def prepare(self) -> None:
        """Chooses how heads are turned. Call it once the weights are loaded."""
        if self.rotated:
            self.fused = fused_layers(self.output.weight)
        if self.head_norm is not None:
            self.head_norm.expand()
            self.head_scale = self.head_norm.per_head.float()
        for linear in (self.qkv, self.output):
            linear.pack()


class GatedMLP:
    """`down(activation(gate(x)) * up(x))`; one matmul for gate and up."""

    def __init__(self, config: ModelConfig, **factory: Any):
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(hidden, (inner, inner), bias=bias, **factory)
        self.down = Linear(inner, (hidden,), bias=bias, **factory)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden_size] -> the same shape"""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activation(gate).mul_(up))

    def prepare(self) -> None:
        """Packs the weights, bfloat16 ones at a width of whole panels: every activation of 0 is 0,
        so padding with zeros changes nothing. Call it once they are loaded."""
        inner, weight = -(-self.down.inputs // PANEL) * PANEL, self.down.weight
        if inner != self.down.inputs and weight.dtype == torch.bfloat16 and can_pack(weight):
            self.gate_up.pad(self.gate_up.inputs, (inner, inner))
            self.down.pad(inner, self.down.outputs)
        for linear in (self.gate_up, self.down):
            linear.pack()
