"""`--gradient_checkpointing auto`: activations are recomputed only where they would not fit."""

import torch

from .arguments import TrainingArguments
from .configuration_qwen2_vla import Qwen2VLAConfig
from .flops import SampleSizes
from .memory import GIB, Plan, estimate


def planned(args: TrainingArguments) -> Plan:
    """What the memory estimate needs to know of a run."""
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    zero = deepspeed.config.get("zero_optimization", {}) if deepspeed else {}
    mode = "full" if not args.lora_enable else "lora" if args.bits == 16 else f"qlora{args.bits}"
    return Plan(
        batch=args.per_device_train_batch_size,
        mode=mode,
        zero=max(zero.get("stage", 0), 2) if zero.get("stage") else 0,
        offload="offload_optimizer" in zero,
        gpus=args.world_size,
        optimizer="adamw8bit" if "8bit" in args.optim else "adamw",
        freeze_vision_tower=args.freeze_vision_tower or args.freeze_backbone,
        using_ema=args.using_ema,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        lora_r=args.lora_r,
    )


def choose_checkpointing(args: TrainingArguments, config: Qwen2VLAConfig, sizes: SampleSizes) -> tuple[bool, str]:
    """Whether to recompute activations, and a line that says why."""
    if args.device.type == "cpu":
        return False, "--gradient_checkpointing auto: off, training on the CPU"
    _, there = torch.get_device_module(args.device).mem_get_info(args.device)
    needed = estimate(config, planned(args), sizes)["total"]
    wanted = needed > there
    return wanted, (
        f"--gradient_checkpointing auto: {'on' if wanted else 'off'}, without it training needs about "
        f"{needed / GIB:.0f} of {there / GIB:.0f} GiB"
    )
