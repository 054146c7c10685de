"""From a folder to a model ready to be trained: configuration, weights, frozen parts, adapters."""

import importlib.util
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoProcessor,
    BitsAndBytesConfig,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import is_flash_attn_2_available, is_torch_npu_available

from data_utils.errors import UserError
from policy_heads import SCALEDP_SIZES

from .adapters import (
    ADAPTED_HEAD,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    REFERENCE_REST,
    attach_adapters,
    base_folder,
    fill,
    has_adapters,
    read_tensors,
)
from .configuration_qwen2_vla import Qwen2VLAConfig
from .ema import EMA_FILE
from .modeling_qwen2_vla import VLA_MODULES, Qwen2VLForConditionalGenerationForVLA

NF4_BLOCK = 64  # weights that share a constant; bitsandbytes rounds layers of other widths wrongly on the CPU


def check_model_folder(folder: str | None, flag: str = "--model_name_or_path", base: str | None = None):
    """Raises UserError unless `folder` holds configuration, whole weights, processor and tokenizer; adapters may leave
    the last two to their base model (`base`, if it is not the one they name), which is checked as well."""
    if not folder:
        raise UserError(f"{flag}: expected a folder with Qwen2-VL or a DexVLA checkpoint, found nothing")
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{flag}: expected a folder, found none at {folder} (see `hf download --help`)")
    required = {
        "configuration (config.json)": ["config.json"],
        "weights (*.safetensors or pytorch_model*.bin)": ["*.safetensors", "pytorch_model*.bin"],
        "processor (preprocessor_config.json or processor_config.json)": ["*processor_config.json"],
        "tokenizer (tokenizer.json, or vocab.json and merges.txt)": ["tokenizer.json", "vocab.json"],
    }
    if has_adapters(folder):
        check_model_folder(base_folder(folder, base), f"{flag} {folder}: its base model")
        required = {"configuration (config.json)": ["config.json"], " or ".join(ADAPTER_WEIGHTS): ADAPTER_WEIGHTS}
    elif (path / REFERENCE_REST).exists():
        raise UserError(f"{flag} {folder}: expected {ADAPTER_CONFIG} beside {REFERENCE_REST}, found none")
    for what, patterns in required.items():
        if not any(any(path.glob(pattern)) for pattern in patterns):
            raise UserError(f"{flag} {folder}: expected {what}, found none")
    shards = set(path.glob("*.safetensors"))
    for index in path.glob("*.safetensors.index.json"):
        shards |= {path / name for name in json.loads(index.read_text())["weight_map"].values()}
    for shard in sorted(shards):
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{flag} {folder}: {shard.name}: expected whole weights, found {error}") from error


def load_processor(folder: str, base: str | None = None) -> ProcessorMixin:
    """Image processor, tokenizer and chat template; of the base model (`base`, or the one that is named there) where a
    folder of adapters has none."""
    needed = ("*processor_config.json", "tokenizer.json"), ("*processor_config.json", "vocab.json")
    if has_adapters(folder) and not any(all(any(Path(folder).glob(name)) for name in names) for names in needed):
        return load_processor(base_folder(folder, base))
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {folder}: expected a Qwen2-VL processor, found {error}") from error
    if not getattr(processor, "chat_template", None):
        raise UserError(f"--model_name_or_path {folder}: expected a processor with a chat template, found none")
    return processor


