from typing import Any

from transformers import AutoConfig, PreTrainedConfig, Qwen2VLConfig

import policy_heads  # noqa: F401  registers the head configurations with AutoConfig


class Qwen2VLAConfig(Qwen2VLConfig):
    """A Qwen2-VL configuration plus what DexVLA adds to it.

    Reads a plain Qwen2-VL folder (`policy_head_config` is then None), the reference's flat config.json, and its own.

    Args:
        policy_head_type: `scale_dp_policy` or `unet_diffusion_policy`. policy_head_size: e.g. `ScaleDP_H`.
        policy_head_config: configuration of the diffusion head, as an object or as a dict with `model_type`.
        using_film: fuse prompt and reasoning with FiLM; False conditions the head on the pooled hidden states.
        llm_loss_weight: weight of the language-model loss in the total loss.
        data_config: how the training data was prepared (cameras, image sizes, …), so that a checkpoint alone can act.
    """

    model_type = "qwen2_vla"

    policy_head_type: str = "scale_dp_policy"
    policy_head_size: str | None = None
    policy_head_config: Any = None
    using_film: bool = True
    llm_loss_weight: float = 1.0
    data_config: dict | None = None

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config, kwargs = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") == "qwen2_vl":  # an official folder; a VLA is what the caller asked for
            config["model_type"] = cls.model_type
            config["architectures"] = None
        return config, kwargs

    def __post_init__(self, **kwargs):
        if isinstance(self.vision_config, dict):
            # The reference, like early Qwen2-VL, wrote the whole model's type here
            self.vision_config = self.vision_config | {"model_type": "qwen2_vl_vision"}
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value):
        if name == "policy_head_config" and isinstance(value, dict):
            value = AutoConfig.for_model(**({"model_type": self.policy_head_type} | value))
        super().__setattr__(name, value)

    @property
    def is_tinyvla(self) -> bool:
        return isinstance(self.policy_head_config, PreTrainedConfig) and bool(
            getattr(self.policy_head_config, "is_tinyvla", False)
        )


AutoConfig.register("qwen2_vla", Qwen2VLAConfig)
