"""Policy heads against the oracle's numbers and their own invariants."""

import pytest
import torch
from safetensors.torch import load_file

from policy_heads import SCALEDP_SIZES, ConditionalUnet1D, ScaleDP, ScaleDPPolicyConfig, UnetDiffusionPolicyConfig
from policy_heads.modeling_scaledp import TimestepEmbedder

from .helpers import GOLDEN, golden, relative_error


def small_scaledp(**options) -> ScaleDP:
    sizes = {"depth": 2, "n_emb": 64, "num_heads": 4, "cond_dim": 32, "prediction_horizon": 8}
    return ScaleDP(ScaleDPPolicyConfig(**sizes | options))


def inputs(batch_size: int = 3, horizon: int = 8, cond_dim: int = 32, dim: int = 14) -> dict[str, torch.Tensor]:
    return {
        "actions": torch.randn(batch_size, horizon, dim),
        "hidden_states": torch.randn(batch_size, 1, cond_dim),
        "states": torch.randn(batch_size, dim),
        "is_pad": torch.zeros(batch_size, horizon, dtype=torch.bool),
    }


@pytest.mark.parametrize(
    "head_class, config_class, name",
    [(ConditionalUnet1D, UnetDiffusionPolicyConfig, "unet"), (ScaleDP, ScaleDPPolicyConfig, "tinyvla")],
)
def test_noise_prediction_as_the_reference(head_class, config_class, name):
    head = head_class(config_class(**golden(f"{name}_config.json")))
    head.load_state_dict(load_file(GOLDEN / f"{name}_head.safetensors"))
    e = golden("expected_heads.safetensors")
    predicted = head.predict_noise(e["unet.x"], e["unet.t"], e[f"{name}.cond"], e["unet.states"])
    assert relative_error(predicted.detach(), e[f"{name}.pred"]) < 1e-5


def test_timestep_embedding_and_schedule_as_the_reference():
    e = golden("expected_heads.safetensors")
    embedding = TimestepEmbedder.sinusoidal(torch.arange(100), 256)
    assert torch.equal(embedding.float(), e["t_embed"])
    scheduler = small_scaledp().scheduler
    scheduler.set_timesteps(10)
    assert torch.equal(scheduler.timesteps, e["ddim.timesteps"])
    assert torch.equal(scheduler.alphas_cumprod, e["ddim.alphas_cumprod"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_stays_fp32_and_samples_are_finite(dtype):
    head = small_scaledp().to(dtype)
    assert head.scheduler.alphas_cumprod.dtype == torch.float32
    x = inputs()
    actions = head.sample(x["hidden_states"], x["states"])
    assert actions.shape == (3, 8, 14) and actions.dtype == torch.float32
    assert torch.isfinite(actions).all() and actions.abs().max() <= 1.0  # clip_sample


def test_untrained_head_predicts_zero_noise():
    head = small_scaledp()
    x = inputs()
    assert head.predict_noise(x["actions"], torch.tensor([0, 50, 99]), x["hidden_states"], x["states"]).abs().max() == 0
    for block in head.blocks:
        assert block.adaLN_modulation[1].weight.abs().max() == 0
    torch.manual_seed(5)
    loss = head(**x)["loss"]
    torch.manual_seed(5)
    assert torch.allclose(loss, torch.randn(1, 3, 8, 14).square().mean())


def test_padded_rows_count_as_zero_in_the_mean():
    head = small_scaledp()
    x = inputs()
    torch.manual_seed(1)
    whole = head(**x)["loss"]
    x["is_pad"][:, 4:] = True
    torch.manual_seed(1)
    half = head(**x)["loss"]
    torch.manual_seed(1)
    noise = torch.randn(1, 3, 8, 14)[0]
    assert torch.allclose(half, noise[:, :4].square().sum() / noise.numel())
    assert half < whole


def test_noise_samples_are_drawn_before_the_steps():
    head = small_scaledp(noise_samples=2)
    x = inputs()
    torch.manual_seed(3)
    loss = head(**x)["loss"]
    torch.manual_seed(3)
    assert torch.allclose(loss, torch.randn(2, 3, 8, 14).square().mean())


@pytest.mark.parametrize("size, expected", list(SCALEDP_SIZES.items()))
def test_named_sizes(size, expected):
    config = ScaleDPPolicyConfig(model_size=size)
    assert (config.depth, config.n_emb, config.num_heads) == expected


def test_full_size_parameter_count():
    with torch.device("meta"):
        head = ScaleDP(ScaleDPPolicyConfig(model_size="ScaleDP_H", prediction_horizon=50))
    assert len(head.state_dict()) == 339
    assert round(sum(p.numel() for p in head.parameters()) / 1e6) == 956


@pytest.mark.parametrize(
    "config_class, options, message",
    [
        (ScaleDPPolicyConfig, {"model_size": "ScaleDP_XXL"}, "ScaleDP_Ti, ScaleDP_S"),
        (ScaleDPPolicyConfig, {"depth": 2, "n_emb": 64}, "depth, width and heads"),
        (ScaleDPPolicyConfig, {"depth": 2, "n_emb": 65, "num_heads": 4}, "not divisible by 4 heads"),
        (UnetDiffusionPolicyConfig, {"prediction_horizon": 50}, "divisible by 4, found 50"),
        (UnetDiffusionPolicyConfig, {"down_dims": [30, 60]}, "n_groups"),
    ],
)
def test_impossible_sizes_are_refused(config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(**options)


def test_unet_action_dimension_comes_from_the_config():
    config = UnetDiffusionPolicyConfig(
        input_dim=7, state_dim=5, global_cond_dim=32, down_dims=[32, 64], diffusion_step_embed_dim=32
    )
    head = ConditionalUnet1D(config)
    assert head.sample(torch.randn(2, 1, 32), torch.randn(2, 5)).shape == (2, 16, 7)


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    head = small_scaledp()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = inputs()

    def gradients() -> list[torch.Tensor]:
        head.zero_grad()
        torch.manual_seed(2)
        head.train()(**x)["loss"].backward()
        return [p.grad.clone() for p in head.parameters()]

    plain = gradients()
    head.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, gradients()):
        assert torch.allclose(a, b)
