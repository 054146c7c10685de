"""How many floating point operations a training sample needs by the mathematics, and how many a device can do.

Two operations per multiply-add of a matrix product; element-wise work (norms, activations, optimizer) is left out, as
usual for model FLOP utilisation (MFU). A training step does each product once forward, once more for the gradient of
its input and once more for that of its weight, where something needs them. Nothing counts twice because it is
recomputed. Attention: images only within each image, text causally, so half of all pairs. Logits: only where an answer
token is predicted. Padding counts for nothing.
"""

import functools
import json
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from data_utils.collator import IGNORE_INDEX, Qwen2VLADataCollatorForSupervisedDataset
from data_utils.errors import UserError
from policy_heads import ConditionalUnet1D, UnetDiffusionPolicyConfig

from .configuration_qwen2_vla import Qwen2VLAConfig
from .patches import MERGE, PATCH, TEMPORAL

# Dense bf16 matrix products with fp32 accumulation, operations per second, as the vendors publish them; written down
# from memory, so hold a figure against the data sheet before you quote an MFU. The sheets are (where one
# gives the figure with sparsity, half of it): NVIDIA B200, H200, H100 and H20, A100, A40, A10, L40S, L40, L4, RTX A6000
# and RTX 6000 Ada data sheets; RTX 30, 40 and 50: appendices of the GA102, AD102 and RTX Blackwell white papers.
# Huawei's for Ascend are fp16 figures; the bins of the 910B differ by up to a quarter, this is one of the higher ones.
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "H20": 148e12, "A100": 312e12, "A40": 149.7e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "RTX A6000": 154.8e12, "RTX 6000 Ada": 364e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12,
    "RTX 3090": 71e12, r"Ascend ?910B\d?": 376e12, r"Ascend ?910(?:A|Pro\w)?": 256e12,
}  # fmt: skip
# The full-size backbone, as in the config.json of Qwen2-VL-2B, and two smaller ones of the same make
PRESETS = {
    "2b": {
        "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
        "vision": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4},
        "vocab_size": 151_936, "mrope_section": [16, 24, 24], "head": "ScaleDP_H",
    },
    "small": {
        "text": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
        "vision": {"embed_dim": 384, "depth": 8, "num_heads": 6, "mlp_ratio": 4},
        "vocab_size": 32_768, "mrope_section": [8, 12, 12], "head": "ScaleDP_S",
    },
    "tiny": {
        "text": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        "vision": {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2},
        "vocab_size": 512, "mrope_section": [4, 6, 6], "head": "ScaleDP_Ti",
    },
}  # fmt: skip
PARTS = ("vision", "language_model", "lm_head", "fusion", "head")


def preset_config(preset: str = "2b", head_size: str | None = None, chunk: int = 50) -> Qwen2VLAConfig:
    """Configuration of a DexVLA of known sizes, without any folder. `head_size`: a key of SCALEDP_SIZES.

    Raises:
        UserError: for a preset that does not exist.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset: expected one of {', '.join(PRESETS)}, found {preset}")
    sizes = PRESETS[preset]
    vocabulary, hidden = sizes["vocab_size"], sizes["text"]["hidden_size"]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sizes["mrope_section"]}
    special = (
        "vision_start_token_id",
        "vision_end_token_id",
        "vision_pad_token_id",
        "image_token_id",
        "video_token_id",
    )
    return Qwen2VLAConfig(
        text_config=sizes["text"]
        | {"vocab_size": vocabulary, "num_key_value_heads": 2, "rope_parameters": rope}
        | {"bos_token_id": None, "eos_token_id": None},
        vision_config=sizes["vision"] | {"hidden_size": hidden},
        tie_word_embeddings=True,
        policy_head_config={
            "model_type": "scale_dp_policy",
            "model_size": head_size or sizes["head"],
            "cond_dim": hidden,
            "prediction_horizon": chunk,
        },
        **{name: vocabulary - len(special) + i for i, name in enumerate(special)},
    )


@dataclass(frozen=True)
class SampleSizes:
    """One sample: (height, width) in pixels of each image on Qwen2-VL's grid, frames of each, text and image tokens
    together, answer tokens. The default is three cameras of 320x240 with an instruction and a sub-step."""

    images: tuple[tuple[int, int], ...] = ((252, 308),) * 3
    frames: int = 1
    tokens: float = 360
    answer_tokens: int = 24

    @property
    def patches(self) -> list[int]:
        """Patches that attend to each other: those of an image, or of two frames of a video."""
        times = -(-self.frames // TEMPORAL) if self.frames > 1 else 1
        return [height // PATCH * (width // PATCH) for height, width in self.images for _ in range(times)]

    @property
    def image_tokens(self) -> int:
        return sum(self.patches) // MERGE**2


def build_model(config: Qwen2VLAConfig, device: str | torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random weights, made where it will work, in training mode."""
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").train()


