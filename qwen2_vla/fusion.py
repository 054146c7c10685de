"""How DexVLA condenses the language model's hidden states into the one vector that conditions the policy head."""

import torch
from torch import Tensor, nn

from policy_heads.diffusion import ZeroLinear


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` (B, L, D) over the positions where `mask` (B, L) is True -> (B, 1, D). No loop, no host sync."""
    # summed in fp32: a thousand hidden states overflow fp16
    total = (x * mask[..., None]).sum(dim=1, keepdim=True, dtype=torch.float32)  # (B, 1, D)
    return (total / mask.sum(dim=1).clamp(min=1)[:, None, None]).to(x.dtype)


class ActionProjector(nn.Module):
    """Two-layer projection of a pooled hidden state (B, 1, D) -> (B, 1, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlps = nn.ModuleList([nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.mlps:
            x = layer(x)
        return x


class FiLM(nn.Module):
    """Feature-wise linear modulation (Perez et al., arXiv 1709.07871), the identity at the start of training."""

    def __init__(self, feature_dim: int, condition_dim: int):
        super().__init__()
        self.scale_fc = ZeroLinear(condition_dim, feature_dim)
        self.shift_fc = ZeroLinear(condition_dim, feature_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # (B, 1, D), (B, 1, C) -> (B, 1, D)
        return x * (1 + self.scale_fc(condition)) + self.shift_fc(condition)
