"""LoRA, QLoRA and the reference's LoRA output: what is adapted, what trains, and what comes out when it is merged."""

import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_vla
from data_utils import UserError
from qwen2_vla import Qwen2VLAPolicy
from qwen2_vla.adapters import add_lora, lora_targets, plain_name, save_adapted_head
from qwen2_vla.loading import check_model_folder, load_model, load_processor
from qwen2_vla.modeling_qwen2_vla import VLA_MODULES

from .helpers import golden, golden_batch, old_name
from .lora_cases import assert_same, loss_of, small_training, text_batch, train_steps, write_reference_output

PARTS = {"vit": "visual.", "llm": "model.layers.", "di_head": "policy_head."}
COMBINATIONS = [list(chosen) for n in (1, 2, 3) for chosen in combinations(PARTS, n)]
# ---- which layers, which parameters ----


@pytest.mark.parametrize("modules", COMBINATIONS, ids=" ".join)
def test_lora_targets_as_the_reference(model, modules):
    everything = golden("lora_targets.json")["vit llm di_head"]
    assert golden("lora_targets.json")["vit llm"] == [
        name for name in everything if not name.startswith("policy_head.")
    ]
    expected = [name for name in everything if name.startswith(tuple(PARTS[module] for module in modules))]
    assert sorted(map(old_name, lora_targets(model, modules))) == sorted(expected)
    lora = add_lora(model, modules, r=4, alpha=8)
    adapted = {plain_name(name.partition(".lora_A")[0]) for name, _ in lora.named_parameters() if ".lora_A" in name}
    assert sorted(map(old_name, adapted)) == sorted(expected)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("modules", COMBINATIONS, ids=" ".join)
def test_lora_trains_what_it_says(model, modules, bias):
    whole = VLA_MODULES[1:] if "di_head" in modules else VLA_MODULES
    expected = {name for name, _ in model.named_parameters() if name.startswith(whole)}
    for layer in lora_targets(model, modules):
        expected |= {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}
        if bias == "lora_only" and model.get_submodule(layer).bias is not None:
            expected.add(f"{layer}.bias")
    lora = add_lora(model, modules, r=4, alpha=8, bias=bias)
    assert {plain_name(name) for name, p in lora.named_parameters() if p.requires_grad} == expected


def test_names_of_wrappers_and_of_the_reference():
    ours = "model.language_model.layers.0.self_attn.q_proj"
    for name in (ours, "model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"):
        assert plain_name(f"base_model.model.{name}.base_layer.weight") == f"{ours}.weight"
        assert plain_name(f"module.base_model.model.{name}.lora_A.default.weight") == f"{ours}.lora_A.weight"
    for prefix in ("", "model.", "base_model.model.", "base_model.model.model."):
        assert plain_name(f"{prefix}visual.blocks.1.attn.qkv") == "model.visual.blocks.1.attn.qkv"
        assert plain_name(f"{prefix}policy_head.modules_to_save.default.x") == "policy_head.x"
    assert plain_name("base_model.model.model.norm.weight") == "model.language_model.norm.weight"
    assert plain_name("base_model.model.lm_head.weight") == "lm_head.weight"


# ---- our adapters ----


@pytest.mark.parametrize("modules", [["vit", "llm"], ["llm", "di_head"]], ids=" ".join)
def test_adapters_saved_and_merged(model, tmp_path, modules):
    batch = golden_batch() if "vit" in modules else text_batch()
    lora = add_lora(model, modules, r=4, alpha=8, bias="lora_only").train()
    train_steps(lora, batch, 2)
    expected = loss_of(lora.eval(), batch)
    lora.save_pretrained(tmp_path)
    save_adapted_head(lora, str(tmp_path))
    lora.get_base_model().config.save_pretrained(tmp_path)
    merged = load_model(str(tmp_path)).eval()
    assert type(merged).__name__ == "Qwen2VLForConditionalGenerationForVLA"
    assert torch.allclose(loss_of(merged, batch), expected, rtol=1e-4)
    assert all(p.requires_grad for p in merged.parameters())  # ready to be trained further
    assert_same(merged, lora.merge_and_unload().state_dict())


