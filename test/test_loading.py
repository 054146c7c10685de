"""Configuration, weights, stage-1 heads, freezing and adapters."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_utils import UserError
from policy_heads import ConditionalUnet1D, ScaleDP, ScaleDPPolicyConfig, UnetDiffusionPolicyConfig
from qwen2_vla import loading
from qwen2_vla.loading import (
    build_config,
    check_model_folder,
    freeze,
    load_model,
)
from qwen2_vla.modeling_qwen2_vla import VLA_MODULES
from qwen2_vla.stage1 import load_stage1_head, read_stage1_head

from .helpers import GOLDEN

ORACLE = str(GOLDEN / "checkpoint")
SMALL = {"depth": 2, "n_emb": 64, "num_heads": 4, "cond_dim": 64, "prediction_horizon": 8}


def small_head(**options) -> ScaleDP:
    return ScaleDP(ScaleDPPolicyConfig(**SMALL | options))


def stage1_file(
    tmp_path, head: ScaleDP, *, suffix=".ckpt", leave_out=("combine", "cond_obs_emb", "final_layer.linear")
):
    """The released layout: head under `noise_pred_net.`, beside the vision encoder that stage 2 replaces."""
    tensors = {f"noise_pred_net.{k}": v for k, v in head.state_dict().items() if not k.startswith(leave_out)}
    tensors["noise_pred_net.cond_obs_emb.weight"] = torch.ones(64, 64)
    tensors["policy.backbones.0.nets.0.conv1.weight"] = torch.ones(4, 3, 3, 3)
    path = tmp_path / f"head{suffix}"
    if suffix == ".ckpt":
        torch.save({"nets": {"nets": tensors}, "step": 40000}, path)
    else:
        save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_stage1_head(tmp_path, suffix):
    trained, head = small_head(), small_head()
    for p in trained.parameters():
        torch.nn.init.normal_(p)
    before = {name: p.clone() for name, p in head.state_dict().items()}
    tensors, line = read_stage1_head(stage1_file(tmp_path, trained, suffix=suffix), head.config)
    load_stage1_head(head, tensors)
    left = ("combine", "cond_obs_emb", "final_layer.linear")
    for name, p in head.state_dict().items():
        expected = before[name] if name.startswith(left) else trained.state_dict()[name]
        assert torch.equal(p, expected), name
    total = len(before)
    assert f"{total - 10} tensors taken, 2 dropped, 10 left at their initial value" in line


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"n_emb": 128}, ["pos_embed: expected (1, 8, 128), found (1, 8, 64)"]),
        ({"prediction_horizon": 16}, ["pos_embed: expected (1, 16, 64), found (1, 8, 64)", "--chunk_size"]),
        ({"depth": 3}, ["blocks.2.", "found nothing", "--policy_head_size"]),
        ({"depth": 1}, ["blocks.1.", "expected no such tensor"]),
    ],
)
def test_stage1_head_that_does_not_fit(tmp_path, options, parts):
    with pytest.raises(UserError) as error:
        read_stage1_head(stage1_file(tmp_path, small_head()), small_head(**options).config)
    for part in parts:
        assert part in str(error.value)


def test_unreadable_stage1_files(tmp_path):
    with pytest.raises(UserError, match="found none at"):
        read_stage1_head(str(tmp_path / "nothing.ckpt"), small_head().config)
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(UserError, match="expected a file of tensors"):
        read_stage1_head(str(tmp_path / "text.ckpt"), small_head().config)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"under \['nets'\]\['nets'\]"):
        read_stage1_head(str(tmp_path / "other.ckpt"), small_head().config)


class Malicious:
    def __reduce__(self):
        return (open, (str(Malicious.marker), "w"))


def test_untrusted_files_run_no_code(tmp_path):
    Malicious.marker = tmp_path / "executed"
    torch.save({"nets": {"nets": Malicious()}}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError):
        read_stage1_head(str(tmp_path / "evil.ckpt"), small_head().config)
    assert not Malicious.marker.exists()


def test_unet_stage1_head(tmp_path):
    def unet():
        return ConditionalUnet1D(
            UnetDiffusionPolicyConfig(global_cond_dim=64, down_dims=[32, 64], prediction_horizon=8)
        )

    trained, head = unet(), unet()
    path = stage1_file(tmp_path, trained, leave_out=("combine", "norm_after_pool"))
    head.load_state_dict(read_stage1_head(path, head.config)[0], strict=False)
    assert torch.equal(head.final_conv[1].weight, trained.final_conv[1].weight)


# ---- configuration ----


def test_head_from_flags_folder_or_default(tiny_base):
    config = build_config(tiny_base)
    assert config.policy_head_size == "ScaleDP_Ti" and config.policy_head_config.depth == 8  # what the folder says
    assert config.policy_head_config.cond_dim == 128
    assert build_config(tiny_base, head_size="ScaleDP_S").policy_head_config.n_emb == 384
    explicit = build_config(tiny_base, depth=3, width=96, num_heads=6).policy_head_config
    assert (explicit.depth, explicit.n_emb, explicit.num_heads) == (3, 96, 6)
    unet = build_config(tiny_base, head_type="unet_diffusion_policy").policy_head_config
    assert unet.global_cond_dim == 128 and unet.down_dims == (256, 512, 1024)


def test_a_checkpoints_head_is_kept(tiny_base):
    config = build_config(ORACLE, chunk_size=8)
    assert (config.policy_head_config.depth, config.policy_head_config.n_emb) == (2, 64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_size": "ScaleDP_H"}, "depth 2 .asked for: 32, --policy_head_size.*n_emb 64 .asked for: 1280"),
        ({"chunk_size": 50}, "prediction_horizon 8 .asked for: 50, --chunk_size"),
        ({"action_dim": 7}, "input_dim 14 .asked for: 7, --action_dim"),
        ({"state_dim": 7}, "state_dim 14 .asked for: 7, --state_dim"),
        ({"is_tinyvla": True, "using_film": False}, "is_tinyvla False .asked for: True.*using_film True"),
        ({"head_type": "unet_diffusion_policy"}, "model_type scale_dp_policy .asked for: unet"),
        ({"head_type": "act"}, "--policy_head_type: expected scale_dp_policy or unet"),
        ({"head_size": "ScaleDP_G"}, "--policy_head_size: expected one of ScaleDP_XS, ScaleDP_Ti"),
        ({"using_film": False}, "--using_film False: expected --is_tinyvla True"),
        ({"is_tinyvla": True}, "--is_tinyvla True: expected --using_film False"),
        (
            {"head_type": "unet_diffusion_policy", "is_tinyvla": True, "using_film": False},
            "--is_tinyvla True: expected",
        ),
    ],
)
def test_flags_that_contradict_the_checkpoint(options, message):
    with pytest.raises(UserError, match=message):
        build_config(ORACLE, **{"chunk_size": 8} | options)


def test_unet_horizon_is_checked(tiny_base):
    with pytest.raises(UserError, match="chunk_size divisible by 4, found 50"):
        build_config(tiny_base, head_type="unet_diffusion_policy", chunk_size=50)


@pytest.mark.parametrize(
    "remove, message",
    [
        ("config.json", "configuration"),
        ("model.safetensors", "weights"),
        ("preprocessor_config.json", "processor"),
        ("tokenizer.json vocab.json", "tokenizer"),
    ],
)
def test_incomplete_model_folders(tmp_path, remove, message):
    shutil.copytree(ORACLE, tmp_path / "model")
    check_model_folder(str(tmp_path / "model"))
    for name in remove.split():
        (tmp_path / "model" / name).unlink()
    with pytest.raises(UserError, match=f"--model_name_or_path .*expected {message}"):
        check_model_folder(str(tmp_path / "model"))


def test_damaged_weights(tmp_path):
    shutil.copytree(ORACLE, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors: expected whole weights"):
        check_model_folder(str(tmp_path / "model"))
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    shutil.copy(f"{ORACLE}/model.safetensors", weights)
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: expected whole weights"):
        check_model_folder(str(tmp_path / "model"))


def test_half_of_a_lora_output_is_refused(tmp_path):
    shutil.copytree(ORACLE, tmp_path / "model")
    (tmp_path / "model/non_lora_trainables.bin").touch()
    with pytest.raises(UserError, match="expected adapter_config.json beside non_lora_trainables.bin"):
        check_model_folder(str(tmp_path / "model"))


def test_a_processor_needs_a_chat_template(tmp_path):
    shutil.copytree(ORACLE, tmp_path / "model")
    (tmp_path / "model/chat_template.json").unlink()
    with pytest.raises(UserError, match="expected a processor with a chat template"):
        loading.load_processor(str(tmp_path / "model"))


def test_a_lost_head_is_not_replaced(model, tmp_path):
    """A folder whose configuration has a head must have the head's weights."""
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(VLA_MODULES)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing"):
        load_model(str(tmp_path))


def test_missing_model_folder(tmp_path):
    for folder in (str(tmp_path / "nothing"), "./nothing", None):
        with pytest.raises(UserError, match="--model_name_or_path"):
            check_model_folder(folder)


# ---- what trains ----


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freezing(model):
    everything = trained(model)
    freeze(model, vision_tower=True)
    assert everything - trained(model) == {name for name in everything if name.startswith("model.visual.")}
    freeze(model, backbone=True)
    assert trained(model) == {name for name in everything if name.startswith(VLA_MODULES)}


@pytest.mark.parametrize("bits, package", [(16, "peft"), (4, "bitsandbytes")])
def test_missing_packages_are_named(monkeypatch, bits, package):
    find = loading.importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=f"expected the package {package}"):
        loading.check_requirements(lora_modules=["llm"], bits=bits)


def test_flash_attention_falls_back_and_says_so(capsys):
    assert loading.choose_attention(False) == "sdpa" and capsys.readouterr().out == ""
    chosen = loading.choose_attention(True)
    assert chosen == "flash_attention_2" or "SDPA takes its place" in capsys.readouterr().out
