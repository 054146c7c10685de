"""QWen2VLATrainer on the oracle's batch: updates, precision, learning rates, evaluation, averaged weights."""

import pytest
import torch

from data_utils import Qwen2VLADataCollatorForSupervisedDataset
from qwen2_vla import QWen2VLATrainer, Qwen2VLForConditionalGenerationForVLA
from qwen2_vla.arguments import TrainingArguments
from qwen2_vla.ema import EMACallback
from qwen2_vla.loading import build_config, load_model

from .helpers import GOLDEN, golden_batch, relative_error
from .test_training import LOSSES


@pytest.fixture
def make_trainer(model, tmp_path):
    def make(data, **options) -> QWen2VLATrainer:
        settings = {"output_dir": tmp_path, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1}
        callbacks = options.pop("callbacks", None)
        args = TrainingArguments(
            **{key: str(v) if key == "output_dir" else v for key, v in (settings | options).items()}
        )
        return QWen2VLATrainer(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=Qwen2VLADataCollatorForSupervisedDataset(pad_token_id=376),
            callbacks=callbacks,
        )

    return make


def golden_items(rows: list[int]) -> list[dict]:
    """Rows of the oracle's batch as items, all with row 0's text so that every answer has the same length."""
    batch = golden_batch()
    patches = batch["pixel_values"].chunk(3)
    grids = batch["image_grid_thw"].chunk(3)
    return [
        {
            "input_ids": batch["input_ids"][0],
            "labels": batch["labels"][0],
            "mm_token_type_ids": (batch["input_ids"][0] == 387).long(),
            "pixel_values": patches[row],
            "image_grid_thw": grids[row],
            "state": batch["states"][row],
            "action": batch["actions"][row],
            "is_pad": batch["is_pad"][row],
        }
        for row in rows
    ]


def test_accumulation_gives_the_same_update(make_trainer, model, monkeypatch):
    """1 x 4 and 4 x 1: equal parameters after a step, given the same noise for the same item."""
    start = {name: p.clone() for name, p in model.state_dict().items()}
    randn, randint = torch.randn, torch.randint
    monkeypatch.setattr(torch, "randn", lambda size, **_: torch.full(size, 0.3))
    monkeypatch.setattr(torch, "randint", lambda low, high, size, **_: torch.full(size, 40))
    updates = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model.load_state_dict(start)
        trainer = make_trainer(
            golden_items([0, 1, 2, 0]),
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
        )  # fmt: skip
        trainer.train()
        updates.append(torch.cat([(p - start[name]).flatten() for name, p in model.state_dict().items()]))
        logged = [entry for entry in trainer.state.log_history if "loss" in entry][0]
        assert logged["loss"] == pytest.approx(logged["llm_loss"] + logged["action_loss"], rel=1e-3)
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch, "randint", randint)
    assert updates[0].norm() > 0 and relative_error(updates[1], updates[0]) < 1e-4


def test_bf16_keeps_fp32_master_weights(make_trainer, model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(golden_items([0, 1]), bf16=True, learning_rate=2e-5, lr_scheduler_type="constant").train()
    moved = [
        name for name, p in model.named_parameters() if p.dtype == torch.float32 and not torch.equal(p, before[name])
    ]
    assert len(moved) > 0.8 * len(before)  # in bf16, 2e-5 would be rounded away
    steps = max((p - before[name]).abs().max().item() for name, p in model.named_parameters())
    assert steps < 1e-4


def test_head_learning_rate(make_trainer, model):
    trainer = make_trainer(golden_items([0]), learning_rate=1e-5, non_lora_lr=1e-3, weight_decay=0.1)
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    for name, p in model.named_parameters():
        head = name.startswith(("policy_head", "input_action_proj", "reasoning_"))
        assert rates[id(p)] == (1e-3 if head else 1e-5), name


def test_evaluation_repeats_itself_and_leaves_the_random_state(make_trainer):
    trainer = make_trainer(golden_items([0, 1, 2]))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = trainer.evaluate(golden_items([0, 1, 2]))
    assert torch.equal(torch.get_rng_state(), state)
    second = trainer.evaluate(golden_items([0, 1, 2]))
    for name in LOSSES:
        assert first[f"eval_{name}"] == second[f"eval_{name}"] > 0


def test_ema_follows_the_weights(make_trainer, model):
    ema = EMACallback()
    assert ema.decay(1) == pytest.approx(1 - 2**-0.75) and ema.decay(10**9) == 0.9999
    snapshots = []

    class Snapshot(EMACallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            snapshots.append({name: p.detach().clone() for name, p in model.named_parameters()})

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = golden_items([0, 1])
    make_trainer(data, callbacks=[ema, Snapshot()], max_steps=3, learning_rate=1e-2).train()
    name = "input_action_proj.mlps.0.weight"
    expected = start[name]
    for step, snapshot in enumerate(snapshots, start=1):
        expected = expected * ema.decay(step) + snapshot[name] * (1 - ema.decay(step))
    assert torch.allclose(dict(zip(ema.names, ema.average))[name], expected, atol=1e-6)
    assert not torch.equal(expected, snapshots[-1][name])


def test_weights_are_loaded_in_fp32(tiny_base):
    bf16 = Qwen2VLForConditionalGenerationForVLA.from_pretrained(GOLDEN / "checkpoint", dtype=torch.bfloat16)
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}
    config = build_config(tiny_base, depth=1, width=64, num_heads=4)
    assert {p.dtype for p in load_model(tiny_base, config).parameters()} == {torch.float32}
