"""--gradient_checkpointing auto."""

from types import SimpleNamespace

import pytest
import torch

from qwen2_vla.arguments import TrainingArguments
from qwen2_vla.checkpointing import choose_checkpointing, planned
from qwen2_vla.flops import SampleSizes, preset_config
from qwen2_vla.memory import Plan, estimate


def arguments(tmp_path, **flags) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **flags)


@pytest.mark.parametrize(
    "flags, changes",
    [
        ({}, {}),
        ({"per_device_train_batch_size": 4, "optim": "adamw_bnb_8bit"}, {"batch": 4, "optimizer": "adamw8bit"}),
        ({"lora_enable": True, "bits": 4, "lora_r": 8}, {"mode": "qlora4", "lora_r": 8}),
        ({"lora_enable": True}, {"mode": "lora"}),
        ({"freeze_backbone": True, "using_ema": True}, {"freeze_vision_tower": True, "using_ema": True}),
    ],
)  # fmt: skip
def test_the_estimate_is_of_this_run(tmp_path, flags, changes):
    assert planned(arguments(tmp_path, **flags)) == Plan(**{"batch": 8, "lora_r": 64} | changes)


def test_on_only_where_activations_do_not_fit(tmp_path, monkeypatch):
    config, sizes = preset_config("tiny"), SampleSizes()
    args = arguments(tmp_path, gradient_checkpointing="auto")
    assert args.checkpointing_auto and args.gradient_checkpointing is False
    assert choose_checkpointing(args, config, sizes) == (
        False,
        "--gradient_checkpointing auto: off, training on the CPU",
    )
    needed = estimate(config, planned(args), sizes)["total"]
    for there, expected in ((needed + 1, False), (needed - 1, True)):
        device = SimpleNamespace(mem_get_info=lambda _, there=there: (0, there))
        monkeypatch.setattr(torch, "get_device_module", lambda _, device=device: device)
        run = SimpleNamespace(**vars(args) | {"device": SimpleNamespace(type="cuda"), "world_size": 1})
        chosen, line = choose_checkpointing(run, config, sizes)
        assert chosen is expected and f"auto: {'on' if expected else 'off'}, without it training needs about" in line
