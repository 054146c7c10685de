from transformers import PreTrainedConfig


class UnetDiffusionPolicyConfig(PreTrainedConfig):
    """Sizes of the 1-D conditional UNet head (DiffusionVLA).

    Args:
        input_dim: action dimension A. state_dim: proprioception (qpos) dimension S.
        global_cond_dim: width D of the hidden state that conditions the head.
        prediction_horizon: length T of an action chunk; every level but the last halves it.
        down_dims: channels per level. n_groups: groups of each GroupNorm.

    Raises:
        ValueError: when T cannot be halved that often, or the groups do not divide the channels.
    """

    model_type = "unet_diffusion_policy"

    input_dim: int = 14
    state_dim: int = 14
    global_cond_dim: int = 1536
    prediction_horizon: int = 16
    down_dims: list[int] | tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = 5
    n_groups: int = 8
    diffusion_step_embed_dim: int = 256
    noise_samples: int = 1
    num_train_timesteps: int = 100
    num_inference_timesteps: int = 10

    def __post_init__(self, action_dim: int | None = None, **kwargs):
        if action_dim is not None:
            self.input_dim = action_dim
        factor = 2 ** (len(self.down_dims) - 1)
        if self.prediction_horizon % factor:
            raise ValueError(
                f"the UNet head halves an action chunk {len(self.down_dims) - 1} times: "
                f"expected a chunk_size divisible by {factor}, found {self.prediction_horizon}"
            )
        if any(channels % self.n_groups for channels in self.down_dims):
            raise ValueError(f"down_dims {list(self.down_dims)} are not divisible by n_groups {self.n_groups}")
        super().__post_init__(**kwargs)

    @property
    def output_dim(self) -> int:
        return self.input_dim