def test_incomplete_adapters_are_named(model, tmp_path):
    lora = add_lora(model, ["llm"], r=4)
    lora.save_pretrained(tmp_path)
    lora.get_base_model().config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    one, layer = "base_model.model.reasoning_film.scale_fc.bias", "model.language_model.layers.1.mlp.up_proj"
    for left_out, message in (
        ([one], "reasoning_film.scale_fc.bias is missing"),
        ([f"base_model.model.{layer}.lora_B.weight"], f"{layer}.lora_B.weight is missing"),
        ([name for name in tensors if layer in name], f"expected adapters of {layer}, found none"),
    ):
        save_file({name: tensor for name, tensor in tensors.items() if name not in left_out}, path)
        with pytest.raises(UserError, match=message):
            load_model(str(tmp_path))


def test_adapters_under_zero3_are_merged_first(model, tmp_path, monkeypatch):
    add_lora(model, ["llm"], r=4).save_pretrained(tmp_path)
    monkeypatch.setattr("qwen2_vla.loading.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="expected a plain checkpoint for ZeRO-3.*python -m qwen2_vla.merge"):
        load_model(str(tmp_path))


# ---- the reference's LoRA output ----


def change_rest(folder: Path, change):
    path = folder / "non_lora_trainables.bin"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


@pytest.mark.parametrize(
    "options",
    [
        {"modules": ["vit", "llm"]},
        {"modules": ["vit", "llm"], "suffix": ".safetensors", "prefix": "base_model.model.model."},
        {"modules": ["vit", "llm"], "targets": "pattern"},
        {"modules": ["llm"], "targets": "endings"},
        {"modules": ["vit", "llm", "di_head"], "suffix": ".safetensors"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_lora_output_of_the_reference(tiny_base, tmp_path, options):
    folder = tmp_path / "reference"
    expected = write_reference_output(folder, tiny_base, **options)
    check_model_folder(str(folder))
    assert_same(load_model(str(folder)), expected)


def test_lora_output_of_the_reference_acts_and_is_trained_further(tiny_base, tmp_path, task):
    folder = tmp_path / "reference"
    expected = write_reference_output(folder, tiny_base, modules=["vit", "llm"])
    assert load_processor(str(folder)).chat_template == load_processor(tiny_base).chat_template
    train_vla.main(small_training(folder, task, tmp_path / "out", learning_rate=0, max_steps=1))
    trained = load_model(str(tmp_path / "out"))
    assert_same(trained, expected)
    shutil.copy(tmp_path / "out/dataset_stats.json", folder)
    policy = Qwen2VLAPolicy.from_pretrained(str(folder), device="cpu")
    assert_same(policy.model, expected)


def test_the_whole_model_beside_the_adapters(tiny_base, tmp_path):
    """Some outputs repeat the frozen backbone, too: what they say is what counts."""
    folder = tmp_path / "reference"
    expected = write_reference_output(folder, tiny_base, modules=["llm"])
    norm = "model.language_model.norm.weight"
    expected[norm] = torch.full_like(expected[norm], 0.5)
    change_rest(folder, lambda rest: rest.update({"base_model.model.model.norm.weight": expected[norm]}))
    assert_same(load_model(str(folder)), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rest: rest.pop("base_model.model.input_action_proj.mlps.0.weight"), "mlps.0.weight is missing"),
        (lambda rest: rest.pop("base_model.model.policy_head.pos_embed"), "policy_head.pos_embed is missing"),
        (lambda rest: rest.update(other=torch.zeros(1)), "other is unexpected"),
        (lambda rest: rest.update({"policy_head.pos_embed": torch.zeros(1, 8, 64)}), "pos_embed is there twice"),
        (lambda rest: rest.update({"base_model.model.policy_head.pos_embed": torch.zeros(1, 9, 64)}), "1, 9, 64"),
        (lambda rest: rest.update(other=3), "expected names and their tensors"),
    ],
)
def test_reference_outputs_that_do_not_fit(tiny_base, tmp_path, change, message):
    folder = tmp_path / "reference"
    write_reference_output(folder, tiny_base, modules=["vit", "llm"])
    change_rest(folder, change)
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


class Malicious:
    def __reduce__(self):
        return (open, (str(Malicious.marker), "w"))


def test_reference_outputs_run_no_code(tiny_base, tmp_path):
    folder = tmp_path / "reference"
    write_reference_output(folder, tiny_base, modules=["llm"])
    Malicious.marker = tmp_path / "executed"
    torch.save({"policy_head.pos_embed": Malicious()}, folder / "non_lora_trainables.bin")
    with pytest.raises(UserError, match="non_lora_trainables.bin: expected a file of tensors"):
        load_model(str(folder))
    assert not Malicious.marker.exists()
