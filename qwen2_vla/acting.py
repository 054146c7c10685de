"""From prompts to action chunks: the acting half of the model."""

from dataclasses import dataclass, field
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .decoding import ReasoningWriter
from .graphs import Graphs, Replayed
from .patches import image_or_video_patches
from .text import can_encode

END = "<|im_end|>"
ROOM_STEP, DRAFT_STEP = 128, 32  # tokens: buffers and captured graphs come in few sizes
# Shapes of queries that keep their buffers: 24 MB a row of a batch for the full-size model (31 kB a token)
MOST_WRITERS = 16
MOST_COMPILED = 32  # shapes of one kind of block


@dataclass
class _Kept:
    """What one query leaves to the next; `key` tells for which weights. A copy of the model starts without it."""

    key: tuple = ()
    graphs: Graphs | None = None
    writers: dict[tuple, ReasoningWriter] = field(default_factory=dict)
    denoise: Replayed | None = None

    def __reduce__(self):
        return _Kept, ()


class ActingMixin:
    """`predict_action` for a Qwen2-VL with a policy head.

    Attributes:
        way_of_acting: "captured", as CUDA graphs where there are any; "fast", nothing is captured; or "plain",
            transformers' `generate`. All give the same.
        last_written: token ids of the answers to the last query in one of the first two ways, row by row.
    """

    way_of_acting = "captured"
    last_written: list[list[int]] = []

    def compile_for_acting(self, **options):
        """Lets torch.compile, with its `options`, make fewer and larger kernels of the repeated blocks: minutes at the
        first queries, less time afterwards."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(**options)
        self.__dict__.pop("_kept", None)  # what was captured before

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
        position_ids: Tensor | None = None,
        *,
        answers: list[str | None] | None = None,
        drafts: list[str | list[int]] | None = None,
        noise: Tensor | None = None,
        known: Tensor | None = None,
        known_weights: Tensor | None = None,
        unnorm_key: str | None = None,
    ) -> tuple[Tensor, list[str]]:
        """Writes the sub-step reasoning (greedy), then draws an action chunk.

        With `images` and `position_ids` it takes the fast way (see decoding.py), else transformers' `generate`; both
        give the same. `answers` and `drafts` are for the fast way only.

        Args:
            input_ids, attention_mask: (B, L) prompts, left-padded. states: (B, S) normalised qpos.
            pixel_values, image_grid_thw and so on: as for `forward`; `images` instead of the pixel values too.
            tokenizer: decides where the reasoning ends (`<|im_end|>`) and decodes it.
            answers: texts to be taken as written; None where the model shall write. drafts: what it will probably
                write ("" for no idea), as text or token ids: saves time, changes nothing.
            noise: (B, T, A), standard normal, that the chunk is denoised from; drawn if None.
            known, known_weights: (B, T, A) normalised and (B, T): actions to be inpainted, see `denoise` of the head.
            unnorm_key: a robot of `norm_stats` (see `from_pretrained`): the actions are then in its units.

        Returns:
            actions (B, T, A), normalised unless `unnorm_key` is given, fp32; the B texts without special tokens (empty
            in TinyVLA mode).
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_fast = images is not None and position_ids is not None and self._can_write_fast()
        if not is_fast and any(answer is not None for answer in answers or []):
            raise ValueError("answers: expected images, position_ids, SDPA attention and a model that writes reasoning")
        if is_fast:
            condition, texts = self._write_fast(
                input_ids, attention_mask, position_ids, images, tokenizer, max_new_tokens, answers, drafts
            )
        else:
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
            condition, texts = self._write_plainly(inputs, tokenizer, max_new_tokens)
        noise = self.policy_head.draw_noise(states) if noise is None else noise
        inpainting = () if known is None else (known, known_weights)
        actions = self._denoise(noise, condition, states, *inpainting)  # (B, T, A)
        return (actions if unnorm_key is None else self._unnormalize(actions, unnorm_key)), texts

    evaluate = predict_action

    def _can_write_fast(self) -> bool:
        config = self.model.language_model.config
        return (
            self.way_of_acting != "plain"
            and config._attn_implementation == "sdpa"
            and can_encode(self.model.language_model)
            and not self.config.is_tinyvla
        )

    def _write_fast(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        images: list[Tensor],
        tokenizer,
        max_new_tokens: int,
        answers: list[str | None] | None,
        drafts: list[str | list[int]] | None,
    ) -> tuple[Tensor, list[str]]:
        """Condition (B, 1, D) and the B texts."""
        batch, length = input_ids.shape
        answers = answers or [None] * batch
        given = [answer is not None for answer in answers]
        texts = [draft if answer is None else answer for answer, draft in zip(answers, drafts or [""] * batch)]
        tokens = _tokenize(tokenizer, texts)
        tokens = [ids if is_given else ids[: max_new_tokens - 1] for ids, is_given in zip(tokens, given)]
        pictures = (self.config.image_token_id, self.config.video_token_id)  # have no place in a text
        tokens = [list(takewhile(lambda token: token not in pictures, ids)) for ids in tokens]
        longest = max(map(len, tokens))
        if self._graphs() is not None:  # none is as long as few, or the second query would be captured, too
            longest = _round_up(max(longest, 1), DRAFT_STEP)
        padded = [ids + [0] * (longest - len(ids)) for ids in tokens]
        most = _round_up(max(max_new_tokens, longest) + 1, ROOM_STEP)
        writer = self._writer(batch, _round_up(length + most, ROOM_STEP), most, tokenizer.convert_tokens_to_ids(END))
        device = input_ids.device
        writer.write(
            input_ids,
            attention_mask,
            position_ids,
            images,
            torch.tensor(padded, dtype=torch.long, device=device).view(batch, longest),
            torch.tensor([len(ids) for ids in tokens], device=device),
            torch.tensor(given, device=device),
            max_new_tokens,
        )
        condition = writer.condition()  # (B, 1, D)
        self.last_written = [ids[: n + 1] for ids, n in zip(writer.written.tolist(), writer.count.tolist())]
        written = tokenizer.batch_decode(self.last_written, skip_special_tokens=True)
        return condition, [answer if answer is not None else text for answer, text in zip(answers, written)]

    def _kept_for_queries(self) -> "_Kept":
        """Made anew when the weights have moved or the way has changed."""
        weight = self.get_input_embeddings().weight
        key = (weight.data_ptr(), weight.device, weight.dtype, self.way_of_acting)
        if "_kept" not in self.__dict__ or self._kept.key != key:
            captures = weight.is_cuda and self.way_of_acting == "captured" and not getattr(self, "is_quantized", False)
            graphs = Graphs(weight.device) if captures else None
            self.__dict__["_kept"] = _Kept(key, graphs, {}, Replayed(self.policy_head.denoise, graphs))
        return self._kept

    def _graphs(self) -> Graphs | None:
        return self._kept_for_queries().graphs

    def _writer(self, batch: int, room: int, most: int, end: int) -> ReasoningWriter:
        """The one for queries of this shape; those that were used last are kept."""
        writers, key = self._kept_for_queries().writers, (batch, room, most, end)
        if key not in writers and len(writers) == MOST_WRITERS:
            del writers[next(iter(writers))]
        writers[key] = writers.pop(key, None) or ReasoningWriter(self, batch, room, most, end, self._graphs())
        return writers[key]

    def _denoise(self, *tensors: Tensor) -> Tensor:
        return self._kept_for_queries().denoise(*tensors)

    def _write_plainly(self, inputs: dict, tokenizer, max_new_tokens: int) -> tuple[Tensor, list[str]]:
        """Condition (B, 1, D) and the B texts, with transformers' own decoding."""
        input_ids, prompt = inputs["input_ids"], inputs["attention_mask"].bool()  # (B, L)
        if self.config.is_tinyvla:
            hidden_states = self.model(**inputs, use_cache=False).last_hidden_state  # (B, L, D)
            return self.fuse(hidden_states, prompt, torch.zeros_like(prompt)), [""] * len(input_ids)
        hidden_states, generated, ended = self._generate(inputs, tokenizer, max_new_tokens)
        # A token's hidden state exists once it has been fed back, so the last one of a row, <|im_end|>, has none.
        # An answer that is <|im_end|> alone keeps it: that is all the answer such a model was trained on.
        answer = ended.cumsum(dim=1) == 0  # (B, N) tokens before the end
        answer[:, 0] = True
        answer = answer[:, : hidden_states.shape[1] - input_ids.shape[1]]
        condition = self.fuse(hidden_states, *_side_by_side(prompt, answer))
        return condition, tokenizer.batch_decode(generated, skip_special_tokens=True)

    def _generate(self, inputs: dict, tokenizer, max_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy decoding that keeps the hidden states it computes anyway.

        Returns:
            hidden_states (B, L + N', D) of the prompt and of every token that was fed back; generated ids (B, N);
            ended (B, N) bool, True at `<|im_end|>`.
        """
        end = tokenizer.convert_tokens_to_ids(END)
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

    def _unnormalize(self, actions: Tensor, unnorm_key: str) -> Tensor:
        """(B, T, A) in [-1, 1] -> the units of one of the robots the model was trained on.

        Raises:
            ValueError: naming the robots whose statistics are known.
        """
        stats = (self.norm_stats or {}).get(unnorm_key)
        if stats is None:
            known = ", ".join(self.norm_stats or {}) or "none: the checkpoint has no dataset_stats.json"
            raise ValueError(f"unnorm_key: expected one of {known}, found {unnorm_key!r}")
        low, high = (torch.as_tensor(stats[key], device=actions.device) for key in ("action_min", "action_max"))
        return (actions + 1) / 2 * (high - low) + low


def _side_by_side(prompt: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (B, L) and (B, N) of prompt and answer -> both over the prompt's and then the answer's (B, L + N)."""
    return (
        torch.cat([prompt, torch.zeros_like(answer)], dim=1),
        torch.cat([torch.zeros_like(prompt), answer], dim=1),
    )


def _tokenize(tokenizer, texts: list[str | list[int]]) -> list[list[int]]:
    return [tokenizer(text).input_ids if isinstance(text, str) else text for text in texts]


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
