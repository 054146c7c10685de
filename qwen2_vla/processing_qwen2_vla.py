"""One robot sample -> the inputs of the model, the same for training and for acting."""

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from transformers import ProcessorMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from .patches import MERGE, PATCH, TEMPORAL, to_patches

IGNORE_INDEX = -100
ANSWER_MARK = "Next action:"
END = "<|im_end|>"
MAX_CACHED_TEXTS = 10_000


class Qwen2VLAProcess:
    """Turns an item of `EpisodicDataset` into model inputs.

    Prompt: one user turn with K images, then the instruction. Answer: reasoning, `Next action:` and `<|im_end|>`, or
    `<|im_end|>` alone without `use_reasoning`. An item without `action` (acting) yields the prompt alone.

    Args:
        multimodal_processor: the Qwen2-VL processor of the model's folder (tokenizer, image processor, chat template).
        camera_names: names of the item's K images, in order.
        image_size_wrist: (width, height) that cameras with `wrist` in their name are resized to first.

    Returns (of a call):
        input_ids, labels, mm_token_type_ids (L,), position_ids (3, L), image_grid_thw (K, 3) int64 ·
        images, K of (F, h, w, 3) uint8 on Qwen2-VL's grid · state, action, is_pad, source as they came.
        `["pixel_values"]` (patches, 1176) float32 is made of the images when asked for; training leaves that to the
        device. Images (K, F, 3, h, w) of F > 1 frames enter as videos: `video_grid_thw` and `pixel_values_videos`.
    """

    def __init__(
        self,
        multimodal_processor: ProcessorMixin,
        camera_names: list[str],
        *,
        image_size_wrist: tuple[int, int] = (320, 240),
        use_reasoning: bool = True,
    ):
        self.processor = multimodal_processor
        self.tokenizer = multimodal_processor.tokenizer
        self.image_processor = multimodal_processor.image_processor
        self.camera_names = list(camera_names)
        self.image_size_wrist = tuple(image_size_wrist)
        self.use_reasoning = use_reasoning
        found = list(self.image_processor.image_mean), list(self.image_processor.image_std)
        if found != (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD):
            raise ValueError(
                "preprocessor_config.json: expected Qwen2-VL's image_mean and image_std, "
                f"{OPENAI_CLIP_MEAN} and {OPENAI_CLIP_STD}, found {found[0]} and {found[1]}"
            )
        self._token_ids: dict[str, Tensor] = {}
        self._prompts: dict[tuple, dict[str, Tensor]] = {}

    def __call__(self, item: dict) -> "ModelInputs":
        images = [self._on_grid(name, image) for name, image in zip(self.camera_names, item["images"], strict=True)]
        shapes = tuple(image.shape for image in images)
        prompt = _cached(self._prompts, (item["raw_lang"], shapes), lambda: self._prompt(item["raw_lang"], shapes))
        inputs = ModelInputs(prompt, images=images, state=item["state"])
        if "action" in item:
            text = f"{item['reasoning']}{ANSWER_MARK}{END}" if self.use_reasoning else END
            answer = self._tokenize(text)  # (N,)
            asked = prompt["input_ids"]  # (P,)
            inputs.update(
                input_ids=torch.cat([asked, answer]),
                labels=torch.cat([torch.full_like(asked, IGNORE_INDEX), answer]),
                mm_token_type_ids=torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(answer)]),
                position_ids=_continued(prompt["position_ids"], len(answer)),
                action=item["action"],
                is_pad=item["is_pad"],
                source=item.get("source"),
            )
        return inputs

    def grid_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(width, height) on Qwen2-VL's grid of every camera, for images of `size`."""
        return [self._grid_size(self.image_size_wrist if "wrist" in name else size) for name in self.camera_names]

    def _grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = smart_resize(
            size[1],
            size[0],
            factor=PATCH * MERGE,
            min_pixels=self.image_processor.size["shortest_edge"],
            max_pixels=self.image_processor.size["longest_edge"],
        )
        return width, height

    def _on_grid(self, camera: str, image: Tensor) -> Tensor:
        """(3, h, w) or (F, 3, h, w) uint8 -> (F, h', w', 3) on Qwen2-VL's grid."""
        image = image if image.ndim == 4 else image[None]
        size = (image.shape[-1], image.shape[-2])
        goal = self.image_size_wrist if "wrist" in camera else size
        grid = self._grid_size(goal)
        if size != grid:
            image = _resize(_resize(image, goal), grid)
        return image.permute(0, 2, 3, 1).contiguous()

    def _tokenize(self, text: str) -> Tensor:
        """Token ids (L,). Instructions and sub-steps repeat over the frames of an episode, so they are kept."""
        return _cached(self._token_ids, text, lambda: torch.tensor(self.tokenizer(text).input_ids))

    def _prompt(self, instruction: str, shapes: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
        """The chat turn for images of `shapes` (F, h, w, 3), each placeholder repeated once per image token."""
        kind, token, token_id = "image", self.processor.image_token, self.processor.image_token_id
        if shapes[0][0] > 1:
            kind, token, token_id = "video", self.processor.video_token, self.processor.video_token_id
        content = [{"type": kind} for _ in self.camera_names] + [{"type": "text", "text": instruction}]
        turn = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        first, *others = text.split(token)
        if len(others) != len(self.camera_names):
            raise ValueError(
                f"the chat template made {len(others)} {kind} placeholders for {len(self.camera_names)} cameras and "
                f"the instruction {instruction!r}, which must not contain {token}"
            )
        grid = torch.tensor([(math.ceil(f / TEMPORAL), h // PATCH, w // PATCH) for f, h, w, _ in shapes])  # (K, 3)
        counts = (grid.prod(dim=1) // MERGE**2).tolist()
        text = first + "".join(token * count + part for count, part in zip(counts, others))
        ids = torch.tensor(self.tokenizer(text).input_ids)  # (P,)
        token_types = (ids == token_id).long() * (2 if kind == "video" else 1)
        return {
            "input_ids": ids,
            "mm_token_type_ids": token_types,
            "position_ids": _position_ids(ids == token_id, grid),
            f"{kind}_grid_thw": grid,
        }


def _position_ids(is_picture: Tensor, grid: Tensor) -> Tensor:
    """Time, row and column (3, L) of every token, as `Qwen2VLModel.get_rope_index` counts them: text goes on by one, a
    picture's tokens start together and take as many numbers as its longer side has tokens."""
    parts, position, token, grids = [], 0, 0, iter(grid.tolist())
    while token < len(is_picture):
        if is_picture[token]:
            time, rows, columns = next(grids)
            sides = (time, rows // MERGE, columns // MERGE)
            parts.append(torch.cartesian_prod(*(torch.arange(n) for n in sides)).T + position)
            position += max(sides[1:])
        else:
            end = token + int(is_picture[token:].int().argmax()) if is_picture[token:].any() else len(is_picture)
            parts.append(torch.arange(position, position + end - token).expand(3, -1))
            position += end - token
        token += parts[-1].shape[1]
    return torch.cat(parts, dim=1)


def _continued(position_ids: Tensor, count: int) -> Tensor:
    """(3, L) -> (3, L + count) with text after it."""
    start = int(position_ids.max()) + 1
    return torch.cat([position_ids, torch.arange(start, start + count).expand(3, -1)], dim=1)


class ModelInputs(dict):
    """Inputs of one sample; the float patches, 24 times the bytes of the images, only when somebody asks."""

    def __missing__(self, key: str) -> Tensor:
        if key == ("pixel_values_videos" if "video_grid_thw" in self else "pixel_values"):
            return to_patches([image[None] for image in self["images"]])
        raise KeyError(key)


def _cached(cache: dict, key: Hashable, make: Callable):
    if key not in cache:
        if len(cache) >= MAX_CACHED_TEXTS:
            cache.clear()
        cache[key] = make()
    return cache[key]


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(F, 3, H, W) uint8 -> (F, 3, h, w), size (w, h), as PIL's bicubic filter does it."""
    width, height = size
    if image.shape[-2:] == (height, width):
        return image
    return tvf.resize(image, [height, width], interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)