def build_config(
    folder: str,
    *,
    head_type: str = "scale_dp_policy",
    head_size: str | None = None,
    depth: int | None = None,
    width: int | None = None,
    num_heads: int | None = None,
    chunk_size: int = 16,
    action_dim: int = 14,
    state_dim: int = 14,
    noise_samples: int = 1,
    is_tinyvla: bool = False,
    using_film: bool = True,
    llm_loss_weight: float = 1.0,
    data_config: dict | None = None,
) -> Qwen2VLAConfig:
    """The configuration in `folder`, with a policy head as asked for; a head that is there already must be like it.

    Raises:
        UserError: for an unknown head or size, or naming each setting in which folder and flags differ.
    """
    try:
        config = Qwen2VLAConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {folder}: expected a Qwen2-VL config.json, found {error}") from error
    head = {"model_type": head_type, "action_dim": action_dim, "state_dim": state_dim, "noise_samples": noise_samples}
    dim, present = config.text_config.hidden_size, config.policy_head_config
    head["prediction_horizon"] = chunk_size
    if present is not None:
        head |= {key: getattr(present, key) for key in ("num_train_timesteps", "num_inference_timesteps")}
    if is_tinyvla and (using_film or head_type != "scale_dp_policy"):
        raise UserError("--is_tinyvla True: expected --using_film False and --policy_head_type scale_dp_policy too")
    if head_type == "scale_dp_policy":
        if head_size is not None and head_size not in SCALEDP_SIZES:
            raise UserError(f"--policy_head_size: expected one of {', '.join(SCALEDP_SIZES)}, found {head_size}")
        head |= {"cond_dim": dim, "is_tinyvla": is_tinyvla, "depth": depth, "n_emb": width, "num_heads": num_heads}
        if head_size is None and present is not None and present.model_type == head_type:
            same = {key: getattr(present, key) for key in ("depth", "n_emb", "num_heads")}
            head |= {key: value for key, value in same.items() if head[key] is None}
            head["mlp_ratio"] = present.mlp_ratio
        named = config.policy_head_size if config.policy_head_size in SCALEDP_SIZES else "ScaleDP_H"
        head["model_size"] = head_size or named
    elif head_type == "unet_diffusion_policy":
        head |= {"global_cond_dim": dim}
        if present is not None and present.model_type == head_type:
            keys = ("down_dims", "kernel_size", "n_groups", "diffusion_step_embed_dim")
            head |= {key: getattr(present, key) for key in keys}
    else:
        raise UserError(f"--policy_head_type: expected scale_dp_policy or unet_diffusion_policy, found {head_type}")

    had_film = config.using_film
    try:
        config.policy_head_config = head
    except ValueError as error:
        raise UserError(f"policy head: {error}") from error
    config.policy_head_type, config.using_film = head_type, using_film
    config.policy_head_size = head.get("model_size")
    config.llm_loss_weight, config.data_config = llm_loss_weight, data_config
    if not using_film and head_type == "scale_dp_policy" and not is_tinyvla:
        raise UserError(
            "--using_film False: expected --is_tinyvla True too, or --policy_head_type unet_diffusion_policy"
        )
    if present is not None:
        _check_same_head(folder, present, config.policy_head_config, had_film, using_film)
    return config


def _check_same_head(folder: str, present, wanted, had_film: bool, using_film: bool):
    flags = {
        "model_type": "--policy_head_type",
        "depth": "--policy_head_size",
        "n_emb": "--policy_head_size",
        "num_heads": "--policy_head_size",
        "prediction_horizon": "--chunk_size",
        "input_dim": "--action_dim",
        "state_dim": "--state_dim",
        "is_tinyvla": "--is_tinyvla",
    }
    differences = [
        f"{name} {getattr(present, name, None)} (asked for: {getattr(wanted, name, None)}, {flag})"
        for name, flag in flags.items()
        if getattr(present, name, None) != getattr(wanted, name, None)
    ]
    if had_film != using_film:
        differences.append(f"using_film {had_film} (asked for: {using_film}, --using_film)")
    if differences:
        raise UserError(f"--model_name_or_path {folder} holds a policy head with {', '.join(differences)}")


def check_requirements(*, lora_modules: list[str], bits: int, ema: bool = False):
    """Raises UserError when a package is missing for what is asked, or ZeRO-3 does not go with it."""
    lora = bool(lora_modules)
    if is_deepspeed_zero3_enabled():
        adapted_head = "di_head" in lora_modules
        for asked, flag in (
            (bits < 16, f"--bits {bits}"),
            (ema, "--using_ema"),
            (adapted_head, "--lora_module di_head"),
        ):
            if asked:
                raise UserError(f"{flag}: expected ZeRO-2 or no DeepSpeed, found ZeRO-3, which shards the weights")
    for needed, package, flag in ((lora, "peft", "--lora_enable"), (bits < 16, "bitsandbytes", f"--bits {bits}")):
        if needed and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag}: expected the package {package}, found it not installed (pip install {package})")


def choose_attention(flash_attn: bool) -> str:
    """The attention implementation, and a line if it is not the one asked for."""
    if flash_attn and (is_flash_attn_2_available() or is_torch_npu_available()):
        return "flash_attention_2"
    if flash_attn:
        print("--flash_attn True: the package flash_attn is not installed, PyTorch's SDPA takes its place")
    return "sdpa"


def load_model(
    folder: str,
    config: Qwen2VLAConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    bits: int = 16,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    base: str | None = None,
    ema: bool = False,
) -> Qwen2VLForConditionalGenerationForVLA:
    """Loads weights in `dtype`: fp32 for training, since a bf16 parameter does not move under a learning rate of 2e-5.

    A folder with LoRA adapters, ours or the reference's, is merged into its base model: `base`, or the one it names.
    With `bits` 4 or 8 the backbone's Linear layers are quantised. `ema`: with the averaged weights of the checkpoint.

    Raises:
        UserError: when adapters or averaged weights are not there or not this model's, or cannot be merged here.
    """
    if has_adapters(folder):
        model = _load_and_merge(folder, config, attn_implementation, bits, base, ema).to(dtype)
    else:
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        if config is not None:
            options["config"] = config
        if bits < 16:
            options["device_map"] = {"": device or "cpu"}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=bits == 4,
                load_in_8bit=bits == 8,
                llm_int8_skip_modules=[*VLA_MODULES, "lm_head", *(_narrow_layers(folder, config) if bits == 4 else [])],
                bnb_4bit_compute_dtype=compute_dtype,
                bnb_4bit_use_double_quant=double_quant,
                bnb_4bit_quant_type=quant_type,
            )
        model = Qwen2VLForConditionalGenerationForVLA.from_pretrained(folder, **options)
        if ema:
            _load_average(model, folder)
    # where adapters trained on this model will find it again
    model.name_or_path = os.path.abspath(folder)
    return model


