"""Diffusion policy heads: the part of DexVLA that turns one fused hidden state into a chunk of robot actions."""

from transformers import AutoConfig, AutoModel

from .configuration_scaledp import SCALEDP_SIZES, ScaleDPPolicyConfig
from .configuration_unet import UnetDiffusionPolicyConfig
from .diffusion import DiffusionPolicyHead
from .modeling_scaledp import ScaleDP
from .modeling_unet import ConditionalUnet1D

AutoConfig.register("scale_dp_policy", ScaleDPPolicyConfig)
AutoConfig.register("unet_diffusion_policy", UnetDiffusionPolicyConfig)
AutoModel.register(ScaleDPPolicyConfig, ScaleDP)
AutoModel.register(UnetDiffusionPolicyConfig, ConditionalUnet1D)

HEAD_CLASSES = {head.config_class.model_type: head for head in (ScaleDP, ConditionalUnet1D)}

__all__ = [
    "HEAD_CLASSES",
    "SCALEDP_SIZES",
    "ConditionalUnet1D",
    "DiffusionPolicyHead",
    "ScaleDP",
    "ScaleDPPolicyConfig",
    "UnetDiffusionPolicyConfig",
]
