"""ScaleDP: a diffusion transformer over an action chunk, conditioned through adaLN-Zero.

Sources: Scalable Diffusion Models with Transformers (Peebles & Xie, arXiv 2212.09748), ScaleDP (arXiv 2409.14411) and
DexVLA (arXiv 2502.05855). Parameter names are those of the released weights.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_scaledp import ScaleDPPolicyConfig
from .diffusion import DiffusionPolicyHead, ZeroLinear


def modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """`x` (B, T, W) normalised, then scaled and shifted by one vector (B, 1, W) per sample."""
    if len(x) == 1 and x.dtype == factor.dtype:  # what a layer norm can do itself
        return F.layer_norm(x, norm.normalized_shape, factor[0, 0], shift[0, 0], norm.eps)
    return torch.addcmul(shift, norm(x), factor)


def modulation(adaln: nn.Sequential, c: Tensor, parts: int) -> list[Tensor]:
    """Vectors (B, 1, W) out of the condition `c` (B, W), on which SiLU was done: it is the same for all blocks.

    They are shift, factor and gate, as often as there are `parts`; what the layer yields for a factor is its
    difference to 1.
    """
    vectors = adaln[1](c).unsqueeze(1).chunk(parts, dim=-1)
    return [1 + vector if i % 3 == 1 else vector for i, vector in enumerate(vectors)]


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def sinusoidal(t: Tensor, dim: int) -> Tensor:
        """Diffusion steps (B,) -> (B, dim) bf16: cosines, then sines, of `dim // 2` frequencies."""
        half = dim // 2
        # bf16 on purpose, frequencies and result: the released weights were trained with what this rounding yields
        steps = torch.arange(half, dtype=torch.bfloat16, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * steps / half)  # (B, half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).bfloat16()

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, W)
        return self.mlp(self.sinusoidal(t, self.frequencies).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, W) -> (B, T, W)
        qkv = self.qkv(x.flatten(0, 1)).view(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, head_dim)
        x_attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (B, T, heads, head_dim)
        return self.proj(x_attended.reshape(-1, x.shape[-1])).view_as(x)


class ScaleDPBlock(GradientCheckpointingLayer):
    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor | None = None, parts: list[Tensor] | None = None) -> Tensor:
        """x (B, T, W) action tokens, c (B, W) SiLU of the condition, or instead of it its `modulation` -> (B, T, W)."""
        shift_attn, factor_attn, gate_attn, shift_mlp, factor_mlp, gate_mlp = parts or self.modulation(c)
        x = torch.addcmul(x, gate_attn, self.attn(modulate(self.norm1, x, shift_attn, factor_attn)))
        # as rows, so that the layers need not make rows of it one by one
        rows = modulate(self.norm2, x, shift_mlp, factor_mlp).flatten(0, 1)  # (B * T, W)
        return torch.addcmul(x, gate_mlp, self.mlp(rows).view_as(x))

    def modulation(self, c: Tensor) -> list[Tensor]:
        return modulation(self.adaLN_modulation, c, 6)


class FinalLayer(nn.Module):
    def __init__(self, width: int, output_dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = ZeroLinear(width, output_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (B, T, W), (B, W) -> (B, T, A)
        return self.update(x, *modulation(self.adaLN_modulation, c, 2))

    def update(self, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final, x, shift, factor))


class ScaleDP(DiffusionPolicyHead):
    config_class = ScaleDPPolicyConfig
    _no_split_modules = ["ScaleDPBlock"]

    def __init__(self, config: ScaleDPPolicyConfig):
        super().__init__(config)
        width, cond_dim = config.n_emb, config.cond_dim
        self.combine = nn.Sequential(
            nn.Linear(cond_dim + config.state_dim, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, cond_dim),
        )
        self.x_embedder = nn.Linear(config.input_dim, width)
        self.t_embedder = TimestepEmbedder(width)
        self.cond_obs_emb = nn.Linear(cond_dim, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.prediction_horizon, width))
        self.blocks = nn.ModuleList(
            ScaleDPBlock(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, config.output_dim)
        if config.is_tinyvla:
            self.norm_after_pool = nn.LayerNorm(cond_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # As DiT: xavier for the blocks, N(0, 0.02) for the embeddings, zero for whatever gates a residual branch,
        # so that an untrained head predicts zero noise and every block is the identity.
        if isinstance(module, ZeroLinear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ScaleDP):
            nn.init.normal_(module.pos_embed, std=0.02)
            nn.init.normal_(module.t_embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(module.t_embedder.mlp[2].weight, std=0.02)
            nn.init.normal_(module.cond_obs_emb.weight, std=0.02)

    def _condition(self, t: Tensor, hidden_states: Tensor, states: Tensor) -> Tensor:
        """What all blocks are modulated by, (N, W), for diffusion steps (N,), N a multiple of the B samples."""
        dtype = self.pos_embed.dtype
        cond = hidden_states.to(dtype).mean(dim=1)  # (B, L, D) -> (B, D); L is 1 unless TinyVLA
        if self.config.is_tinyvla:
            cond = self.norm_after_pool(cond)
        cond = self.cond_obs_emb(self.combine(torch.cat([cond, states.to(cond.dtype)], dim=-1)))  # (B, W)
        return F.silu(self.t_embedder(t) + cond.repeat(len(t) // len(cond), 1))

    def predict_noise(self, x: Tensor, t: Tensor, hidden_states: Tensor, states: Tensor) -> Tensor:
        c = self._condition(t, hidden_states, states)  # (B, W)
        x = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (B, T, W)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)  # (B, T, A)

    def noise_predictor(
        self, steps: list[int], hidden_states: Tensor, states: Tensor
    ) -> Callable[[int, Tensor], Tensor]:
        # The modulations, a third of the weights, do not depend on x: read once for all steps
        batch = len(states)
        t = torch.cat([torch.full((batch,), step, device=states.device) for step in steps])  # (N * B,)
        c = self._condition(t, hidden_states, states)  # (N * B, W)
        layers = [(block, block.modulation(c)) for block in self.blocks]
        last = modulation(self.final_layer.adaLN_modulation, c, 2)

        def predict(i: int, x: Tensor) -> Tensor:
            rows = slice(i * batch, (i + 1) * batch)
            x = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (B, T, W)
            for block, parts in layers:
                x = block(x, parts=[part[rows] for part in parts])
            return self.final_layer.update(x, *(part[rows] for part in last)).float()  # (B, T, A)

        return predict