def _narrow_layers(folder: str, config: Qwen2VLAConfig | None) -> list[str]:
    """Layers of the backbone that 4 bits do not fit, and a line that says so."""
    with torch.device("meta"):
        model = Qwen2VLForConditionalGenerationForVLA(config or Qwen2VLAConfig.from_pretrained(folder))
    narrow = [
        name
        for name, layer in model.model.named_modules(prefix="model")
        if isinstance(layer, nn.Linear) and layer.in_features % NF4_BLOCK
    ]
    if narrow:
        print(
            f"--bits 4: {len(narrow)} layers stay as they are, their width is no multiple of {NF4_BLOCK}: "
            f"{', '.join(narrow[:3])}{', …' if len(narrow) > 3 else ''}"
        )
    return narrow


def _load_and_merge(
    folder: str, config: Qwen2VLAConfig | None, attn_implementation: str, bits: int, base: str | None, ema: bool
) -> Qwen2VLForConditionalGenerationForVLA:
    """Base and adapters as one model, fp32; the base may itself be a folder of adapters."""
    advice = f"python -m qwen2_vla.merge {folder} --output FOLDER makes one of it"
    if bits < 16:
        raise UserError(
            f"--bits {bits}: expected a plain checkpoint, found the adapters of a LoRA run in {folder}; {advice}"
        )
    if is_deepspeed_zero3_enabled():
        raise UserError(f"{folder}: expected a plain checkpoint for ZeRO-3, found the adapters of a LoRA run; {advice}")
    source = base_folder(folder, base)
    config = config or Qwen2VLAConfig.from_pretrained(folder)
    model = load_model(source, config, attn_implementation=attn_implementation)
    base_has_head = Qwen2VLAConfig.from_pretrained(source).policy_head_config is not None
    model = attach_adapters(model, folder, base_has_head=base_has_head)
    if ema:
        _load_average(model, folder)
    return model.merge_and_unload().requires_grad_(True)  # peft froze the base model


def _load_average(model: nn.Module, folder: str):
    path = os.path.join(folder, EMA_FILE)
    if not os.path.isfile(path):
        raise UserError(f"{folder}: expected averaged weights ({EMA_FILE}, of training with --using_ema), found none")
    fill(model, read_tensors(path), path)


def merge_adapters(folder: str):
    """Turns a folder of adapters into a plain checkpoint, in place. One rank does it, after training. Whenever it is
    killed, the folder is either."""
    unset_hf_deepspeed_config()  # under ZeRO-3 loading would wait for the other ranks
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merged") as beside:
        load_model(folder).save_pretrained(beside)
        for path in Path(beside).iterdir():
            os.replace(path, Path(folder, path.name))
    for name in (ADAPTER_CONFIG, ADAPTED_HEAD, "adapter_model.safetensors", "README.md"):
        Path(folder, name).unlink(missing_ok=True)


def load_weights(model: Qwen2VLForConditionalGenerationForVLA, folder: str):
    """Overwrites the model's weights with those of a checkpoint folder, shard by shard.

    Raises:
        UserError: naming weights that are missing or unexpected.
    """
    missing, unexpected = set(model.state_dict()), set()
    for shard in sorted(Path(folder).glob("model*.safetensors")):
        result = model.load_state_dict(load_file(shard), strict=False)
        missing &= set(result.missing_keys)
        unexpected |= set(result.unexpected_keys)
    if missing or unexpected:
        raise UserError(
            f"checkpoint {folder} does not fit this model: {len(missing)} weights are missing, {len(unexpected)} "
            f"unexpected: {', '.join(sorted(missing | unexpected)[:5])}"
        )


def freeze(model: Qwen2VLForConditionalGenerationForVLA, *, backbone: bool = False, vision_tower: bool = False):
    """Freezes the whole Qwen2-VL or its vision tower. Policy head and fusion always train."""
    if backbone:
        model.model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    if vision_tower:
        model.model.visual.requires_grad_(False)
    if not model.config.using_film:
        model.input_action_proj.requires_grad_(False)  # part of the format, but unused without FiLM
