"""The whole model against the oracle's numbers, and its own invariants."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from qwen2_vla import Qwen2VLAConfig, Qwen2VLForConditionalGenerationForVLA

from .helpers import GOLDEN, golden, golden_batch, old_name, relative_error

EXPECTED = golden("expected_forward.safetensors")


def forward(model, seed: int = 1234, **changes):
    torch.manual_seed(seed)
    return model.train()(**golden_batch() | changes)


def test_losses_fusion_logits_and_gradients(model):
    captured = {}
    model.policy_head.register_forward_pre_hook(lambda _, args, kwargs: captured.update(kwargs), with_kwargs=True)
    predict = model.policy_head.predict_noise
    model.policy_head.predict_noise = lambda *args: captured.setdefault(
        "pred", predict(*captured.setdefault("in", args))
    )
    out = forward(model)
    for name in ("loss", "llm_loss", "action_loss"):
        assert relative_error(out[name].detach(), EXPECTED[f"loss.{name}"]) < 1e-5, name
    assert relative_error(out.condition.detach(), EXPECTED["film"]) < 1e-5
    x, t, cond, states = captured["in"]
    assert relative_error(x, EXPECTED["head.x"]) < 1e-6 and torch.equal(t, EXPECTED["head.t"])
    assert relative_error(cond.detach(), EXPECTED["head.cond"]) < 1e-5 and torch.equal(states, EXPECTED["head.states"])
    assert relative_error(captured["pred"].detach(), EXPECTED["head.pred"]) < 1e-5
    kept = out.logits.shape[1]  # the positions that predict an answer token, and no other
    assert kept == int((golden_batch()["labels"] != -100).sum(1).max())
    last = min(kept, 23)
    assert relative_error(out.logits[:, -last:].detach(), EXPECTED["logits"][:, -last - 1 : -1]) < 1e-5

    out.loss.backward()
    gradients = {old_name(n): p.grad.norm() for n, p in model.named_parameters() if p.grad is not None}
    expected = {key.removeprefix("gradnorm."): norm for key, norm in EXPECTED.items() if key.startswith("gradnorm.")}
    assert expected.keys() <= gradients.keys() and len(expected) > 90
    for name, norm in expected.items():
        assert norm < 1e-6 or relative_error(gradients[name], norm) < 1e-3, name


def test_loss_weight_and_noise_samples(model):
    model.config.llm_loss_weight = 0.25
    assert relative_error(forward(model).loss.detach(), EXPECTED["loss.total_w025"]) < 1e-5
    model.policy_head.config.noise_samples = 2
    assert relative_error(forward(model, seed=77).action_loss.detach(), EXPECTED["loss.noise2"]) < 1e-5


def test_keeping_fewer_logits_changes_nothing(model):
    longest = int((golden_batch()["labels"] != -100).sum(1).max())
    assert torch.equal(forward(model).loss, forward(model, logits_to_keep=longest + 1).loss)


def test_training_curve(model):
    curve = golden("training_curve.json")
    groups = [[], []]
    for name, p in model.named_parameters():
        groups[old_name(name) in set(curve["no_decay_names"])].append(p)
    decayed = {"params": groups[0], "weight_decay": curve["weight_decay"]}
    optimizer = torch.optim.AdamW(
        [decayed, {"params": groups[1], "weight_decay": 0.0}],
        lr=curve["lr"],
        betas=tuple(curve["betas"]),
        eps=curve["eps"],
    )
    torch.manual_seed(curve["seed"])
    model.train()
    for step, expected in enumerate(curve["curve"]):
        out = model(**golden_batch())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses = [out.loss.item(), out.llm_loss.item(), out.action_loss.item()]
        assert relative_error(losses, expected) < 1e-3, f"step {step}"


def eval_inputs() -> dict[str, torch.Tensor]:
    return {key.removeprefix("eval.in."): value for key, value in EXPECTED.items() if key.startswith("eval.in.")}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "checkpoint")


def test_predict_action_as_the_reference(model, tokenizer):
    model.eval()
    torch.manual_seed(99)
    actions, texts = model.predict_action(**eval_inputs(), tokenizer=tokenizer, max_new_tokens=12)
    assert relative_error(actions, EXPECTED["eval.action"]) < 1e-4
    expected_ids = EXPECTED["eval.sequences"][:, eval_inputs()["input_ids"].shape[1] :]
    assert texts == tokenizer.batch_decode(expected_ids, skip_special_tokens=True)
    torch.manual_seed(99)
    again, _ = model.evaluate(**eval_inputs(), tokenizer=tokenizer, max_new_tokens=12)
    assert torch.equal(actions, again)


def pad_left(inputs: dict, padding: int, pad_id: int) -> dict:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return inputs | {
        "input_ids": torch.cat([ids.new_full((1, padding), pad_id), ids], dim=1),
        "attention_mask": torch.cat([mask.new_zeros(1, padding), mask], dim=1),
    }


def end_after(model, tokenizer, steps: list[int]):
    """Lets row i of a batch end its answer after `steps[i]` tokens; the untrained model would go on for ever."""
    end, generate = tokenizer.convert_tokens_to_ids("<|im_end|>"), model.generate

    def with_end(*args, **kwargs):
        start = kwargs["input_ids"].shape[1]

        def processor(ids, scores):
            for row, stop in enumerate(steps):
                scores[row, end] = 1e4 if ids.shape[1] - start >= stop - 1 else -1e4
            return scores

        return generate(*args, logits_processor=[processor], **kwargs)

    model.generate = with_end


@pytest.mark.parametrize("steps", [(4, 4), (2, 6), (1, 5), (1, 1), (99, 99)])
def test_a_batch_acts_as_its_rows_do_alone(model, tokenizer, monkeypatch, steps):
    """Left padding, and rows whose reasonings end at different times, change no row's result."""
    model.eval()
    monkeypatch.setattr(model.policy_head, "denoise", lambda noise, condition, states: condition)
    single = eval_inputs()
    shorter, longer = (pad_left(single, 7, tokenizer.pad_token_id) for _ in range(2))
    longer["attention_mask"][:, :7] = 1  # another prompt: seven more tokens
    rows = [longer, shorter]
    alone = []
    for inputs, stop in zip(rows, steps):
        end_after(model, tokenizer, [stop])
        alone.append(model.predict_action(**inputs, tokenizer=tokenizer, max_new_tokens=8))
        del model.generate
    batch = {key: torch.cat([row[key] for row in rows]) for key in single}
    end_after(model, tokenizer, steps)
    conditions, texts = model.predict_action(**batch, tokenizer=tokenizer, max_new_tokens=8)
    for row, (condition, text) in enumerate(alone):
        assert texts[row] == text[0]
        assert relative_error(conditions[row : row + 1], condition) < 1e-4


