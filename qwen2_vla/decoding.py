"""Writing the sub-step reasoning: greedy, with a static key-value cache, nothing asked of the device within a step.

A draft of the text, such as that of the query before, is read along with the prompt and kept as far as greedy decoding
would have written it (speculative decoding, Leviathan et al., arXiv 2211.17192): the text is the same with and without.
"""

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from .graphs import Graphs, Replayed
from .text import LayerCache, encode_tokens


class StaticCache:
    """Keys and values of every layer, (B, heads, M, d) each, in place for all queries of one shape."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, batch_size: int, length: int):
        config = model.config.text_config
        heads, weight = config.num_key_value_heads, model.get_input_embeddings().weight
        shape = (batch_size, heads, length, config.hidden_size // config.num_attention_heads)
        # tensors of their own, not views of one, or a compiled layer could not tell that it changes its own alone
        self.layers = [
            LayerCache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(config.num_hidden_layers)
        ]

    def at(self, place: Tensor) -> list[LayerCache]:
        """For one token a row at `place` (B,): it attends to itself and all before it."""
        _, heads, length, head_dim = self.layers[0].keys.shape
        index = place.view(-1, 1, 1, 1).expand(-1, heads, 1, head_dim)
        is_later = torch.arange(length, device=place.device) > place[:, None]  # (B, M)
        # numbers, since of booleans attention would make numbers in every layer
        bias = torch.zeros_like(is_later, dtype=self.layers[0].keys.dtype).masked_fill_(is_later, -torch.inf)
        return [layer._replace(index=index, bias=bias[:, None, None]) for layer in self.layers]


class ReasoningWriter:
    """Writes B texts of up to N - 1 tokens to prompts; cache, texts and hidden states have room for M tokens in all.

    After `write` (D is the hidden size):
        hidden (B, M, D): of the prompts' tokens, real ones first; asked (B,): how many those are
        written (B, N) token ids; count (B,): the last one's place, that of `<|im_end|>` unless the limit was reached
        states (B, N, D): hidden states of the written tokens before the last one, and of the first in any case

    `graphs`: what captures the three parts, None for nothing.
    """

    def __init__(
        self,
        model: Qwen2VLForConditionalGeneration,
        batch_size: int,
        room: int,
        most: int,
        end: int,
        graphs: Graphs | None = None,
    ):
        self.model, self.end = model, end
        weight = model.get_input_embeddings().weight
        self.cache = StaticCache(model, batch_size, room)
        self.hidden = weight.new_zeros(batch_size, room, weight.shape[1])
        self.states = weight.new_zeros(batch_size, most, weight.shape[1])
        self.written = torch.zeros(batch_size, most, dtype=torch.long, device=weight.device)
        self.asked, self.count, self.token, self.position, self.limit = torch.zeros(
            5, batch_size, dtype=torch.long, device=weight.device
        )
        self.done, self.is_fed = torch.ones(2, batch_size, dtype=torch.bool, device=weight.device)
        self.goes_on = torch.zeros((), dtype=torch.bool, device=weight.device)
        parts = (self._read, self._step, self._condition)
        self.read, self.step, self.condition = (Replayed(part, graphs) for part in parts)
        self.step()  # captured now, while nothing is being written that it could change

    def write(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        images: list[Tensor],
        drafts: Tensor,
        draft_lengths: Tensor,
        is_given: Tensor,
        limit: int,
    ):
        """Prompts (B, L), positions (3, B, L) and images as in the collator's batch.

        Args:
            drafts: (B, n) token ids, of which draft_lengths (B,) count.
            is_given: (B,) bool: the draft, at least one token, is the text, whatever the model would have written.
            limit: most tokens to write to the others, whose drafts are shorter.
        """
        self.limit.fill_(limit)
        self.read(input_ids, attention_mask, position_ids, drafts, draft_lengths, is_given, *images)
        while self.goes_on.item():
            self.step()

    def _read(self, input_ids, attention_mask, position_ids, drafts, draft_lengths, is_given, *images: Tensor):
        length, most = input_ids.shape[1], drafts.shape[1]
        self.asked.copy_(attention_mask.sum(dim=1))
        start = position_ids.amax(dim=(0, 2)) + 1  # (B,), position of the first answer token
        # a NaN of the last query would get past any mask
        buffers = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        torch._foreach_zero_([*buffers, self.hidden, self.states])
        steps = torch.arange(most, device=drafts.device)
        in_draft = steps < draft_lengths[:, None]  # (B, n)
        hidden = self.model.encode(
            torch.cat([input_ids, drafts], dim=1),
            torch.cat([attention_mask, in_draft.long()], dim=1),
            torch.cat([position_ids, (start[:, None] + steps).expand(3, -1, -1)], dim=2),
            images,
            self.cache.layers,
        )  # (B, L + n, D), real tokens first
        self.hidden[:, : length + most] = hidden
        places = self.asked[:, None] - 1 + torch.arange(most + 1, device=drafts.device)  # (B, n + 1)
        answer = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))  # (B, n + 1, D)
        predicted = self.model.lm_head(answer).argmax(dim=-1)  # (B, n + 1), after the prompt and each draft token
        agreed = in_draft & ((predicted[:, :most] == drafts) | is_given[:, None])
        self.count.copy_(agreed.long().cumprod(dim=1).sum(dim=1))
        self.token.copy_(predicted.gather(1, self.count[:, None])[:, 0])
        self.position.copy_(start + self.count)
        self.states[:, :most] = answer[:, 1:]
        self.written[:, :most] = drafts
        self.written.scatter_(1, self.count[:, None], self.token[:, None])
        self.is_fed.copy_(self.count > 0)
        self.done.copy_(is_given | self._is_last())
        self.goes_on.copy_((~self.done | ~self.is_fed).any())

    def _step(self):
        """Feeds every row's last token and writes the next one to those that are not done."""
        embeddings = self.model.get_input_embeddings()(self.token)[:, None]  # (B, 1, D)
        store = self.cache.at(self.asked + self.count)
        positions = self.position[None, :, None].expand(3, -1, -1)
        hidden = encode_tokens(self.model.model.language_model, embeddings, positions, store)  # (B, 1, D)
        self.states.scatter_(1, self.count.view(-1, 1, 1).expand(-1, 1, hidden.shape[2]), hidden)
        following = self.model.lm_head(hidden[:, 0]).argmax(dim=-1)  # (B,)
        self.token.copy_(torch.where(self.done, self.token, following))
        self.count += ~self.done
        self.position += ~self.done
        self.written.scatter_(1, self.count[:, None], self.token[:, None])
        self.is_fed.fill_(True)
        self.done |= self._is_last()
        self.goes_on.copy_(~self.done.all())

    def _condition(self) -> Tensor:
        """(B, 1, D) for the policy head, of the prompt and the written tokens that count; an answer that is
        `<|im_end|>` alone keeps it, since that is all that a model trained without reasoning has seen."""
        device = self.hidden.device
        is_prompt = torch.arange(self.hidden.shape[1], device=device) < self.asked[:, None]  # (B, M)
        is_answer = torch.arange(self.states.shape[1], device=device) < self.count.clamp(min=1)[:, None]  # (B, N)
        return self.model.fuse(
            torch.cat([self.hidden, self.states], dim=1),
            torch.cat([is_prompt, torch.zeros_like(is_answer)], dim=1),
            torch.cat([torch.zeros_like(is_prompt), is_answer], dim=1),
        )

    def _is_last(self) -> Tensor:
        return (self.token == self.end) | (self.count + 1 >= self.limit)
