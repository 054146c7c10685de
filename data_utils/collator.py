from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class Qwen2VLADataCollatorForSupervisedDataset:
    """Processed items -> a batch that `model(**batch)` takes as it is.

    The batch (B items, L the longest sequence, K cameras, T action rows):
        input_ids (B, L) int64, left-padded with `pad_token_id` · attention_mask (B, L) int64, 0 on padding ·
        labels (B, L) int64, -100 but on the answer · mm_token_type_ids (B, L) int64, 1 on image tokens, 2 on video ·
        position_ids (3, B, L) int64: time, row and column for the rotary embedding ·
        images list of K (B, F, h, w, 3) uint8 RGB on Qwen2-VL's grid, F frames (1 without history), which the model
            normalises and cuts into patches · image_grid_thw (B*K, 3) int64, `video_grid_thw` for F > 1 ·
        states (B, S) float32 · actions (B, T, A) float32 in [-1, 1] · is_pad (B, T) bool ·
        logits_to_keep int: the longest answer plus one, so that no prompt position gets logits ·
        sources list of B (episode path, frame), token_counts list of B int: for the log; the model ignores them
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1  # of tokens; compiled code then sees few lengths

    def __call__(self, items: list[dict]) -> dict[str, Tensor | list[Tensor] | int]:
        lengths = torch.tensor([len(item["input_ids"]) for item in items])  # (B,)
        longest = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def pad(key: str, value: int) -> Tensor:
            """(…, L) of every item, padded at the left -> (B, …, longest)."""
            return torch.stack([F.pad(item[key], (longest - item[key].shape[-1], 0), value=value) for item in items])

        grid = "video_grid_thw" if "video_grid_thw" in items[0] else "image_grid_thw"
        batch = {
            "input_ids": pad("input_ids", self.pad_token_id),
            # by length, not by `!= pad_token_id`: a tokenizer may use one token for padding and as text
            "attention_mask": (torch.arange(longest) >= (longest - lengths)[:, None]).long(),
            "mm_token_type_ids": pad("mm_token_type_ids", 0),
            **self._pixels(items),
            grid: torch.cat([item[grid] for item in items]),
            "states": torch.stack([item["state"] for item in items]),
        }
        if "position_ids" in items[0]:
            batch["position_ids"] = pad("position_ids", 0).transpose(0, 1)  # (3, B, L)
        if "labels" in items[0]:
            batch |= {
                "labels": pad("labels", IGNORE_INDEX),
                "actions": torch.stack([item["action"] for item in items]),
                "is_pad": torch.stack([item["is_pad"] for item in items]),
                "sources": [item.get("source") for item in items],
                "token_counts": lengths.tolist(),
                "logits_to_keep": max(int((item["labels"] != IGNORE_INDEX).sum()) for item in items) + 1,
            }
        return batch

    def _pixels(self, items: list[dict]) -> dict[str, Tensor | list[Tensor]]:
        if "images" in items[0]:
            return {"images": [torch.stack(images) for images in zip(*(item["images"] for item in items), strict=True)]}
        return {"pixel_values": torch.cat([item["pixel_values"] for item in items])}  # patches made elsewhere