def test_immediate_end_is_conditioned_as_in_training(model, tokenizer):
    """An answer that is <|im_end|> alone, which is what a model without reasoning writes."""
    model.eval()
    end_after(model, tokenizer, [1])
    inputs = eval_inputs()
    seen = []
    model.policy_head.denoise = lambda noise, condition, states: seen.append(condition) or noise
    model.predict_action(**inputs, tokenizer=tokenizer, max_new_tokens=8)
    end = torch.tensor([[tokenizer.convert_tokens_to_ids("<|im_end|>")]])
    ids = torch.cat([inputs["input_ids"], end], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = end
    out = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
        states=inputs["states"],
        actions=torch.zeros(1, 8, 14),
        is_pad=torch.zeros(1, 8, dtype=torch.bool),
    )
    assert relative_error(seen[0], out.condition.detach()) < 1e-4


def test_saved_and_loaded_again(model, tmp_path):
    """Our checkpoints keep the reference's names, so both sides read both."""
    before = forward(model)
    model.save_pretrained(tmp_path)
    stored, reference = load_file(tmp_path / "model.safetensors"), load_file(GOLDEN / "checkpoint/model.safetensors")
    assert stored.keys() == reference.keys() - {"lm_head.weight"} or stored.keys() == reference.keys()
    again = Qwen2VLForConditionalGenerationForVLA.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(forward(again).loss, before.loss)
    by_auto = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(forward(by_auto).loss, before.loss)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, Qwen2VLAConfig) and config.policy_head_config.depth == 2


def test_state_dicts_with_old_names_load(model):
    fresh = Qwen2VLForConditionalGenerationForVLA(model.config)
    result = fresh.load_state_dict(load_file(GOLDEN / "checkpoint/model.safetensors"))
    assert not result.missing_keys and torch.equal(forward(fresh).loss, forward(model).loss)


def test_new_key_names_load_too(model, tmp_path):
    from safetensors.torch import save_file

    before = forward(model)
    model.config.save_pretrained(tmp_path)
    save_file(
        {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}, tmp_path / "model.safetensors"
    )
    again = Qwen2VLForConditionalGenerationForVLA.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(forward(again).loss, before.loss)


def zero_layers(model) -> dict[str, torch.Tensor]:
    names = ("reasoning_film", "adaLN_modulation", "final_layer.linear")
    return {name: p for name, p in model.named_parameters() if any(part in name for part in names)}


def test_zero_initialised_layers_stay_zero(model, tiny_base):
    fresh = Qwen2VLForConditionalGenerationForVLA(model.config)
    head = {"model_type": "scale_dp_policy", "depth": 2, "n_emb": 64, "num_heads": 4, "cond_dim": 128}
    loaded = Qwen2VLForConditionalGenerationForVLA.from_pretrained(tiny_base, policy_head_config=head)
    for built in (fresh, loaded):
        layers = zero_layers(built)
        assert len(layers) == 12
        assert all(p.abs().max() == 0 for p in layers.values())
        others = [p for n, p in built.named_parameters() if n.endswith("weight") and n not in layers and p.dim() > 1]
        assert all(p.abs().max() > 0 for p in others)
    assert 0.01 < loaded.policy_head.pos_embed.std() < 0.03


