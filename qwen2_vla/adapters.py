"""LoRA adapters (Hu et al., arXiv 2106.09685): which layers get them, and a folder of them as part of a model again.

Two kinds of folders are read: our own, and the reference's, which has head and fusion in `non_lora_trainables.bin`.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from data_utils.errors import UserError

from .modeling_qwen2_vla import VLA_MODULES, Qwen2VLForConditionalGenerationForVLA

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# The frozen weights under a head's adapters: they come from stage 1 or from initialisation, so no base folder has them
ADAPTED_HEAD = "adapted_policy_head.safetensors"
REFERENCE_REST = "non_lora_trainables.bin"
OF_THE_VLA = "|".join(VLA_MODULES)


def lora_targets(model: nn.Module, modules: list[str]) -> list[str]:
    """Names of the Linear layers that `--lora_module` means: the blocks of "vit" and "llm", all of "di_head"."""
    prefixes = {"vit": "model.visual.blocks.", "llm": "model.language_model.layers.", "di_head": "policy_head."}
    wanted = tuple(prefixes[module] for module in modules)
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.startswith(wanted)]


def add_lora(
    model: Qwen2VLForConditionalGenerationForVLA,
    modules: list[str],
    *,
    r: int = 64,
    alpha: int = 256,
    dropout: float = 0.05,
    bias: str = "none",
) -> PreTrainedModel:
    """Wraps the model in adapters; head and fusion stay fully trained and are saved with the adapters, unless "di_head"
    has the head adapted too."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import ModulesToSaveWrapper

    saved = [name for name in VLA_MODULES if hasattr(model, name)]
    if "di_head" in modules:
        saved.remove("policy_head")
    if not model.config.using_film:
        saved.remove("input_action_proj")  # unused then, see freeze
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,
        target_modules=lora_targets(model, modules),
        modules_to_save=saved,
    )
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module = nn.Identity()  # peft keeps a second copy of what it trains: 4 GB of a 1 B head
    return adapted


