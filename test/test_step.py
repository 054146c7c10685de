"""The training step's own forward pass: the numbers of transformers' one, with fewer calls and without waiting."""

import copy

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from data_utils import EpisodicDataset, Qwen2VLADataCollatorForSupervisedDataset, get_norm_stats
from qwen2_vla import Qwen2VLAConfig, Qwen2VLAProcess, Qwen2VLForConditionalGenerationForVLA
from qwen2_vla.text import FusedRMSNorm

from .helpers import CAMERAS, EPISODES, GOLDEN, relative_error

STATS = get_norm_stats(EPISODES)
INPUTS = [
    pytest.param({"wrist": (84, 56)}, id="equal sizes"),
    pytest.param({"wrist": (56, 84)}, id="two sizes"),
    pytest.param({"wrist": (56, 84), "frames": 3}, id="videos"),
]


def make_batch(processor, wrist=(56, 56), size=(84, 56), frames=1, chunk=8, indices=(2, 15, 25)) -> dict:
    process = Qwen2VLAProcess(processor, CAMERAS, image_size_wrist=wrist)
    data = EpisodicDataset(
        EPISODES, CAMERAS, STATS, chunk, image_size_stable=size, history_images_length=frames, transform=process
    )
    collator = Qwen2VLADataCollatorForSupervisedDataset(pad_token_id=processor.tokenizer.pad_token_id)
    return collator([data[i] for i in indices])


def without_positions(batch: dict) -> dict:
    """What makes the model take transformers' way."""
    return {key: value for key, value in batch.items() if key != "position_ids"}


def train_once(model, batch):
    torch.manual_seed(0)
    out = model(**batch)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return torch.stack([out.loss, out.llm_loss, out.action_loss]).detach(), out.condition.detach(), gradients


@pytest.mark.parametrize("inputs", INPUTS)
def test_positions_as_transformers_counts_them(processor, model, inputs):
    batch = make_batch(processor, **inputs)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    expected, _ = model.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
    present = batch["attention_mask"].bool()
    assert not present.all()  # rows of several lengths, or padding would not be tested
    assert torch.equal(batch["position_ids"][:, present], expected[:, present])


@pytest.mark.parametrize("inputs", INPUTS)
def test_losses_and_gradients_as_transformers_computes_them(processor, model, inputs, monkeypatch):
    batch = make_batch(processor, **inputs)
    losses, condition, gradients = train_once(model, batch)
    monkeypatch.setattr(model, "encode", None)  # the other way must not come by here
    for module in model.modules():
        if type(module) is FusedRMSNorm:
            module.__class__ = Qwen2VLRMSNorm
    expected_losses, expected_condition, expected = train_once(model, without_positions(batch))
    assert relative_error(losses, expected_losses) < 1e-5 and relative_error(condition, expected_condition) < 1e-5
    assert gradients.keys() == expected.keys()
    worst = max(gradients, key=lambda name: relative_error(gradients[name], expected[name]))
    assert relative_error(gradients[worst], expected[worst]) < 1e-4, worst


def test_padding_on_either_side(processor, model):
    batch = make_batch(processor)
    padding = (batch["attention_mask"] == 0).sum(dim=1)
    right = dict(batch)
    for name in ("input_ids", "attention_mask", "position_ids"):
        rows = [row.roll(-int(n), dims=-1) for row, n in zip(batch[name].unbind(-2), padding)]
        right[name] = torch.stack(rows, dim=-2)
    encode = [model.encode(b["input_ids"], b["attention_mask"], b["position_ids"], b["images"]) for b in (batch, right)]
    for i, n in enumerate(padding.tolist()):
        assert n == 0 or torch.allclose(encode[0][i, :-n], encode[1][i, :-n], atol=1e-5)


def test_padding_to_a_multiple_changes_nothing(processor, model):
    batch = make_batch(processor)
    collate = Qwen2VLADataCollatorForSupervisedDataset(processor.tokenizer.pad_token_id, pad_to_multiple_of=32)
    process = Qwen2VLAProcess(processor, CAMERAS, image_size_wrist=(56, 56))
    data = EpisodicDataset(EPISODES, CAMERAS, STATS, 8, image_size_stable=(84, 56), transform=process)
    longer = collate([data[i] for i in (2, 15, 25)])
    assert longer["input_ids"].shape[1] % 32 == 0 and longer["input_ids"].shape != batch["input_ids"].shape
    assert longer["position_ids"].shape == (3, *longer["input_ids"].shape)
    assert relative_error(train_once(model, longer)[0], train_once(model, batch)[0]) < 1e-5


def test_compiled_blocks_give_the_same_numbers(processor, model):
    batch = make_batch(processor)
    expected = train_once(model, batch)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend="aot_eager")  # all of the compiler but its code generation, which takes a minute
    losses, _, gradients = train_once(model, batch)
    assert relative_error(losses, expected[0]) < 1e-5
    assert all(relative_error(gradients[name], expected[2][name]) < 1e-4 for name in gradients)


def test_eager_attention_goes_transformers_way(processor):
    batch = make_batch(processor)
    losses = []
    for implementation in ("sdpa", "eager"):
        model = Qwen2VLForConditionalGenerationForVLA.from_pretrained(
            GOLDEN / "checkpoint", dtype=torch.float32, attn_implementation=implementation
        )
        losses.append(train_once(model, batch)[0])
    assert relative_error(losses[1], losses[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    plain = Qwen2VLRMSNorm(16)
    torch.nn.init.normal_(plain.weight)
    fast = copy.deepcopy(plain)
    fast.__class__ = FusedRMSNorm
    x = torch.randn(3, 5, 16, dtype=dtype)
    results = []
    for norm in (plain.to(dtype), fast.to(dtype)):
        own = x.clone().requires_grad_()
        norm(own).square().sum().backward()
        results.append((norm(own).detach(), own.grad, norm.weight.grad))
    for got, want in zip(results[1], results[0]):
        assert got.dtype == want.dtype and relative_error(got, want) < (1e-5 if dtype == torch.float32 else 2e-2)


class HostWork(TorchDispatchMode):
    """Counts what the host asks of the device, and the places where it must wait for an answer."""

    WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.item")

    def __init__(self):
        super().__init__()
        self.calls, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if str(func).startswith(self.WAITS):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


def deep_model() -> Qwen2VLForConditionalGenerationForVLA:
    """As many layers as the full-size model has, narrow ones."""
    config = Qwen2VLAConfig.from_pretrained(GOLDEN / "checkpoint")
    text = config.text_config
    text.num_hidden_layers, text.layer_types = 28, ["full_attention"] * 28
    config.vision_config.depth = 32
    config.policy_head_config.depth = 32
    return Qwen2VLForConditionalGenerationForVLA(config).float().train()


def test_a_step_never_waits_and_asks_little(processor):
    model, batch = deep_model(), make_batch(processor, size=(56, 56), indices=range(0, 24, 2))
    with HostWork() as work:
        model(**batch).loss.backward()
    assert work.waits == [] and work.calls <= 12_000


@pytest.mark.gpu
def test_a_step_never_waits_on_a_gpu(processor):
    model, batch = deep_model().cuda(), make_batch(processor, size=(56, 56))
    batch = send_to_device(batch, "cuda")
    model(**batch).loss.backward()  # builds what is built once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
