"""What every diffusion head shares: noise, the masked loss and the DDIM loop (Song et al., arXiv 2010.02502)."""

from collections.abc import Callable
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

    def noise_predictor(
        self, steps: list[int], hidden_states: Tensor, states: Tensor
    ) -> Callable[[int, Tensor], Tensor]:
        """A function (i, x) -> the noise in `x` (B, T, A) at diffusion step `steps[i]`, fp32; heads that can do part of
        the work for all steps at once override this."""

        def predict(i: int, x: Tensor) -> Tensor:
            t = torch.full(x.shape[:1], steps[i], device=x.device)  # (B,)
            return self.predict_noise(x, t, hidden_states, states).float()

        return predict

    def _at_step(self, actions: Tensor, noise: Tensor, step: int) -> Tensor:
        """Clean `actions` (B, T, A) with as much noise as there is at diffusion step `step`."""
        signal = self.scheduler.alphas_cumprod[step]
        return signal**0.5 * actions + (1 - signal) ** 0.5 * noise

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
        return self.denoise(self.draw_noise(states), hidden_states, states)

    def draw_noise(self, states: Tensor) -> Tensor:
        """Where the chunks for `states` (B, S) start from: (B, T, A), standard normal, fp32."""
        shape = (states.shape[0], self.config.prediction_horizon, self.config.input_dim)
        return torch.randn(shape, device=states.device)

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        hidden_states: Tensor,
        states: Tensor,
        known: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The DDIM loop from `noise` (B, T, A) to an action chunk (B, T, A), normalised, fp32.

        `known` (B, T, A) is inpainted with `weights` (B, T) in [0, 1]: at 1 the chunk is `known` there, and what
        follows is drawn to fit (RePaint, Lugmayr et al., arXiv 2201.09865; real-time chunking, arXiv 2506.07339).
        """
        self.scheduler.set_timesteps(self.config.num_inference_timesteps)
        steps = self.scheduler.timesteps.tolist()
        predict = self.noise_predictor(steps, hidden_states, states)
        x = noise
        for i, step in enumerate(steps):
            if known is not None:
                x = torch.lerp(x, self._at_step(known, noise, step), weights[..., None])
            x = self.scheduler.step(predict(i, x), step, x).prev_sample  # (B, T, A)
        return x if known is None else torch.lerp(x, known, weights[..., None])
