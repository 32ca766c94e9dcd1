"""The forward pass of a decoder over a backend that fuses what stands between the matrix products.

layer by layer   norm | qkv | turn + store | attend | output | add + norm | gate_up | gate | down
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.dispatch import LayerOps
from kernels.reference import GATES
from models.layers import RMSNorm

if TYPE_CHECKING:
    from models.context import ForwardContext
    from models.decoder import Attention, Decoder
    from models.rotary import Rotation


def can_fuse(decoder: Decoder) -> bool:
    """Whether the layers of a decoder are those that `fused_forward` knows."""
    from models.decoder import DecoderLayer

    return (
        decoder.config.activation in GATES
        and type(decoder.norm) is RMSNorm
        and all(type(layer) is DecoderLayer for layer in decoder.layers)
    )


def fused_forward(decoder: Decoder, x: Tensor, ops: LayerOps, ctx: ForwardContext) -> Tensor:
    """What the layers and the final norm of a prepared decoder make of the stream x, which it uses
    up: [tokens, hidden_size] -> the same shape"""
    rotation = decoder.rotary(ctx.positions)
    eps = decoder.config.norm_eps
    layers = decoder.layers
    y = layers[0].attention_norm(x)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        y = _attention(layer.attention, y, rotation, ops, ctx)
        y = ops.add_rms_norm(y, x, layer.mlp_norm.scale, eps)
        y = layer.mlp.down(ops.gated(layer.mlp.gate_up(y), decoder.config.activation))
        norm = decoder.norm if following is None else following.attention_norm
        y = ops.add_rms_norm(y, x, norm.scale, eps)
    return y


def _attention(
    attention: Attention, x: Tensor, rotation: Rotation, ops: LayerOps, ctx: ForwardContext
) -> Tensor:
    """[tokens, hidden_size] -> the same shape"""
    tokens, layer = x.shape[0], attention.layer
    query = ops.turn_and_store(
        attention.qkv(x).view(tokens, *attention.row_shape),
        rotation if attention.rotated else None,
        attention.head_scale,
        attention.eps,
        ctx.pages[layer],
        ctx.groups[ctx.layer_groups[layer]].slot_mapping,
    )
    out = ctx.attend_stored(layer, query, **attention.options)
    return attention.output(out.view(tokens, -1))
