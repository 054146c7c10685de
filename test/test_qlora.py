"""4- and 8-bit backbones under adapters, on the CPU."""

import json
import shutil

import pytest
import torch

import train_vla
from qwen2_vla.adapters import add_lora, attach_adapters
from qwen2_vla.loading import build_config, load_model

from .helpers import GOLDEN
from .lora_cases import HEAD, loss_of, small_training, text_batch, train_steps


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_backbone_learns_and_is_merged(tiny_base, tmp_path, bits):
    config = build_config(tiny_base, **HEAD)
    torch.manual_seed(0)
    model = load_model(tiny_base, config, bits=bits, compute_dtype=torch.float32)
    kinds = {type(layer).__name__ for layer in model.model.language_model.layers[0].modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    assert {type(layer) for layer in model.policy_head.combine} == {torch.nn.Linear, torch.nn.ReLU}
    lora = add_lora(model, ["vit", "llm"], r=8, alpha=16, dropout=0.0).train()
    before = loss_of(lora, text_batch())
    train_steps(lora, text_batch(), 10, lr=3e-3)
    after = loss_of(lora.eval(), text_batch())
    assert after < 0.8 * before
    llm = {n: p for n, p in lora.named_parameters() if "lora_B" in n and "language_model" in n}
    assert llm and all(p.abs().max() > 0 for p in llm.values())  # adapters learned, not the head alone

    lora.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    quantised = load_model(tiny_base, config, bits=bits, compute_dtype=torch.float32)
    again = attach_adapters(quantised, str(tmp_path), base_has_head=False).eval()
    assert torch.allclose(loss_of(again, text_batch()), after, rtol=1e-5)
    merged = load_model(str(tmp_path)).eval()  # into the weights as they were before they were quantised
    assert torch.allclose(loss_of(merged, text_batch()), after, rtol=0.05)


def test_8_bit_adamw_trains_quantised_and_resumes(tiny_base, tmp_path, task):
    flags = {"lora_enable": True, "lora_module": "llm", "lora_r": 8, "bits": 4, "optim": "adamw_bnb_8bit"}
    flags |= {"max_steps": 10, "learning_rate": 3e-3, "save_steps": 5}
    out = tmp_path / "out"

    def losses() -> list[float]:
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        return [entry["llm_loss"] for entry in history if "llm_loss" in entry]

    train_vla.main(small_training(tiny_base, task, out, **flags))
    uninterrupted = losses()
    assert len(uninterrupted) == 10 and sum(uninterrupted[-3:]) < 0.95 * sum(uninterrupted[:3])
    states = torch.load(out / "checkpoint-10/optimizer.pt", weights_only=True)["state"].values()
    moments = [state["__bnb_optimizer_quant_state__"]["state1"] for state in states]
    assert {moment.dtype for moment in moments} >= {torch.uint8}  # small tensors stay in fp32
    shutil.rmtree(out / "checkpoint-10")
    train_vla.main(small_training(tiny_base, task, out, **flags, resume_from_checkpoint=True))
    assert losses() == pytest.approx(uninterrupted, rel=1e-3)


def test_narrow_layers_stay_as_they_are(tmp_path, capsys):
    """bitsandbytes packs 64 weights to a block; on the CPU it rounds layers of other widths wrongly."""
    folder = str(GOLDEN / "checkpoint")
    model = load_model(folder, bits=4, compute_dtype=torch.float32)
    assert "layers stay as they are, their width is no multiple of 64: model.visual.blocks.0" in capsys.readouterr().out
    kind = {name: type(layer).__name__ for name, layer in model.named_modules()}
    assert kind["model.visual.blocks.0.attn.qkv"] == "Linear"  # 32 wide
    assert kind["model.language_model.layers.0.mlp.up_proj"] == "Linear4bit"  # 64 wide