def halve_frozen(model: nn.Module):
    """Frozen Linear weights of the backbone in bf16. Under bf16 autocast that is what they are multiplied as anyway."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(part in name for part in (*VLA_MODULES, "lm_head")):
            for p in module.parameters(recurse=False):
                if p.dtype == torch.float32 and not p.requires_grad:
                    p.data = p.data.to(torch.bfloat16)


def plain_name(name: str) -> str:
    """A weight's or layer's name in the plain model, from what peft, DistributedDataParallel or the reference call it;
    what adapters add (`….lora_A.weight`) stays."""
    name = re.sub(r"^(module\.)?(base_model\.model\.)?", "", name)
    name = re.sub(r"\.(modules_to_save|base_layer|default)(?=\.|$)", "", name)
    name = re.sub(rf"^(model\.)+(?={OF_THE_VLA}|lm_head|visual|language_model)", "", name)
    name = re.sub(r"^(model\.)*(?=(layers|embed_tokens|norm)\.)", "language_model.", name)
    return re.sub(r"^(?=visual\.|language_model\.)", "model.", name)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str, needed: Iterable[str] = ()):
    """Copies tensors of any of the names that `plain_name` knows into the model, with adapters or without.

    Args:
        source: what to call the tensors in an error. needed: plain names that must be among them.

    Raises:
        UserError: naming weights that are missing, unexpected, there twice, or of another shape.
    """
    own = {plain_name(name): tensor for name, tensor in model.state_dict().items() if ".original_module." not in name}
    found: dict[str, Tensor] = {}
    wrong = []
    for stored_name, tensor in tensors.items():
        name = plain_name(stored_name)
        if name not in own:
            wrong.append(f"{stored_name} is unexpected")
        elif name in found:
            wrong.append(f"{stored_name} is there twice")
        elif own[name].shape != tensor.shape:
            wrong.append(f"{stored_name} has shape {tuple(tensor.shape)} instead of {tuple(own[name].shape)}")
        found[name] = tensor
    wrong += [f"{name} is missing" for name in sorted(set(needed) - found.keys())]
    if wrong:
        raise UserError(
            f"{source}: expected all that was trained, as weights of this model; {len(wrong)} are not so: "
            + "; ".join(wrong[:4])
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)


def has_adapters(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, ADAPTER_CONFIG))


def base_folder(folder: str, base: str | None = None) -> str:
    """The folder of the model under the adapters in `folder`: `base`, or the one that adapter_config.json names.

    Raises:
        UserError: when there is no such folder.
    """
    path = os.path.join(folder, ADAPTER_CONFIG)
    if base is None:
        try:
            with open(path) as file:
                base = json.load(file).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: expected the adapters' configuration, found {error}") from error
    if not base or not os.path.isdir(base) or os.path.samefile(base, folder):
        raise UserError(
            f"{folder}: expected the folder of its base model, found {base or 'none'}; name it in {ADAPTER_CONFIG} "
            f"(base_model_name_or_path), or merge once: python -m qwen2_vla.merge {folder} --base BASE --output FOLDER"
        )
    return base


def attach_adapters(model: Qwen2VLForConditionalGenerationForVLA, folder: str, *, base_has_head: bool) -> nn.Module:
    """Wraps the base model in the adapters of `folder` and takes head and fusion from there too.

    Args:
        base_has_head: whether the model's policy head comes from its folder, so that adapters alone are enough for it.

    Raises:
        UserError: naming weights that are missing, not of this model, or of another shape; for unreadable files.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder}/{ADAPTER_CONFIG}: expected LoRA adapters, found {config.peft_type}")
    tensors = _read_adapters(folder)
    # The names of the weights say more than the configuration: that has old names, their endings, or a pattern
    adapted = {plain_name(name.partition(".lora_")[0]) for name in tensors if ".lora_" in name}
    forgotten = sorted(_configured_layers(model, config) - adapted)
    config.inference_mode, config.task_type, config.init_lora_weights = False, None, True
    config.base_model_name_or_path = model.name_or_path
    config.target_modules = adapted & {name for name, _ in model.named_modules()}
    config.rank_pattern = {plain_name(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {plain_name(name): alpha for name, alpha in config.alpha_pattern.items()}
    if forgotten or not config.target_modules:
        raise UserError(
            f"{folder}: expected adapters of {', '.join(forgotten[:4]) or 'layers of this model'}, found none"
        )
    # what else must be in the folder: head and fusion, unless a head's adapters stand on the base's head
    rest = {name for name, _ in model.named_parameters() if name.startswith(VLA_MODULES)}
    if base_has_head and any(name.startswith("policy_head.") for name in adapted):
        rest = {name for name in rest if not name.startswith("policy_head.")}
    if not model.config.using_film:
        rest = {name for name in rest if not name.startswith("input_action_proj.")}  # unused then
    wrapped = get_peft_model(model, config)
    trained = {plain_name(name) for name, p in wrapped.named_parameters() if p.requires_grad}
    fill(wrapped, tensors, folder, trained | rest)
    return wrapped


def _configured_layers(model: nn.Module, config) -> set[str]:
    """The Linear layers that an adapter_config.json means, be it by names of ours, of the reference, or a pattern."""
    targets = config.target_modules
    if not targets or config.exclude_modules or config.layers_to_transform is not None:
        return set()  # left to the weights

    def is_meant(name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets)

    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return {name for name in names if is_meant(name) or is_meant(_reference_name(name))}


def _reference_name(name: str) -> str:
    return name.removeprefix("model.") if name.startswith("model.visual.") else name.replace(".language_model.", ".", 1)


def _read_adapters(folder: str) -> dict[str, Tensor]:
    """All weights in a folder of adapters: theirs, head and fusion."""
    paths = [path for path in (os.path.join(folder, name) for name in ADAPTER_WEIGHTS) if os.path.isfile(path)]
    if not paths:
        raise UserError(f"{folder}: expected {' or '.join(ADAPTER_WEIGHTS)}, found neither")
    tensors = read_tensors(paths[0])
    rest = os.path.join(folder, REFERENCE_REST)
    if os.path.isfile(rest):
        others = read_tensors(rest)
        twice = tensors.keys() & others.keys()
        if twice:
            raise UserError(f"{rest}: expected weights besides the adapters, found {min(twice)} in both")
        tensors |= others
    return tensors | {f"policy_head.{name}": tensor for name, tensor in _read_adapted_head(folder).items()}


def read_tensors(path: str) -> dict[str, Tensor]:
    """A `.safetensors` file or a torch state dict. Raises UserError for any other file; no code in it is run."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError
        raise UserError(f"{path}: expected a file of tensors, found {error}") from error
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise UserError(f"{path}: expected names and their tensors, found something else")
    return stored


def _read_adapted_head(folder: str) -> dict[str, Tensor]:
    path = os.path.join(folder, ADAPTED_HEAD)
    return read_tensors(path) if os.path.isfile(path) else {}


def save_adapted_head(model: nn.Module, folder: str):
    """Saves the frozen weights under the head's adapters; nothing to do for a head that is fully trained."""
    frozen = {
        name.partition("policy_head.")[2].replace(".base_layer.", "."): p.detach().cpu()
        for name, p in model.named_parameters()
        if "policy_head." in name and not p.requires_grad and "original_module" not in name
    }
    if frozen:
        save_file(frozen, os.path.join(folder, ADAPTED_HEAD))


def load_adapted_head(model: nn.Module, folder: str):
    """Puts back what `save_adapted_head` saved, into a plain model or one with adapters."""
    stored = {f"policy_head.{name}": tensor for name, tensor in _read_adapted_head(folder).items()}
    fill(model, stored, os.path.join(folder, ADAPTED_HEAD))
