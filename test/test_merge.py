"""`python -m qwen2_vla.merge`: any checkpoint as one plain, complete folder."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_vla
from data_utils import UserError
from data_utils.normalization import save_stats
from qwen2_vla import Qwen2VLAPolicy
from qwen2_vla.adapters import lora_targets, plain_name
from qwen2_vla.loading import load_model
from qwen2_vla.merge import main as merge
from qwen2_vla.modeling_qwen2_vla import VLA_MODULES

from .helpers import run
from .lora_cases import DATA, assert_same, small_training, write_reference_output


def test_the_output_of_the_reference_as_one_folder(tiny_base, tmp_path, capsys):
    moved = tmp_path / "base"
    shutil.copytree(tiny_base, moved)
    folder = tmp_path / "reference"
    expected = write_reference_output(folder, str(moved), modules=["vit", "llm"])
    moved.rename(tmp_path / "elsewhere")
    output = tmp_path / "models" / "merged"
    with pytest.raises(UserError, match="found .*base; name it in adapter_config.json.*--base BASE"):
        merge([str(folder), "--output", str(output)])
    assert not output.exists()
    stats = {f"{kind}_{name}": torch.ones(14).numpy() for kind in ("qpos", "action") for name in ("mean", "std")}
    save_stats(stats, folder)
    command = [str(folder), "--output", str(output), "--base", str(tmp_path / "elsewhere")]
    merge(command)
    assert "adapters and base as one model" in capsys.readouterr().out
    assert os.listdir(tmp_path / "models") == ["merged"]  # nothing is left beside it
    shutil.rmtree(tmp_path / "elsewhere")
    policy = Qwen2VLAPolicy.from_pretrained(str(output), device="cpu")  # it stands alone
    assert_same(policy.model, expected)
    assert policy.model.config.data_config == DATA and policy.stats["qpos_mean"].shape == (14,)
    again = run(["-m", "qwen2_vla.merge", *command])
    assert again.returncode == 1 and again.stdout.strip().splitlines()[-1].startswith("error: --output "), again.stdout


def test_full_checkpoints_in_another_dtype_and_averaged(model, processor, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("model.visual.")}
    merge([str(checkpoint), "--output", str(tmp_path / "bf16"), "--dtype", "bf16"])
    assert "M parameters in torch.bfloat16" in (printed := capsys.readouterr().out)
    assert "no dataset_stats.json: without it the model cannot act" in printed
    stored = load_file(tmp_path / "bf16/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert_same(load_model(str(tmp_path / "bf16")), {n: p.bfloat16().float() for n, p in model.state_dict().items()})

    with pytest.raises(UserError, match="expected averaged weights .ema.safetensors"):
        merge([str(checkpoint), "--output", str(tmp_path / "ema"), "--ema"])
    save_file({name: 0.5 * p.detach() for name, p in trained.items()}, checkpoint / "ema.safetensors")
    merge([str(checkpoint), "--output", str(tmp_path / "ema"), "--ema"])
    halved = {*trained, "lm_head.weight"}  # tied
    expected = {name: 0.5 * p if name in halved else p for name, p in model.state_dict().items()}
    assert_same(load_model(str(tmp_path / "ema")), expected)


@pytest.mark.parametrize("modules", [["vit", "llm"], ["llm", "di_head"]], ids=" ".join)
def test_averaged_adapters(tiny_base, tmp_path, task, modules):
    """The average of adapters is merged as they are."""
    flags = {"lora_enable": True, "lora_module": " ".join(modules), "lora_r": 4, "using_ema": True, "save_steps": 2}
    train_vla.main(small_training(tiny_base, task, tmp_path / "out", **flags))
    checkpoint = tmp_path / "out/checkpoint-2"
    merge([str(checkpoint), "--output", str(tmp_path / "ema"), "--ema"])
    merge([str(checkpoint), "--output", str(tmp_path / "last")])
    average = {plain_name(name): tensor for name, tensor in load_file(checkpoint / "ema.safetensors").items()}
    ema, last = load_model(str(tmp_path / "ema")), load_model(str(tmp_path / "last"))
    assert_same(last, load_model(str(tmp_path / "out")).state_dict())
    for module in VLA_MODULES[1:]:
        for name, tensor in getattr(ema, module).state_dict().items():
            assert torch.equal(tensor, average[f"{module}.{name}"])
    base = load_model(tiny_base, last.config).state_dict()
    for layer in lora_targets(last, ["llm"]):
        b, a = (average[f"{layer}.lora_{x}.weight"] for x in "BA")
        change = ema.get_submodule(layer).weight - base[f"{layer}.weight"]
        assert b.abs().max() > 0 and torch.allclose(change, 256 / 4 * b @ a, atol=1e-5)
    Qwen2VLAPolicy.from_pretrained(str(tmp_path / "ema"), device="cpu")


def test_what_cannot_be_merged(model, processor, tiny_base, tmp_path):
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    output = str(tmp_path / "new")
    for arguments, message in (
        ([str(tmp_path / "nothing"), "--output", output], "CHECKPOINT: expected a folder, found none"),
        ([tiny_base, "--output", output], "expected a DexVLA checkpoint, found a model without a policy head"),
        ([str(tmp_path / "full"), "--output", tiny_base], "--output .*: expected a new or an empty folder"),
        ([str(tmp_path / "full"), "--output", output, "--base", tiny_base], "--base .*: expected adapters in"),
        ([str(tmp_path / "full"), "--output", output, "--base", "x"], "--base: expected a folder, found none at x"),
    ):
        with pytest.raises(UserError, match=message):
            merge(arguments)
    weights = load_file(tmp_path / "full/model.safetensors")
    weights.pop("policy_head.pos_embed")
    save_file(weights, tmp_path / "full/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing: policy_head.pos_embed"):
        merge([str(tmp_path / "full"), "--output", output])
    assert not Path(output).exists()


def test_a_failed_write_leaves_nothing(model, processor, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(processor), "save_pretrained", full_disk)
    with pytest.raises(UserError, match="--output .*: expected a folder that can be written, found .*No space left"):
        merge([str(tmp_path / "full"), "--output", str(tmp_path / "models/new")])
    assert os.listdir(tmp_path / "models") == []
