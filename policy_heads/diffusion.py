"""What every diffusion head shares: noise, the masked loss and the DDIM loop (Song et al., arXiv 2010.02502)."""

from functools import cached_property

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import PreTrainedModel


class ZeroLinear(nn.Linear):
    """A Linear layer that starts at zero; its own class so that `_init_weights` can tell it from the others."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DiffusionPolicyHead(PreTrainedModel):
    """Base of the heads. A subclass implements `predict_noise`; objective and sampling live here, always in fp32."""

    supports_gradient_checkpointing = True

    @cached_property
    def scheduler(self) -> DDIMScheduler:
        # Built on first use and never cast: `from_pretrained` runs __init__ on the meta device, and a schedule
        # in bf16 overflows to NaN at the last denoising step.
        return DDIMScheduler(
            num_train_timesteps=self.config.num_train_timesteps,
            beta_schedule="squaredcos_cap_v2",
            clip_sample=True,
            set_alpha_to_one=True,
            steps_offset=0,
            prediction_type="epsilon",
        )

    def predict_noise(self, x: Tensor, t: Tensor, hidden_states: Tensor, states: Tensor) -> Tensor:
        """Noise in `x` (B, T, A) at diffusion steps `t` (B,), given `hidden_states` (B, L, D) and `states` (B, S)."""
        raise TypeError(f"{type(self).__name__} must define predict_noise")

    def forward(self, actions: Tensor, hidden_states: Tensor, states: Tensor, is_pad: Tensor) -> dict[str, Tensor]:
        """Denoising loss of one batch.

        Args:
            actions: (B, T, A) normalised action chunk. is_pad: (B, T) bool, True on rows beyond the episode's end.
            hidden_states: (B, L, D) condition. states: (B, S) normalised qpos.

        Returns:
            `{"loss": scalar}`, fp32. The mean runs over padded rows too, as in the reference.
        """
        actions = actions.float()
        samples, batch_size = self.config.noise_samples, actions.shape[0]
        # The order of these two draws is part of the agreement with the reference.
        noise = torch.randn([samples, *actions.shape], device=actions.device)  # (N, B, T, A)
        t = torch.randint(0, self.config.num_train_timesteps, (batch_size,), device=actions.device)  # (B,)

        def repeat(x: Tensor) -> Tensor:  # (B, …) -> (N*B, …)
            return x.repeat(samples, *[1] * (x.dim() - 1)) if samples > 1 else x

        noise = noise.flatten(0, 1)  # (N*B, T, A)
        t = repeat(t)
        noisy = self.scheduler.add_noise(repeat(actions), noise, t)  # (N*B, T, A)
        predicted = self.predict_noise(noisy, t, repeat(hidden_states), repeat(states))  # (N*B, T, A)
        error = (predicted.float() - noise).square()  # (N*B, T, A)
        return {"loss": (error * ~repeat(is_pad)[..., None]).mean()}

    @torch.no_grad()
    def sample(self, hidden_states: Tensor, states: Tensor) -> Tensor:
        """Draws an action chunk (B, T, A), normalised, fp32, with `num_inference_timesteps` DDIM steps."""
        shape = (states.shape[0], self.config.prediction_horizon, self.config.input_dim)
        x = torch.randn(shape, device=states.device)  # (B, T, A)
        self.scheduler.set_timesteps(self.config.num_inference_timesteps)
        for step in self.scheduler.timesteps.tolist():
            t = torch.full(shape[:1], step, device=states.device)  # (B,)
            noise = self.predict_noise(x, t, hidden_states, states).float()  # (B, T, A)
            x = self.scheduler.step(noise, step, x).prev_sample  # (B, T, A)
        return x
