"""Qwen2-VL's language model over a whole batch at once, for training.

transformers looks on the device whether a batch has padding, masks it out and so leaves the fast attention kernels.
Here real tokens come first in every row: then causal attention alone keeps them from seeing any padding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention, Qwen2VLRMSNorm, Qwen2VLTextModel

from .vision import rotate, with_signs


class FusedRMSNorm(Qwen2VLRMSNorm):
    """One kernel on CUDA; elsewhere PyTorch has none, and half of its 29 operations are done without here."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.is_cuda:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """Root mean square layer normalisation (Zhang & Sennrich, arXiv 1910.07467) of the last dimension, in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        values = x.float()
        scale = values.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (values * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight, scale = ctx.saved_tensors
        gradient = gradient.float()
        normed = x.float() * scale
        of_weight = (gradient * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        of_normed = gradient * weight
        projection = (of_normed * normed).mean(dim=-1, keepdim=True)
        of_x = torch.addcmul(of_normed, normed, projection, value=-1).mul_(scale)
        return of_x.to(x.dtype), of_weight, None


class LayerCache(NamedTuple):
    """A layer's keys and values, (B, heads, M, d) each, in place for all queries of one shape.

    Without the others it takes the first L tokens, which attend causally to one another. With them it takes one token a
    row at `index`, (B, heads, 1, d), which attends to the M places as `bias` (B, 1, 1, M), 0 or -inf, allows.
    """

    keys: Tensor
    values: Tensor
    index: Tensor | None = None
    bias: Tensor | None = None


class BatchAttention(Qwen2VLAttention):
    """Takes all tokens of a batch as rows, too: (B * L, D), with position embeddings (B, 1, L, head_dim)."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        store: LayerCache | None = None,
        **kwargs,
    ):
        if hidden_states.ndim == 3:
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
            )
        cos, sin = position_embeddings
        batch, length, rows = cos.shape[0], cos.shape[2], len(hidden_states)
        qk = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states)], dim=-1)  # (B * L, (heads + kv) * d)
        qk = rotate(qk.view(batch, length, -1, self.head_dim).transpose(1, 2), cos, sin)  # (B, heads + kv, L, d)
        v = self.v_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, kv, L, d)
        q, k = qk.split([qk.shape[1] - v.shape[1], v.shape[1]], dim=1)
        if store is not None and store.index is not None:
            keys, values = store.keys.scatter_(2, store.index, k), store.values.scatter_(2, store.index, v)
            # heads that share keys and values are as good as rows of one head: nothing need be repeated for them
            grouped = q.reshape(batch, v.shape[1], -1, self.head_dim)
            output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=store.bias, scale=self.scaling)
            return self.o_proj(output.reshape(rows, -1)), None
        if store is not None:
            store.keys[:, :, :length] = k
            store.values[:, :, :length] = v
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        output, _ = attend(self, q, k, v, attention_mask=None, dropout=dropout, scaling=self.scaling)
        return self.o_proj(output.reshape(rows, -1)), None


def speed_up(model: Qwen2VLTextModel):
    """Gives the layers the faster forward passes above. Parameters and their names stay as they are."""
    for module in model.modules():
        if type(module) is Qwen2VLRMSNorm:
            module.__class__ = FusedRMSNorm
        elif type(module) is Qwen2VLAttention:
            module.__class__ = BatchAttention


def can_encode(model: Qwen2VLTextModel) -> bool:
    """Whether attention without a mask is causal: eager attention is not, and a sliding window needs a mask."""
    return model.config._attn_implementation != "eager" and not model.has_sliding_layers


def encode_tokens(
    model: Qwen2VLTextModel, embeddings: Tensor, position_ids: Tensor, store: list[LayerCache] | None = None
) -> Tensor:
    """Embeddings (B, L, D) and positions (3, B, L) of rows that begin with their real tokens -> hidden states
    (B, L, D) after the final norm; those of padding mean nothing. `store`: where each layer puts its keys and values.
    """
    cos, sin = model.rotary_emb(embeddings, position_ids)  # (B, L, head_dim)
    position_embeddings = cos[:, None], with_signs(sin)[:, None]
    hidden_states = embeddings.flatten(0, 1)  # (B * L, D)
    for layer, kept in zip(model.layers, store or [None] * len(model.layers), strict=True):
        hidden_states = layer(hidden_states, position_embeddings=position_embeddings, use_cache=False, store=kept)
    return model.norm(hidden_states).view_as(embeddings)
