"""uint8 images -> the patches that Qwen2-VL's vision tower reads; runs where the images are."""

import torch
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

PATCH, MERGE, TEMPORAL = 14, 2, 2  # pixels, patches and frames that Qwen2-VL puts together


def to_patches(images: list[Tensor]) -> Tensor:
    """K cameras' images (B, F, h, w, 3) uint8, sides multiples of 28 -> pixel_values (patches of B*K, 1176) float32.

    The same as transformers' Qwen2VLImageProcessor without its resize: sample by sample, camera by camera, in blocks
    of 2 x 2 patches; a single image stands for two frames, an odd number of frames is filled up with the last one.
    """
    return torch.cat([camera_patches(image) for image in images], dim=1).flatten(0, 1)


def image_or_video_patches(images: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """`pixel_values` and `pixel_values_videos`: one of them, images of more than one frame being videos."""
    patches = to_patches(images)
    return (None, patches) if images[0].shape[1] > 1 else (patches, None)


def camera_patches(image: Tensor) -> Tensor:
    """(B, F, h, w, 3) uint8 -> (B, patches, 1176) float32, normalised."""
    batch, frames, height, width, _ = image.shape
    if frames > 1 and frames % TEMPORAL:
        image = torch.cat([image, image[:, -1:]], dim=1)
    together = TEMPORAL if frames > 1 else 1
    rows, columns = height // (PATCH * MERGE), width // (PATCH * MERGE)
    blocks = image.view(batch, -1, together, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    blocks = blocks.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)  # (B, time, rows, columns, 2, 2, 3, together, 14, 14)
    colours = blocks.reshape(batch, -1, 3, together * PATCH * PATCH).unbind(dim=2)  # (B, P, together * 196)
    # numbers, not a tensor of them: that would have to be copied to the device in every step
    normalised = [(c.float() - 255 * m) / (255 * s) for c, m, s in zip(colours, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)]
    patches = torch.stack(normalised, dim=2).unflatten(3, (together, -1))  # (B, P, 3, together, 196)
    return patches.expand(-1, -1, -1, TEMPORAL, -1).flatten(2)
