"""One robot sample -> the inputs of the model, the same for training and for acting."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

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
        input_ids, labels, mm_token_type_ids (L,) int64 · pixel_values (patches, 1176) float32 ·
        image_grid_thw (K, 3) int64 · state, action and is_pad as they came
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
        self._token_ids: dict[str, Tensor] = {}
        self._templates: dict[str, str] = {}

    def __call__(self, item: dict) -> dict[str, Tensor]:
        images = self._images(item["images"])
        prompt = self._tokenize(self._prompt(item["raw_lang"], images["image_grid_thw"]))  # (P,)
        is_image = (prompt == self.processor.image_token_id).long()
        inputs = {"input_ids": prompt, "mm_token_type_ids": is_image, **images, "state": item["state"]}
        if "action" in item:
            text = f"{item['reasoning']}{ANSWER_MARK}{END}" if self.use_reasoning else END
            answer = self._tokenize(text)  # (N,)
            inputs |= {
                "input_ids": torch.cat([prompt, answer]),
                "labels": torch.cat([torch.full_like(prompt, IGNORE_INDEX), answer]),
                "mm_token_type_ids": torch.cat([is_image, torch.zeros_like(answer)]),
                "action": item["action"],
                "is_pad": item["is_pad"],
            }
        return inputs

    def _tokenize(self, text: str) -> Tensor:
        """Token ids (L,). Instructions and sub-steps repeat over the frames of an episode, so they are kept."""
        return _cached(self._token_ids, text, lambda: torch.tensor(self.tokenizer(text).input_ids))

    def _prompt(self, instruction: str, image_grid_thw: Tensor) -> str:
        """The chat turn, each image's placeholder repeated once per image token."""

        def template() -> str:
            content = [{"type": "image"} for _ in self.camera_names] + [{"type": "text", "text": instruction}]
            turn = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

        text = _cached(self._templates, instruction, template)
        first, *others = text.split(self.processor.image_token)
        if len(others) != len(self.camera_names):
            raise ValueError(
                f"the chat template made {len(others)} image placeholders for {len(self.camera_names)} cameras and the "
                f"instruction {instruction!r}, which must not contain {self.processor.image_token}"
            )
        merge = self.image_processor.merge_size**2
        counts = (image_grid_thw.prod(dim=1) // merge).tolist()
        return first + "".join(self.processor.image_token * count + part for count, part in zip(counts, others))

    def _images(self, images: Tensor) -> dict[str, Tensor]:
        """(K, 3, h, w) uint8 -> patches on Qwen2-VL's grid."""
        on_grid = []
        for name, image in zip(self.camera_names, images, strict=True):
            if "wrist" in name:
                width, height = self.image_size_wrist
                image = _resize(image, height, width)
            grid_size = smart_resize(
                *image.shape[-2:],
                factor=self.image_processor.patch_size * self.image_processor.merge_size,
                min_pixels=self.image_processor.size["shortest_edge"],
                max_pixels=self.image_processor.size["longest_edge"],
            )
            on_grid.append(_resize(image, *grid_size))
        return dict(self.image_processor(images=on_grid, do_resize=False, return_tensors="pt"))


def _cached(cache: dict, key: str, make):
    if key not in cache:
        if len(cache) >= MAX_CACHED_TEXTS:
            cache.clear()
        cache[key] = make()
    return cache[key]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """(3, H, W) uint8 -> (3, height, width), as PIL's bicubic filter does it."""
    if image.shape[-2:] == (height, width):
        return image
    return tvf.resize(image, [height, width], interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)
