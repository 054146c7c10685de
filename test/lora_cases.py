"""Shared by the tests of adapters: a small batch and model, training, and a LoRA output as the reference writes it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen2_vla.adapters import lora_targets
from qwen2_vla.loading import build_config, load_model
from qwen2_vla.modeling_qwen2_vla import VLA_MODULES

from .helpers import CAMERAS, HEAD, old_name

DATA = {
    "camera_names": CAMERAS, "image_size_stable": [56, 56], "image_size_wrist": [56, 56], "use_reasoning": True,
    "delta_control": False, "augment": True,
}  # fmt: skip


def text_batch() -> dict:
    """Two samples without images."""
    ids = torch.arange(12).view(2, 6) + 40
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.where(torch.arange(6) > 2, -100),
        "states": torch.linspace(-1, 1, 28).view(2, 14), "is_pad": torch.zeros(2, 8, dtype=torch.bool),
        "actions": torch.linspace(-1, 1, 2 * 8 * 14).view(2, 8, 14).sin(),
    }  # fmt: skip


def loss_of(model, batch: dict) -> torch.Tensor:
    torch.manual_seed(0)
    return model(**batch).loss


def train_steps(model, batch: dict, steps: int, lr: float = 1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(model, expected: dict[str, torch.Tensor], atol: float = 1e-6):
    own = model.state_dict()
    assert own.keys() == expected.keys()
    assert not [name for name in own if not torch.allclose(own[name], expected[name], atol=atol)]


def small_training(model: str | Path, task: str, output: Path, **flags) -> list[str]:
    settings = {
        "model_name_or_path": model, "task_name": task, "output_dir": output, "policy_head_depth": 1,
        "policy_head_width": 64, "policy_head_heads": 4, "chunk_size": 8, "image_size_stable": "(56,56)",
        "image_size_wrist": "(56,56)", "use_reasoning": True, "use_cpu": True, "max_steps": 2, "report_to": "none",
        "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True,
    }  # fmt: skip
    return [part for name, value in (settings | flags).items() for part in (f"--{name}", str(value))]


def write_reference_output(
    folder: Path,
    base: str,
    *,
    modules: list[str],
    suffix: str = ".bin",
    targets="names",
    prefix: str = "base_model.model.",
) -> dict[str, torch.Tensor]:
    """A folder as the reference writes it, of random weights; returns the weights it must have when merged."""
    torch.manual_seed(1)
    config = build_config(base, **HEAD, data_config=DATA)
    model = load_model(base, config)
    for name, p in model.named_parameters():
        if name.startswith(VLA_MODULES):
            torch.nn.init.normal_(p, std=0.02)
    r, alpha = 4, 16
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(VLA_MODULES)}
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters, layers = {}, lora_targets(model, modules)
    for layer in layers:
        weight = expected[f"{layer}.weight"]
        a, b = 0.1 * torch.randn(r, weight.shape[1]), 0.1 * torch.randn(weight.shape[0], r)
        weight += alpha / r * b @ a
        adapters |= {f"base_model.model.{old_name(layer)}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
        if layer.startswith("policy_head."):  # what is under an adapter has its name from peft
            for part in ("weight", "bias"):
                rest[f"{layer}.base_layer.{part}"] = rest.pop(f"{layer}.{part}")
    forms = {
        "names": [old_name(layer) for layer in layers],
        "endings": sorted({layer.rpartition(".")[2] for layer in layers}),
        "pattern": r"(visual\.blocks|model\.layers)\.\d+\.(attn|mlp|self_attn)\.\w+",
    }
    folder.mkdir()
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": r, "lora_alpha": alpha,
        "lora_dropout": 0.05, "bias": "none", "inference_mode": True, "modules_to_save": None,
        "target_modules": forms[targets],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save = torch.save if suffix == ".bin" else save_file
    save(adapters, folder / f"adapter_model{suffix}")
    torch.save({prefix + name: tensor for name, tensor in rest.items()}, folder / "non_lora_trainables.bin")
    config.save_pretrained(folder)
    return expected
