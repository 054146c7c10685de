"""Qwen2-VL's vision tower for cameras whose image sizes are known: one attention call, and the host never waits.

transformers asks the device for the sizes of all images in every layer and attends image by image. Here the sizes are
those of the tensors, so that all images of one size go through attention as one batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    VisionAttention,
    eager_attention_forward,
)

from .patches import MERGE, PATCH, camera_patches


class GroupedVisionAttention(VisionAttention):
    """`groups` tells which successive patches belong together."""

    def forward(self, hidden_states: Tensor, *args, groups: "list[Group] | None" = None, **kwargs) -> Tensor:
        if groups is None:
            return super().forward(hidden_states, *args, **kwargs)
        qkv = self.qkv(hidden_states)  # (P, 3 * D)
        rows = [qkv] if len(groups) == 1 else qkv.split([group.frames * group.patches for group in groups])
        outputs = [self._attend(group, part) for group, part in zip(groups, rows, strict=True)]
        return self.proj(torch.cat(outputs) if len(outputs) > 1 else outputs[0])

    def _attend(self, group: "Group", qkv: Tensor) -> Tensor:
        """(frames * patches, 3 * D) -> (frames * patches, D)"""
        qkv = qkv.view(group.frames, group.patches, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        qk, v = qkv.split([2, 1])  # (2 or 1, frames, heads, patches, head_dim)
        q, k = rotate(qk, group.cos, group.sin).to(v.dtype).unbind(0)  # rotated in fp32, as cosine and sine are
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, q, k, v[0], attention_mask=None, scaling=self.scaling, dropout=0.0, is_causal=False)
        return output.reshape(-1, self.dim)


@dataclass
class Group:
    """Frames of one size. cos, sin: (patches, head_dim) of one frame's rotary embedding."""

    frames: int
    patches: int
    cos: Tensor
    sin: Tensor


def attend_in_groups(visual: Qwen2VisionTransformerPretrainedModel):
    """Lets the tower's attention understand `groups`. Parameters and their names stay as they are."""
    for block in visual.blocks:
        block.attn.__class__ = GroupedVisionAttention


def encode_images(visual: Qwen2VisionTransformerPretrainedModel, images: list[Tensor]) -> Tensor:
    """K cameras' images (B, F, h, w, 3) uint8 -> embeddings (B, tokens of the K cameras, D) of the language model."""
    patches = [camera_patches(image) for image in images]  # (B, P, 1176) each
    groups, size = [], None
    for image, part in zip(images, patches):
        rows, columns = image.shape[2] // PATCH, image.shape[3] // PATCH
        if (rows, columns) != size:
            cos, sin = visual.rotary_pos_emb(part, _positions(rows, columns, image.device))
            groups.append(Group(0, rows * columns, cos, with_signs(sin)))
            size = (rows, columns)
        groups[-1].frames += len(part) * part.shape[1] // (rows * columns)
    hidden_states = visual.patch_embed(torch.cat([part.flatten(0, 1) for part in patches]).to(visual.dtype))
    for block in visual.blocks:
        hidden_states = block(hidden_states, cu_seqlens=None, groups=groups)  # (all P, D)
    embeddings = visual.merger(hidden_states)  # camera by camera, and of each sample by sample
    tokens = [len(part) * part.shape[1] // MERGE**2 for part in patches]
    cameras = [camera.unflatten(0, (len(images[0]), -1)) for camera in embeddings.split(tokens)]  # (B, tokens, D)
    return torch.cat(cameras, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (…, head_dim), with the sine `with_signs`: in three operations."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def with_signs(sin: Tensor) -> Tensor:
    """The sign that turning a vector's halves into each other gives to the first of them."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Row and column (rows * columns, 2) of a frame's patches, in blocks of 2 x 2, as `camera_patches` orders them."""
    row = torch.arange(rows, device=device).view(-1, 1, MERGE, 1).expand(-1, columns // MERGE, -1, MERGE)
    column = torch.arange(columns, device=device).view(1, -1, 1, MERGE).expand(rows // MERGE, -1, MERGE, -1)
    return torch.stack([row.flatten(), column.flatten()], dim=-1)
