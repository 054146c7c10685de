"""Qwen2-VL's language model over a whole batch at once, for training.

transformers looks on the device whether a batch has padding, masks it out and so leaves the fast attention kernels.
Here real tokens come first in every row: then causal attention alone keeps them from seeing any padding.
"""

from collections.abc import Callable

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


class BatchAttention(Qwen2VLAttention):
    """Takes all tokens of a batch as rows, too: (B * L, D), with position embeddings (B, 1, L, head_dim)."""

    def forward(self, hidden_states: Tensor, attention_mask=None, position_embeddings=None, store=None, **kwargs):
        if hidden_states.ndim == 3:
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
            )
        cos, sin = position_embeddings
        shape = (cos.shape[0], cos.shape[2], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)  # (B, heads, L, d)
        q, k, mask = rotate(q, cos, sin), rotate(k, cos, sin), None
        if store is not None:
            k, v, mask = store(self.layer_idx, k, v)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        output, _ = attend(self, q, k, v, attention_mask=mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(output.reshape(len(hidden_states), -1)), None


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
    model: Qwen2VLTextModel, embeddings: Tensor, position_ids: Tensor, store: Callable | None = None
) -> Tensor:
    """Embeddings (B, L, D) and positions (3, B, L) of rows that begin with their real tokens -> hidden states
    (B, L, D) after the final norm; those of padding mean nothing.

    `store` takes a layer's index, keys and values (B, heads, L, d), and returns those to attend to, and a mask.
    """
    cos, sin = model.rotary_emb(embeddings, position_ids)  # (B, L, head_dim)
    position_embeddings = cos[:, None], with_signs(sin)[:, None]
    hidden_states = embeddings.flatten(0, 1)  # (B * L, D)
    for layer in model.layers:
        hidden_states = layer(hidden_states, position_embeddings=position_embeddings, use_cache=False, store=store)
    return model.norm(hidden_states).view_as(embeddings)
