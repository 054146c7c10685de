"""1-D conditional UNet over an action chunk, the head of DiffusionVLA.

Source: Diffusion Policy (Chi et al., arXiv 2303.04137). Parameter names are those of the reference's weights.
"""

import math

import torch
from torch import Tensor, nn

from .configuration_unet import UnetDiffusionPolicyConfig
from .diffusion import DiffusionPolicyHead


class DiffusionStepEmbedding(nn.Module):
    """Diffusion steps (B,) -> (B, dim), sines then cosines, in bf16 as the reference's weights expect."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        steps = torch.arange(half, dtype=torch.bfloat16, device=t.device)
        angles = t[:, None].to(torch.bfloat16) * torch.exp(steps * -(math.log(10_000) / (half - 1)))  # (B, half)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ConvBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, groups: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(channels_in, channels_out, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(groups, channels_out),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, T) -> (B, C_out, T)
        return self.block(x)


class ConditionalResidualBlock(nn.Module):
    """Two convolutions; the condition scales and shifts what the first one yields (FiLM, arXiv 1709.07871)."""

    def __init__(self, channels_in: int, channels_out: int, cond_dim: int, kernel_size: int, groups: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                ConvBlock(channels_in, channels_out, kernel_size, groups),
                ConvBlock(channels_out, channels_out, kernel_size, groups),
            ]
        )
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, 2 * channels_out))
        same = channels_in == channels_out
        self.residual_conv = nn.Identity() if same else nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:  # (B, C_in, T), (B, G) -> (B, C_out, T)
        scale, shift = self.cond_encoder(cond)[..., None].chunk(2, dim=1)  # (B, C_out, 1) each
        return self.blocks[1](scale * self.blocks[0](x) + shift) + self.residual_conv(x)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T) -> (B, C, T/2)
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T) -> (B, C, 2T)
        return self.conv(x)


class ConditionalUnet1D(DiffusionPolicyHead):
    config_class = UnetDiffusionPolicyConfig
    supports_gradient_checkpointing = False  # 70 M convolutional parameters: their activations are small

    def __init__(self, config: UnetDiffusionPolicyConfig):
        super().__init__(config)
        step_dim, cond_dim, dims = config.diffusion_step_embed_dim, config.global_cond_dim, list(config.down_dims)

        def residual(channels_in: int, channels_out: int) -> ConditionalResidualBlock:
            return ConditionalResidualBlock(
                channels_in, channels_out, step_dim + cond_dim, config.kernel_size, config.n_groups
            )

        self.norm_after_pool = nn.LayerNorm(cond_dim)
        self.combine = nn.Linear(cond_dim + config.state_dim, cond_dim)
        self.diffusion_step_encoder = nn.Sequential(
            DiffusionStepEmbedding(step_dim),
            nn.Linear(step_dim, 4 * step_dim),
            nn.Mish(),
            nn.Linear(4 * step_dim, step_dim),
        )
        levels = list(zip([config.input_dim, *dims], dims))
        self.down_modules = nn.ModuleList(
            nn.ModuleList(
                [residual(low, high), residual(high, high), Downsample(high) if high is not dims[-1] else nn.Identity()]
            )
            for low, high in levels
        )
        self.mid_modules = nn.ModuleList([residual(dims[-1], dims[-1]), residual(dims[-1], dims[-1])])
        self.up_modules = nn.ModuleList(
            nn.ModuleList([residual(2 * high, low), residual(low, low), Upsample(low)])
            for low, high in reversed(levels[1:])
        )
        self.final_conv = nn.Sequential(
            ConvBlock(dims[0], dims[0], config.kernel_size, config.n_groups), nn.Conv1d(dims[0], config.input_dim, 1)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # PyTorch's own initialisation, which Diffusion Policy uses; needed here because from_pretrained builds on
        # the meta device and fills missing weights through this method only
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.LayerNorm, nn.GroupNorm)):
            module.reset_parameters()

    def predict_noise(self, x: Tensor, t: Tensor, hidden_states: Tensor, states: Tensor) -> Tensor:
        dtype = self.combine.weight.dtype
        cond = self.norm_after_pool(hidden_states.to(dtype).mean(dim=1))  # (B, L, D) -> (B, D)
        cond = self.combine(torch.cat([cond, states.to(cond.dtype)], dim=-1))  # (B, D)
        embedding, *encoder = self.diffusion_step_encoder
        step = embedding(t).to(dtype)  # (B, E)
        for layer in encoder:
            step = layer(step)
        cond = torch.cat([step, cond.to(step.dtype)], dim=-1)  # (B, E + D)

        x = x.to(dtype).transpose(1, 2)  # (B, A, T)
        skips = []
        for first, second, downsample in self.down_modules:
            x = second(first(x, cond), cond)
            skips.append(x)
            x = downsample(x)
        for block in self.mid_modules:
            x = block(x, cond)
        for first, second, upsample in self.up_modules:
            x = torch.cat([x, skips.pop()], dim=1)
            x = upsample(second(first(x, cond), cond))
        return self.final_conv(x).transpose(1, 2)  # (B, T, A)
