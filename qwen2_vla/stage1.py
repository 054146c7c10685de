"""Stage-1 weights: a policy head that was trained before it met the language model."""

import os

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from data_utils.errors import UserError
from policy_heads import HEAD_CLASSES

# What a stage-1 head may lack: these layers belong to a robot or to the language model it did not have
STAGE1_OPTIONAL = ("combine.", "cond_obs_emb.", "x_embedder.", "final_layer.linear.", "norm_after_pool.")


def read_stage1_head(path: str, head_config: PreTrainedConfig) -> tuple[dict[str, torch.Tensor], str]:
    """Reads stage-1 weights, `.ckpt` (`nets.nets`) or `.safetensors`, for a policy head that need not exist yet.

    Returns:
        the head's tensors under its own names, for `load_state_dict(…, strict=False)`; a line that says how many
        tensors are taken, dropped and left at their initial value.

    Raises:
        UserError: for an unreadable file, or naming the shapes when depth, width or horizon do not fit.
    """
    stored = _read_stage1(path)
    found = {
        name.removeprefix("noise_pred_net."): tensor
        for name, tensor in stored.items()
        if "noise_pred" in name and "cond_obs_emb" not in name
    }
    with torch.device("meta"):  # by its class, since under ZeRO-3 AutoModel would shard it
        own = HEAD_CLASSES[head_config.model_type](head_config).state_dict()
    wrong = [
        f"{name}: expected {tuple(own[name].shape) if name in own else 'no such tensor'}, found {tuple(tensor.shape)}"
        for name, tensor in found.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    wrong += [
        f"{name}: expected {tuple(tensor.shape)}, found nothing"
        for name, tensor in own.items()
        if name not in found and not name.startswith(STAGE1_OPTIONAL)
    ]
    if wrong:
        raise UserError(
            f"--pretrain_dit_path {path} does not fit the policy head ({len(wrong)} tensors). Is --policy_head_size or "
            f"--chunk_size another one? {'; '.join(wrong[:4])}"
        )
    return found, (
        f"stage-1 head {path}: {len(found)} tensors taken, {len(stored) - len(found)} dropped, "
        f"{len(own) - len(found)} left at their initial value"
    )


def load_stage1_head(head: nn.Module, tensors: dict[str, torch.Tensor]):
    """Puts what `read_stage1_head` returned into the model's policy head, also when ZeRO-3 has sharded it."""
    if not is_deepspeed_zero3_enabled():
        head.load_state_dict(tensors, strict=False)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(head.parameters()), modifier_rank=0):
        head.load_state_dict(tensors, strict=False)


def _read_stage1(path: str) -> dict[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise UserError(f"--pretrain_dit_path: expected a .ckpt or .safetensors file, found none at {path}")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError
        raise UserError(f"--pretrain_dit_path {path}: expected a file of tensors, found {error}") from error
    for _ in range(2):
        stored = stored.get("nets", {}) if isinstance(stored, dict) else {}
    tensors = {name: tensor for name, tensor in stored.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise UserError(f"--pretrain_dit_path {path}: expected weights under ['nets']['nets'], found none")
    return tensors
