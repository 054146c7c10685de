"""DexVLA as a small difference to transformers' Qwen2-VL (DexVLA: arXiv 2502.05855)."""

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
    GenerationConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import ModelOutput, logging

from policy_heads.diffusion import ZeroLinear

from .configuration_qwen2_vla import Qwen2VLAConfig
from .fusion import ActionProjector, FiLM, masked_mean
from .patches import image_or_video_patches
from .text import can_encode, encode_tokens, speed_up
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


class Qwen2VLForConditionalGenerationForVLA(Qwen2VLForConditionalGeneration):
    config_class = Qwen2VLAConfig
    config: Qwen2VLAConfig
    # The losses are means over the micro-batch, so the Trainer must do the scaling for gradient accumulation.
    accepts_loss_kwargs = False

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

    def _encode(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, images: list[Tensor]) -> Tensor:
        """What `self.model` computes, hidden states (B, L, D), without a question to the device."""
        order = attention_mask.argsort(dim=1, descending=True, stable=True)  # (B, L), real tokens first
        input_ids, position_ids = input_ids.gather(1, order), position_ids.gather(2, order.expand(3, -1, -1))
        embeddings = self.get_input_embeddings()(input_ids)  # (B, L, D)
        pictures = encode_images(self.model.visual, images).flatten(0, 1).to(embeddings.dtype)  # (N, D)
        is_picture = (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)
        # their places in order; a mask as index would make the host wait for their number, which is known
        places = is_picture.flatten().byte().argsort(descending=True, stable=True)[: len(pictures)]
        embeddings = embeddings.flatten(0, 1).index_copy(0, places, pictures).view_as(embeddings)
        hidden_states = encode_tokens(self.model.language_model, embeddings, position_ids)
        back = order.argsort(dim=1)[..., None].expand_as(hidden_states)
        return hidden_states.gather(1, back)

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
            hidden_states = self._encode(input_ids, attention_mask, position_ids, images)  # (B, L, D)
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

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        states: Tensor | None = None,
        tokenizer=None,
        max_new_tokens: int = 256,
        mm_token_type_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        images: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[str]]:
        """Writes the sub-step reasoning (greedy), then draws an action chunk.

        Args:
            input_ids, attention_mask: (B, L) prompts, left-padded. states: (B, S) normalised qpos.
            pixel_values, image_grid_thw and so on: as for `forward`; `images` instead of the pixel values too.
            tokenizer: decides where the reasoning ends (`<|im_end|>`) and decodes it.

        Returns:
            actions (B, T, A), normalised, fp32; the B texts without special tokens (empty in TinyVLA mode).
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if images is not None:
            pixel_values, pixel_values_videos = image_or_video_patches(images)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "image_grid_thw": image_grid_thw,
            "video_grid_thw": video_grid_thw,
            "mm_token_type_ids": self._token_types(input_ids, mm_token_type_ids),
        }
        prompt = attention_mask.bool()  # (B, L)
        if self.config.is_tinyvla:
            hidden_states = self.model(**inputs, use_cache=False).last_hidden_state  # (B, L, D)
            condition = self.fuse(hidden_states, prompt, torch.zeros_like(prompt))
            return self.policy_head.sample(condition, states), [""] * len(input_ids)

        hidden_states, generated, ended = self._write_reasoning(inputs, tokenizer, max_new_tokens)
        # A token's hidden state exists once it has been fed back, so the last one of a row, <|im_end|>, has none.
        # An answer that is <|im_end|> alone keeps it: that is all the answer such a model was trained on.
        answer = ended.cumsum(dim=1) == 0  # (B, N) tokens before the end
        answer[:, 0] = True
        answer = answer[:, : hidden_states.shape[1] - input_ids.shape[1]]
        nothing_answered, nothing_asked = torch.zeros_like(prompt), torch.zeros_like(answer)
        condition = self.fuse(
            hidden_states, torch.cat([prompt, nothing_asked], dim=1), torch.cat([nothing_answered, answer], dim=1)
        )  # (B, 1, D)
        actions = self.policy_head.sample(condition, states)
        return actions, tokenizer.batch_decode(generated, skip_special_tokens=True)

    evaluate = predict_action

    def _write_reasoning(self, inputs: dict, tokenizer, max_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy decoding that keeps the hidden states it computes anyway.

        Returns:
            hidden_states (B, L + N', D) of the prompt and of every token that was fed back; generated ids (B, N);
            ended (B, N) bool, True at `<|im_end|>`.
        """
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        states = []
        hook = self.model.register_forward_hook(lambda _, __, out: states.append(out.last_hidden_state))
        try:
            out = self.generate(
                **inputs,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=end,
                    pad_token_id=tokenizer.pad_token_id,
                    return_dict_in_generate=True,
                ),
            )
            generated = out.sequences[:, inputs["input_ids"].shape[1] :]  # (B, N)
            if generated.shape[1] == 1:  # nothing was fed back yet: one more step yields the state of the only token
                mask = F.pad(inputs["attention_mask"], (0, 1), value=1)  # (B, L + 1)
                position = mask.sum(dim=1, keepdim=True) - 1 + self.model.rope_deltas.to(mask.device)  # (B, 1)
                self.model(
                    input_ids=generated,
                    attention_mask=mask,
                    position_ids=position[None].expand(3, -1, -1),
                    past_key_values=out.past_key_values,
                )
        finally:
            hook.remove()
        return torch.cat(states, dim=1), generated, generated == end


# Old key names (`visual.*`, `model.layers.*`) are renamed by class name, and not for subclasses, so say it again.
# Registered, saving writes the old names too: reference checkpoints and ours are one format, both ways.
register_checkpoint_conversion_mapping(
    Qwen2VLForConditionalGenerationForVLA.__name__,
    get_checkpoint_conversion_mapping(Qwen2VLForConditionalGeneration.__name__),
    overwrite=True,
)
AutoModelForCausalLM.register(Qwen2VLAConfig, Qwen2VLForConditionalGenerationForVLA)
AutoModelForImageTextToText.register(Qwen2VLAConfig, Qwen2VLForConditionalGenerationForVLA)