def synthetic_items(config: Qwen2VLAConfig, sizes: SampleSizes, count: int) -> list[dict]:
    """Items of random contents as `Qwen2VLAProcess` makes them, for the collator.

    Raises:
        UserError: if the images' tokens and the answer do not leave a token for the prompt.
    """
    head, tokens, pictures = config.policy_head_config, int(sizes.tokens), sizes.image_tokens
    text = tokens - pictures
    if text <= sizes.answer_tokens:
        needed = pictures + sizes.answer_tokens + 1
        raise UserError(f"--tokens: expected at least {needed} for the images and the answer, found {tokens}")
    words = min(config.image_token_id, config.video_token_id, config.vision_start_token_id)
    kind = config.video_token_id if sizes.frames > 1 else config.image_token_id
    items = []
    for _ in range(count):
        ids = torch.randint(0, words, (tokens,))
        ids[1 : 1 + pictures] = kind
        labels = ids.clone()
        labels[: -sizes.answer_tokens] = IGNORE_INDEX
        items.append({
            "input_ids": ids, "labels": labels, "mm_token_type_ids": (ids == kind).long(),
            "position_ids": torch.arange(tokens).expand(3, -1),
            "image_grid_thw": torch.tensor([(1, h // 14, w // 14) for h, w in sizes.images]),
            "images": [torch.randint(0, 256, (sizes.frames, h, w, 3), dtype=torch.uint8) for h, w in sizes.images],
            "state": torch.randn(head.state_dim),
            "action": torch.rand(head.prediction_horizon, head.input_dim) * 2 - 1,
            "is_pad": torch.zeros(head.prediction_horizon, dtype=torch.bool),
        })  # fmt: skip
    return items


def collate(items: list[dict], device: str | torch.device) -> dict:
    """A batch as in training, on `device`."""
    batch = Qwen2VLADataCollatorForSupervisedDataset(pad_token_id=0)(items)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


def batch_sizes(batch: dict) -> SampleSizes:
    """Sizes of a sample of a collated batch with `images`; rows of several lengths count by their mean."""
    images, length = batch["images"], batch["input_ids"].shape[1]
    counts = batch.get("token_counts") or [length]
    return SampleSizes(
        images=tuple((image.shape[2], image.shape[3]) for image in images),
        frames=images[0].shape[1],
        tokens=sum(counts) / len(counts),
        answer_tokens=int(batch["logits_to_keep"]) - 1,
    )


@dataclass(frozen=True)
class Product:
    """`count` equal products of activations (rows, inputs) with a weight (inputs, outputs).

    source: where the activations come from: "data" never needs a gradient, "backbone" only if something in there
    trains, "part" if anything up to here does. adapter: which `--lora_module` adapts the weight.
    """

    part: str
    rows: float
    inputs: int
    outputs: int
    count: int = 1
    source: str = "part"
    adapter: str | None = None

    @property
    def flops(self) -> float:
        return 2 * self.count * self.rows * self.inputs * self.outputs


def weight_products(config: Qwen2VLAConfig, sizes: SampleSizes) -> list[Product]:
    """Every product with a weight that the forward pass of one sample needs, but those of a UNet head."""
    products = [*_vision_products(config, sizes), *_language_products(config, sizes), *_fusion_products(config)]
    return products + ([] if is_unet(config) else _scaledp_products(config))


def is_unet(config: Qwen2VLAConfig) -> bool:
    return config.policy_head_config.model_type == "unet_diffusion_policy"


def _vision_products(config: Qwen2VLAConfig, sizes: SampleSizes) -> list[Product]:
    vision, patches = config.vision_config, sum(sizes.patches)
    dim, depth, merged = vision.embed_dim, vision.depth, MERGE**2 * vision.embed_dim
    hidden = int(dim * vision.mlp_ratio)
    return [
        Product("vision", patches, 3 * TEMPORAL * PATCH**2, dim, source="data"),
        Product("vision", patches, dim, 3 * dim, depth, adapter="vit"),
        Product("vision", patches, dim, dim, depth, adapter="vit"),
        Product("vision", patches, dim, hidden, depth, adapter="vit"),
        Product("vision", patches, hidden, dim, depth, adapter="vit"),
        Product("vision", patches // MERGE**2, merged, merged),
        Product("vision", patches // MERGE**2, merged, vision.hidden_size),
    ]


def _language_products(config: Qwen2VLAConfig, sizes: SampleSizes) -> list[Product]:
    text = config.text_config
    dim, hidden, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    keys = dim // text.num_attention_heads * text.num_key_value_heads

    def product(inputs: int, outputs: int, each: int = 1) -> Product:
        return Product("language_model", sizes.tokens, inputs, outputs, each * layers, adapter="llm")

    return [
        product(dim, dim, 2),  # queries and output
        product(dim, keys, 2),
        product(dim, hidden, 2),
        product(hidden, dim),
        Product("lm_head", sizes.answer_tokens, dim, text.vocab_size, source="backbone"),
    ]


def _fusion_products(config: Qwen2VLAConfig) -> list[Product]:
    dim = config.text_config.hidden_size
    if not config.using_film:
        return []
    return [Product("fusion", 1, dim, dim, 2, source="backbone"), Product("fusion", 1, dim, dim, 4)]


def _scaledp_products(config: Qwen2VLAConfig) -> list[Product]:
    head = config.policy_head_config
    width, cond, draws = head.n_emb, head.cond_dim, head.noise_samples
    hidden, rows = int(width * head.mlp_ratio), draws * head.prediction_horizon

    def product(rows: int, inputs: int, outputs: int, count: int = 1, source: str = "part") -> Product:
        return Product("head", rows, inputs, outputs, count, source, adapter="di_head")

    return [
        product(draws, cond + head.state_dim, 1024, source="part" if config.using_film else "backbone"),
        product(draws, 1024, 1024),
        product(draws, 1024, cond),
        product(draws, cond, width),
        product(draws, 256, width, source="data"),
        product(draws, width, width),
        product(rows, head.input_dim, width, source="data"),
        product(rows, width, 4 * width, head.depth),  # queries, keys, values and output
        product(rows, width, hidden, head.depth),
        product(rows, hidden, width, head.depth),
        product(draws, width, 6 * width, head.depth),  # adaLN
        product(draws, width, 2 * width),
        product(rows, width, head.output_dim),
    ]


@functools.cache
def _unet_flops(head_json: str) -> float:
    """Of one forward pass of the UNet head: PyTorch's own count of its convolutions, on tensors without contents."""
    head = UnetDiffusionPolicyConfig(**json.loads(head_json))
    with torch.device("meta"):
        actions = torch.empty(1, head.prediction_horizon, head.input_dim)
        inputs = (
            torch.empty(1, dtype=torch.int64),
            torch.empty(1, 1, head.global_cond_dim),
            torch.empty(1, head.state_dim),
        )
        with FlopCounterMode(display=False) as counter:
            ConditionalUnet1D(head).predict_noise(actions, *inputs)
    return head.noise_samples * counter.get_total_flops()


def attention_flops(config: Qwen2VLAConfig, sizes: SampleSizes) -> dict[str, float]:
    """Queries times keys and weights times values of one sample's forward pass, by part."""
    vision, text, head = config.vision_config, config.text_config, config.policy_head_config
    flops = {
        "vision": 4 * vision.depth * vision.embed_dim * sum(patches**2 for patches in sizes.patches),
        "language_model": 4 * text.num_hidden_layers * text.hidden_size * sizes.tokens**2 / 2,
    }
    if not is_unet(config):
        flops["head"] = 4 * head.depth * head.n_emb * head.prediction_horizon**2 * head.noise_samples
    return flops


def training_flops(
    config: Qwen2VLAConfig,
    sizes: SampleSizes,
    *,
    freeze_backbone: bool = False,
    freeze_vision_tower: bool = False,
    lora_modules: tuple[str, ...] | list[str] = (),
    lora_r: int = 64,
) -> dict[str, float]:
    """Floating point operations of one training sample, forward and backward, by part (a key each of PARTS).

    With `lora_modules` the adapted parts' weights get no gradient, their adapters do. Counted as if every block of an
    adapted part passed gradients on, the first one too, which has nobody to pass them to.
    """
    lora = bool(lora_modules)
    trained = {
        "vision": not (lora or freeze_backbone or freeze_vision_tower),
        "language_model": not (lora or freeze_backbone),
        "lm_head": not (lora or freeze_backbone),
        "fusion": True,
        "head": "di_head" not in lora_modules,
    }
    vision_passes = trained["vision"] or "vit" in lora_modules
    backbone_passes = vision_passes or trained["language_model"] or "llm" in lora_modules
    passes = {"vision": vision_passes, "language_model": backbone_passes, "lm_head": backbone_passes}
    needed = {"data": lambda _: False, "backbone": lambda _: backbone_passes, "part": lambda p: passes.get(p, True)}
    flops = dict.fromkeys(PARTS, 0.0)
    for product in weight_products(config, sizes):
        gradients = needed[product.source](product.part) + trained[product.part]
        flops[product.part] += product.flops * (1 + gradients)
        if product.adapter in lora_modules:
            flops[product.part] += 3 * 2 * product.count * product.rows * lora_r * (product.inputs + product.outputs)
    if is_unet(config):
        flops["head"] = 3 * _unet_flops(config.policy_head_config.to_json_string(use_diff=False))
    for part, forward in attention_flops(config, sizes).items():
        flops[part] += forward * (3 if passes.get(part, True) else 1)
    return flops


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second of a device by its name, as CUDA and CANN say it, None if unknown."""
    for pattern, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{pattern}\b(?! Laptop| D\b| Ti\b)", device_name):
            return flops
    return None
