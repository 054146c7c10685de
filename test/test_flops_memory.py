"""What training needs, operations and bytes, against what PyTorch counts when it trains."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_step
from data_utils import UserError
from qwen2_vla import memory
from qwen2_vla.adapters import add_lora, halve_frozen
from qwen2_vla.flops import (
    SampleSizes,
    batch_sizes,
    build_model,
    collate,
    peak_flops,
    preset_config,
    synthetic_items,
    training_flops,
)
from qwen2_vla.loading import build_config, freeze, load_model
from qwen2_vla.memory import BACKWARD, Plan, count, count_saved, estimate

SMALL = SampleSizes(images=((84, 112),) * 2, tokens=60, answer_tokens=8)
UNET = {"model_type": "unet_diffusion_policy", "global_cond_dim": 128, "prediction_horizon": 48}


def counted_flops(model, batch: dict) -> float:
    """Of a sample, as PyTorch counts them in a real forward and backward pass of tensors without contents."""
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops() / len(batch["input_ids"])


def test_flops_of_the_full_size_model():
    config, sizes = preset_config("2b"), SampleSizes()
    model, batch = build_model(config, "meta"), collate(synthetic_items(config, sizes, 2), "meta")
    assert batch_sizes(batch | {"token_counts": [360, 360]}) == sizes
    flops = training_flops(config, sizes)
    assert sum(flops.values()) == pytest.approx(7.9e12, rel=0.02)
    assert sum(flops.values()) == pytest.approx(counted_flops(model, batch), rel=0.05)
    assert flops["vision"] > flops["language_model"] > flops["head"] > flops["lm_head"] > flops["fusion"] > 0


@pytest.mark.parametrize(
    "frozen",
    [
        {},
        {"freeze_vision_tower": True},
        {"freeze_backbone": True},
        {"lora_modules": ["llm"]},
        {"lora_modules": ["vit", "llm"]},
        {"lora_modules": ["vit", "llm", "di_head"]},
    ],
    ids=str,
)
def test_what_is_frozen_needs_less(frozen):
    config, sizes = preset_config("small"), SampleSizes()
    model, batch = build_model(config, "meta"), collate(synthetic_items(config, sizes, 2), "meta")
    freeze(model, backbone=frozen.get("freeze_backbone", False), vision_tower=frozen.get("freeze_vision_tower", False))
    if "lora_modules" in frozen:
        with torch.device("meta"):
            model = add_lora(model, frozen["lora_modules"])
    # meta tensors go through the plain attention, which computes the masked half of the text's pairs as well
    assert sum(training_flops(config, sizes, **frozen).values()) == pytest.approx(counted_flops(model, batch), rel=0.05)


@pytest.mark.parametrize("change", ["unet", "noise samples", "videos", "two sizes"])
def test_flops_of_other_models_and_batches(change):
    config, sizes = preset_config("tiny", chunk=48), SMALL
    if change == "unet":
        config.policy_head_config = UNET
    elif change == "noise samples":
        config.policy_head_config.noise_samples = 4
    elif change == "videos":
        sizes = SampleSizes(images=((84, 112),) * 2, frames=3, tokens=100, answer_tokens=8)
    else:
        sizes = SampleSizes(images=((84, 112), (56, 56)), tokens=60, answer_tokens=8)
    model, batch = build_model(config, "meta"), collate(synthetic_items(config, sizes, 2), "meta")
    assert batch_sizes(batch | {"token_counts": [sizes.tokens]}) == sizes
    assert sum(training_flops(config, sizes).values()) == pytest.approx(counted_flops(model, batch), rel=0.05)


def test_rows_of_several_lengths_count_by_their_mean():
    config = preset_config("tiny")
    items = [synthetic_items(config, SampleSizes(SMALL.images, tokens=n, answer_tokens=8), 1)[0] for n in (50, 60)]
    batch = collate(items, "cpu")
    assert batch_sizes(batch | {"token_counts": [50, 60]}).tokens == 55
    assert batch["input_ids"].shape == (2, 60) and batch["attention_mask"].sum() == 110


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", 71e12), ("NVIDIA RTX A6000", 154.8e12), ("Ascend910B2", 376e12),
        ("Ascend910A", 256e12), ("Tesla V100-SXM2-16GB", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peak_flops(name, flops):
    assert peak_flops(name) == flops


def real_model(config, plan: Plan):
    """What `plan` says, with contents, on the CPU."""
    model = build_model(config, "cpu", plan.dtype)
    freeze(model, vision_tower=plan.freeze_vision_tower)
    if plan.mode == "lora":
        model = add_lora(model, memory.ADAPTED, r=plan.lora_r)
        halve_frozen(model)
    if plan.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


PLANS = [
    Plan(),
    Plan(checkpointing=True),
    Plan(zero=2),
    Plan(zero=2, checkpointing=True),
    Plan(freeze_vision_tower=True),
    Plan(mode="lora", lora_r=4),
]


@pytest.mark.parametrize(
    "plan", PLANS, ids=lambda p: f"{p.mode}-zero{p.zero}-{p.checkpointing}-{p.freeze_vision_tower}"
)
def test_activations_are_what_a_real_forward_pass_keeps(plan):
    config, batch_size = preset_config("tiny", chunk=16), 3
    batch = collate(synthetic_items(config, SMALL, batch_size), "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.zero == 0):
        measured = count_saved(real_model(config, plan), batch)
    counts = count(config, plan, SMALL)
    assert sum(counts.saved(part, batch_size) for part in BACKWARD) == pytest.approx(sum(measured.values()), rel=0.1)


@pytest.mark.parametrize("plan", [Plan(batch=2), Plan(batch=2, mode="lora", lora_r=4)], ids=["full", "lora"])
def test_weights_gradients_and_optimizer_states_to_the_byte(plan):
    config = preset_config("tiny", chunk=16)
    model = real_model(config, plan)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for _ in range(2):  # in the first step the gates of the head are zero, but their gradients are there
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**collate(synthetic_items(config, SMALL, 2), "cpu")).loss
        loss.backward()
    expected = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in parameters),
    }
    optimizer.step()
    expected["optimizer"] = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    result = estimate(config, plan, SMALL)
    assert {name: result[name] for name in expected} == expected


def test_states_of_an_eight_bit_optimizer_to_the_byte():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in (100, 4095, 4096, 5000, (300, 70))]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    states = [(name, t) for state in optimizer.state.values() for name, t in state.items()]
    kept = sum(t.nbytes for name, t in states if isinstance(t, torch.Tensor) and "qmap" not in name)  # one for all
    assert memory.optimizer_bytes([p.numel() for p in parameters], "adamw8bit") == kept


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_to_the_byte(tiny_base, bits):
    pytest.importorskip("bitsandbytes")
    config = build_config(tiny_base, depth=1, width=64, num_heads=4, chunk_size=8)
    model = load_model(tiny_base, config, bits=bits, compute_dtype=torch.float32)
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    kept = 0
    for layer in layers:
        kept += layer.weight.nbytes
        if bits == 4:
            state = layer.weight.quant_state
            kept += state.absmax.nbytes + state.code.nbytes + state.offset.nbytes
            kept += state.state2.absmax.nbytes + state.state2.code.nbytes
        else:
            kept += layer.weight.SCB.nbytes
    counts = count(config, Plan(mode=f"qlora{bits}", lora_r=4), SMALL)
    assert layers and counts.quantised == kept


def test_sharing_and_offloading():
    config = preset_config("tiny", chunk=16)
    one, eight, offloaded = (
        estimate(config, Plan(**options), SMALL)
        for options in ({"zero": 2}, {"zero": 2, "gpus": 8}, {"zero": 2, "offload": True})
    )
    assert one["weights"] == eight["weights"] == offloaded["weights"]
    assert eight["optimizer"] == one["optimizer"] // 8 and eight["gradients"] == one["gradients"] // 8
    assert offloaded["optimizer"] == offloaded["gradients"] == 0 and offloaded["host"] > one["optimizer"]
    assert estimate(config, Plan(zero=3, gpus=8, offload=True), SMALL)["host"] > 0


def test_more_memory_for_more_and_less_for_less():
    config = preset_config("small")

    def total(**options) -> int:
        return estimate(config, Plan(**options), SampleSizes())["total"]

    assert total(batch=4) < total(batch=12) < total(batch=24)
    assert total(checkpointing=True) < total() < total(using_ema=True)
    assert total(optimizer="adamw8bit") < total() and total(freeze_vision_tower=True) < total()
    assert total(mode="qlora4") < total(mode="lora")
    assert total() <= total(gradient_accumulation_steps=2) <= total(gpus=2)


def test_the_command(tiny_base, capsys, tmp_path):
    flags = [
        "--model",
        tiny_base,
        "--batch",
        "4",
        "--head",
        "ScaleDP_Ti",
        "--checkpointing",
        "--zero",
        "2",
        "--offload",
    ]
    memory.main(flags)
    printed = capsys.readouterr().out
    assert "optimizer states" in printed and "in the memory of the machine" in printed
    assert "fits into 12 GB: yes" in printed and "141 GB: yes" in printed
    (tmp_path / "config.json").write_text(json.dumps(preset_config("tiny", chunk=16).to_dict()))
    memory.main(["--model", str(tmp_path)])  # the head and the chunk that the folder's configuration names
    assert "needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mode", "dora"], "--mode: expected one of full, lora, qlora4, qlora8, found dora"),
        (["--zero", "1"], "--zero: expected one of 0, 2, 3, found 1"),
        (["--batch", "0"], "--batch: expected a positive number, found 0"),
        (["--offload"], "--offload: expected --zero 2 or 3 too"),
        (["--zero", "3", "--mode", "qlora4"], "--zero 3: expected neither"),
        (["--model", "/nowhere"], "--model_name_or_path /nowhere: expected a Qwen2-VL config.json"),
        (["--tokens", "100"], "--tokens: expected at least 322"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError, match=message):
        memory.main(flags)


def test_an_unknown_preset():
    with pytest.raises(UserError, match="--preset: expected one of 2b, small, tiny, found 7b"):
        preset_config("7b")


@pytest.fixture
def benchmark(tmp_path):
    """Runs the benchmark of a training step as small as it gets; the cells of the rows that it wrote."""
    precision = torch.get_float32_matmul_precision()

    def run(*settings: str, **flags) -> list[dict[str, str]]:
        flags = {"preset": "tiny", "batch": 1, "steps": 1, "warmup": 0, "tokens": 330, "device": "cpu"} | flags
        output = tmp_path / "rows.md"
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        train_step.main([*given, "--settings", *settings, "--output", str(output)])
        names = train_step.COLUMNS.split(" | ")
        rows = output.read_text().splitlines() if output.exists() else []
        return [dict(zip(names, row.strip("| ").split(" | "), strict=True)) for row in rows]

    yield run
    torch.set_float32_matmul_precision(precision)


def test_a_row_for_every_setting(benchmark, tmp_path):
    settings = ["base", "bf16_weights", "checkpointing+freeze_vision"]
    rows = benchmark(*settings, profile=tmp_path / "profile.txt")
    assert [row["setting"] for row in rows] == settings
    for row in rows:
        assert (row["device"], row["model"], row["batch"]) == ("CPU", "tiny", "1")
        rate, tokens, teraflops = (float(row[name].replace(",", "")) for name in ("samples/s", "tokens/s", "TFLOP/s"))
        assert rate > 0 and teraflops > 0 and tokens == pytest.approx(330 * rate, rel=0.05, abs=2)
        shares = [int(row[name].rstrip("%")) for name in ("data", "forward", "backward", "optimizer")]
        assert 95 <= sum(shares) <= 102  # on the CPU nothing happens at once
    assert (tmp_path / "profile.txt").read_text().count("aten::addmm") >= len(settings)


@pytest.mark.parametrize("options", [("base",), ("bf16_weights",)])
def test_a_benchmarked_step_trains(options):
    config = preset_config("tiny", chunk=8)
    model = train_step.make_model(config, options, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch, update = collate(synthetic_items(config, SMALL, 2), "cpu"), train_step.make_update(model, options)
    for _ in range(2):
        model(**batch).loss.backward()
        update()
    assert all(p.grad is None for p in model.parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("visual" in name for name in moved) and any("policy_head" in name for name in moved)


def test_what_does_not_fit_is_a_row_too(benchmark, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(train_step, "measure", out_of_memory)
    assert [row["samples/s"] for row in benchmark("base", "lora")] == ["OOM", "OOM"]


def test_settings_without_their_package_are_left_out(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(train_step.importlib.util, "find_spec", lambda name: None)
    assert benchmark("lora", "adam8bit") == []
    printed = capsys.readouterr().out
    assert "lora: left out, it needs the package peft" in printed and "package bitsandbytes" in printed


@pytest.mark.parametrize(
    "settings, flags, message",
    [
        (["fast"], {}, "--settings: expected base, compile, .*found fast"),
        (["base"], {"steps": 0}, "--steps: expected a positive number, found 0"),
        (["base"], {"device": "abacus"}, "--device: expected .*cpu.* on this machine, found abacus"),
    ],
)
def test_bad_flags_of_the_benchmark(benchmark, settings, flags, message):
    with pytest.raises(UserError, match=message):
        benchmark(*settings, **flags)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [("base",), ("checkpointing",)])
def test_the_peak_on_a_gpu_is_as_estimated(options):
    config, batch = preset_config("small"), 8
    args = train_step.parse(["--steps", "1", "--warmup", "2"])
    measured = train_step.measure(config, options, batch, args, SampleSizes())["memory"]
    plan = Plan(batch=batch, checkpointing="checkpointing" in options)
    assert estimate(config, plan, SampleSizes())["peak"] == pytest.approx(measured, rel=0.15)
