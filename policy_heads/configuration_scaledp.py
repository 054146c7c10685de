from transformers import PreTrainedConfig

# depth, width, heads of each size (DexVLA, arXiv 2502.05855; Ti, S and B follow ViT; XS is ours, for a CPU)
SCALEDP_SIZES = {
    "ScaleDP_XS": (4, 192, 6),
    "ScaleDP_Ti": (8, 256, 4),
    "ScaleDP_S": (12, 384, 6),
    "ScaleDP_B": (12, 768, 12),
    "ScaleDP_L": (24, 1024, 16),
    "ScaleDP_H": (32, 1280, 16),
}


class ScaleDPPolicyConfig(PreTrainedConfig):
    """Sizes of the ScaleDP diffusion transformer.

    Either `model_size` (a key of `SCALEDP_SIZES`) or all of `depth`, `n_emb` (width) and `num_heads` describe the
    transformer; explicit numbers win. `action_dim` sets `input_dim` and `output_dim` at once.

    Args:
        prediction_horizon: length T of an action chunk, in control steps.
        input_dim, output_dim: action dimension A.
        state_dim: proprioception (qpos) dimension S.
        cond_dim: width D of the hidden state that conditions the head.
        is_tinyvla: pool the hidden states of all tokens and normalise them before use (TinyVLA).
        noise_samples: noise draws per action chunk in one training step.

    Raises:
        ValueError: for an unknown `model_size`, an incomplete explicit size, or a width that the heads do not divide.
    """

    model_type = "scale_dp_policy"

    model_size: str | None = None
    depth: int | None = None
    n_emb: int | None = None
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    input_dim: int = 14
    output_dim: int | None = None
    state_dim: int = 14
    cond_dim: int = 1536
    prediction_horizon: int = 16
    num_queries: int | None = None
    is_tinyvla: bool = False
    noise_samples: int = 1
    num_train_timesteps: int = 100
    num_inference_timesteps: int = 10

    def __post_init__(self, action_dim: int | None = None, **kwargs):
        if action_dim is not None:
            self.input_dim = self.output_dim = action_dim
        explicit = (self.depth, self.n_emb, self.num_heads)
        if None in explicit:
            if self.model_size not in SCALEDP_SIZES:
                raise ValueError(
                    f"unknown ScaleDP size {self.model_size!r}: expected one of {', '.join(SCALEDP_SIZES)}, "
                    f"or all of depth, width and heads (found {explicit})"
                )
            named = SCALEDP_SIZES[self.model_size]
            self.depth, self.n_emb, self.num_heads = (e if e is not None else n for e, n in zip(explicit, named))
        if self.n_emb % self.num_heads:
            raise ValueError(f"ScaleDP width {self.n_emb} is not divisible by {self.num_heads} heads")
        self.output_dim = self.output_dim or self.input_dim
        self.num_queries = self.prediction_horizon  # kept for readers of old configs
        super().__post_init__(**kwargs)
