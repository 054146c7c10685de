"""DexVLA as a small difference to transformers' Qwen2-VL (DexVLA: arXiv 2502.05855)."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2VLForConditionalGeneration,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import ModelOutput, logging

from data_utils.normalization import STATS_JSON, load_robot_stats
from policy_heads.diffusion import ZeroLinear

from .acting import ActingMixin
from .configuration_qwen2_vla import Qwen2VLAConfig
from .fusion import ActionProjector, FiLM, masked_mean
from .patches import image_or_video_patches
from .text import LayerCache, can_encode, encode_tokens, speed_up
from .vision import attend_in_groups, encode_images

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
VLA_MODULES = ("policy_head", "input_action_proj", "reasoning_action_proj", "reasoning_film")


@dataclass
class Qwen2VLAOutput(ModelOutput):
    """
    loss: scalar, `action_loss + llm_loss_weight * llm_loss`. llm_loss, action_loss: scalars, fp32.
    logits: (B, N, V) of the N positions that predict an answer token; the prompt has none.
    condition: (B, 1, D), what the policy head saw.
    """

    loss: Tensor | None = None
    llm_loss: Tensor | None = None
    action_loss: Tensor | None = None
    logits: Tensor | None = None
    condition: Tensor | None = None


class Qwen2VLForConditionalGenerationForVLA(ActingMixin, Qwen2VLForConditionalGeneration):
    config_class = Qwen2VLAConfig
    config: Qwen2VLAConfig
    # The losses are means over the micro-batch, so the Trainer must do the scaling for gradient accumulation.
    accepts_loss_kwargs = False
    # Statistics of the robots that the model was trained on, from dataset_stats.json; see `predict_action`.
    norm_stats: dict[str, dict] | None = None

    def __init__(self, config: Qwen2VLAConfig):
        head = config.policy_head_config
        if head is None:
            raise ValueError(
                "this configuration describes a Qwen2-VL without a policy head: expected `policy_head_config`, e.g. "
                "from_pretrained(folder, policy_head_config={'model_type': 'scale_dp_policy', …})"
            )
        if not config.using_film and head.model_type == "scale_dp_policy" and not head.is_tinyvla:
            raise ValueError(
                "using_film False needs is_tinyvla True: ScaleDP normalises pooled states only in TinyVLA mode"
            )
        super().__init__(config)
        attend_in_groups(self.model.visual)
        speed_up(self.model.language_model)
        dim = config.text_config.hidden_size
        self.policy_head = AutoModel.from_config(head)
        self.input_action_proj = ActionProjector(dim)
        if config.using_film:
            self.reasoning_action_proj = ActionProjector(dim)
            self.reasoning_film = FiLM(dim, dim)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if isinstance(module, ZeroLinear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but strict: every weight is loaded, or the folder is a plain Qwen2-VL without any of
        DexVLA's own weights, which then start from their initialisation (one line says so).

        Raises:
            ValueError: naming the weights that the checkpoint lacks or has too many of.
        """
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # instead of transformers' table of missing weights, the check below
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        finally:
            logging.set_verbosity(verbosity)
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        added = {name for name, _ in model.named_parameters() if name.startswith(VLA_MODULES)}
        stored = Qwen2VLAConfig.from_pretrained(pretrained_model_name_or_path)
        if missing >= added and stored.policy_head_config is None:
            logger.warning(
                f"{pretrained_model_name_or_path} has no policy head: {len(added)} tensors of the head and "
                "the fusion start from their initialisation"
            )
            missing -= added
        for what, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                raise ValueError(
                    f"{pretrained_model_name_or_path} does not fit this model: {len(names)} weights are {what}: "
                    f"{', '.join(sorted(names)[:5])}"
                )
        if os.path.isfile(os.path.join(pretrained_model_name_or_path, STATS_JSON)):
            model.norm_stats = load_robot_stats(pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args, **kwargs):
        """As in PyTorch, but the reference's key names are understood too: they are what `save_pretrained` writes."""
        renamed = {}
        for name, tensor in state_dict.items():
            name = re.sub(r"^visual\.", "model.visual.", name)
            renamed[re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", name)] = tensor
        embedding = "model.language_model.embed_tokens.weight"
        if self.config.tie_word_embeddings and embedding in renamed:
            renamed.setdefault("lm_head.weight", renamed[embedding])
        return super().load_state_dict(renamed, *args, **kwargs)

    def _token_types(self, input_ids: Tensor, mm_token_type_ids: Tensor | None) -> Tensor:
        """(B, L): 0 text, 1 image, 2 video; derived from the ids when the caller did not bring it."""
        if mm_token_type_ids is not None:
            return mm_token_type_ids
        image, video = input_ids == self.config.image_token_id, input_ids == self.config.video_token_id
        return image.int() + 2 * video.int()

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        images: list[Tensor],
        store: list[LayerCache] | None = None,
    ) -> Tensor:
        """What `self.model` computes, hidden states (B, L, D), without a question to the device. Every row's real
        tokens come first, what follows them means nothing; `store` as in `encode_tokens`."""
        order = attention_mask.argsort(dim=1, descending=True, stable=True)  # (B, L), real tokens first
        input_ids, position_ids = input_ids.gather(1, order), position_ids.gather(2, order.expand(3, -1, -1))
        embeddings = self.get_input_embeddings()(input_ids)  # (B, L, D)
        pictures = encode_images(self.model.visual, images).flatten(0, 1).to(embeddings.dtype)  # (N, D)
        is_picture = (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)
        # their places in order; a mask as index would make the host wait for their number, which is known
        places = is_picture.flatten().byte().argsort(descending=True, stable=True)[: len(pictures)]
        embeddings = embeddings.flatten(0, 1).index_copy(0, places, pictures).view_as(embeddings)
        return encode_tokens(self.model.language_model, embeddings, position_ids, store)

    def fuse(self, hidden_states: Tensor, prompt: Tensor, answer: Tensor) -> Tensor:
        """Hidden states (B, L, D) and the masks (B, L) of prompt and answer -> condition (B, 1, D) of the head."""
        if not self.config.using_film:
            return masked_mean(hidden_states, prompt | answer)
        summary = masked_mean(hidden_states, prompt)  # (B, 1, D)
        reasoning = self.reasoning_action_proj(masked_mean(hidden_states, answer))  # (B, 1, D)
        return self.reasoning_film(self.input_action_proj(summary), reasoning) + summary

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        images: list[Tensor] | None = None,
        actions: Tensor | None = None,
        states: Tensor | None = None,
        is_pad: Tensor | None = None,
        sources: list | None = None,
        token_counts: list[int] | None = None,
        **kwargs,
    ):
        """Without `actions` this is Qwen2-VL's forward. With them, one training step; see the collator for the batch.

        Args:
            input_ids, labels, attention_mask: (B, L), left-padded.
            pixel_values: (patches, 1176). images: instead of them, one (B, F, h, w, 3) uint8 per camera.
            logits_to_keep: how many positions from the end hold answer tokens, plus one; 0 finds out (a host sync).
            actions: (B, T, A) normalised. states: (B, S) normalised. is_pad: (B, T) bool.
            sources, token_counts: part of the batch, without effect here.

        Returns:
            `Qwen2VLAOutput`, or Qwen2-VL's output without `actions`.
        """
        fast = can_encode(self.model.language_model) and all(x is not None for x in (actions, images, position_ids))
        if images is not None and not fast:
            pixel_values, pixel_values_videos = image_or_video_patches(images)
        if actions is None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                mm_token_type_ids=mm_token_type_ids,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if fast:
            hidden_states = self.encode(input_ids, attention_mask, position_ids, images)  # (B, L, D)
            # back to the batch's order: padding, prompt, answer
            places = attention_mask.cumsum(dim=1) - 1  # (B, L)
            hidden_states = hidden_states.gather(1, places.clamp(min=0)[..., None].expand_as(hidden_states))
        else:
            hidden_states = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                mm_token_type_ids=self._token_types(input_ids, mm_token_type_ids),
                use_cache=False,
                **kwargs,
            ).last_hidden_state  # (B, L, D), after the final norm
        is_label = labels != IGNORE_INDEX  # (B, L)
        if not logits_to_keep:
            first = int(is_label.any(dim=0).int().argmax())
            logits_to_keep = labels.shape[1] - first + 1
        logits = self.lm_head(hidden_states[:, -logits_to_keep:-1])  # (B, N, V)
        targets = labels[:, -logits.shape[1] :]  # (B, N)
        llm_loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)

        answer = is_label.cumsum(dim=1) > 0  # (B, L), everything from the first label on
        present = torch.ones_like(answer) if attention_mask is None else attention_mask.bool()
        condition = self.fuse(hidden_states, ~answer & present, answer)  # (B, 1, D)
        action_loss = self.policy_head(actions=actions, hidden_states=condition, states=states, is_pad=is_pad)["loss"]
        return Qwen2VLAOutput(
            loss=action_loss + self.config.llm_loss_weight * llm_loss,
            llm_loss=llm_loss,
            action_loss=action_loss,
            logits=logits,
            condition=condition,
        )


# Old key names (`visual.*`, `model.layers.*`) are renamed by class name, and not for subclasses, so say it again.
# Registered, saving writes the old names too: reference checkpoints and ours are one format, both ways.
register_checkpoint_conversion_mapping(
    Qwen2VLForConditionalGenerationForVLA.__name__,
    get_checkpoint_conversion_mapping(Qwen2VLForConditionalGeneration.__name__),
    overwrite=True,
)
AutoModelForCausalLM.register(Qwen2VLAConfig, Qwen2VLForConditionalGenerationForVLA)
AutoModelForImageTextToText.register(Qwen2VLAConfig, Qwen2VLForConditionalGenerationForVLA)