def test_a_plain_qwen2_vl_keeps_its_weights(tiny_base):
    head = {"model_type": "scale_dp_policy", "depth": 2, "n_emb": 64, "num_heads": 4, "cond_dim": 128}
    vla = Qwen2VLForConditionalGenerationForVLA.from_pretrained(tiny_base, policy_head_config=head, dtype=torch.float32)
    plain = Qwen2VLForConditionalGeneration.from_pretrained(tiny_base, dtype=torch.float32).state_dict()
    ours = vla.state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in plain.items())
    with pytest.raises(ValueError, match="without a policy head"):
        Qwen2VLForConditionalGenerationForVLA.from_pretrained(tiny_base)


@pytest.mark.parametrize(
    "change, message", [("drop", "1 weights are missing.*input_action_proj"), ("add", "1 weights are unexpected")]
)
def test_incomplete_checkpoints_are_refused(model, tmp_path, change, message):
    from safetensors.torch import save_file

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "drop":
        weights.pop("input_action_proj.mlps.0.weight")
    else:
        weights["something.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        Qwen2VLForConditionalGenerationForVLA.from_pretrained(tmp_path)


@pytest.mark.parametrize("size, hidden, tied", [("2B", 1536, True), ("7B", 3584, False)])
def test_official_configurations(tmp_path, size, hidden, tied):
    """The official folders' flat config.json, as of Qwen2-VL's release."""
    flat = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_size": hidden,
        "num_hidden_layers": 28, "num_attention_heads": hidden // 128, "num_key_value_heads": 2 if size == "2B" else 4,
        "intermediate_size": 8960 if size == "2B" else 18944, "vocab_size": 151936 if size == "2B" else 152064,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": tied, "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653, "torch_dtype": "bfloat16",
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                          "hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    }  # fmt: skip
    import json

    (tmp_path / "config.json").write_text(json.dumps(flat))
    config = Qwen2VLAConfig.from_pretrained(tmp_path)
    assert config.model_type == "qwen2_vla" and config.text_config.hidden_size == hidden
    assert config.tie_word_embeddings == tied
    config.policy_head_config = {
        "model_type": "scale_dp_policy", "model_size": "ScaleDP_H", "cond_dim": hidden, "prediction_horizon": 50,
    }  # fmt: skip
    with torch.device("meta"):
        model = Qwen2VLForConditionalGenerationForVLA(config)
    parts = (model.model.visual, model.model.language_model, model.policy_head, model)
    if size == "2B":
        millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
        assert [round(value) for value in millions] == [665, 1544, 956, 3179]
    assert isinstance(Qwen2VLConfig.from_pretrained(tmp_path), Qwen2VLConfig)


def test_tinyvla_pools_without_padding_and_writes_no_text(model, tokenizer):
    config = Qwen2VLAConfig.from_pretrained(GOLDEN / "checkpoint")
    config.using_film = False
    config.policy_head_config.is_tinyvla = True
    torch.manual_seed(0)
    tiny = Qwen2VLForConditionalGenerationForVLA(config)
    tiny.load_state_dict(model.state_dict(), strict=False)
    assert not hasattr(tiny, "reasoning_film") and hasattr(tiny.policy_head, "norm_after_pool")
    batch = golden_batch()
    out = forward(tiny)
    hidden = tiny.model(
        **{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")},
        mm_token_type_ids=(batch["input_ids"] == tiny.config.image_token_id).int(),
    ).last_hidden_state
    for row, mask in enumerate(batch["attention_mask"].bool()):
        assert relative_error(out.condition[row, 0].detach(), hidden[row, mask].mean(0).detach()) < 1e-5
    actions, texts = tiny.eval().predict_action(**eval_inputs(), tokenizer=tokenizer)
    assert actions.shape == (1, 8, 14) and texts == [""]


def test_film_needs_to_be_off_for_tinyvla_only(model):
    config = model.config
    config.using_film = False
    with pytest.raises(ValueError, match="is_tinyvla"):
        Qwen2VLForConditionalGenerationForVLA(config)


def test_unet_head_trains_in_the_model(model):
    config = Qwen2VLAConfig.from_pretrained(GOLDEN / "checkpoint")
    unet = {"model_type": "unet_diffusion_policy", "global_cond_dim": 64, "prediction_horizon": 8}
    config.policy_head_config = unet | {"down_dims": [32, 64], "diffusion_step_embed_dim": 32}
    out = forward(Qwen2VLForConditionalGenerationForVLA(config))
    out.loss.backward()
    assert torch.isfinite(out.loss)


def test_autocast_trains_fp32_weights(model):
    """What the Trainer does with --bf16 True: weights and their updates stay fp32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = forward(model)
    out.loss.backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert out.loss.dtype == torch.float32 and relative_error(out.loss.detach(), EXPECTED["loss.loss"]) < 0.02
