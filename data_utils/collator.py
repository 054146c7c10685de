from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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

    def __call__(self, items: list[dict]) -> dict[str, Tensor | list[Tensor] | int]:
        def pad(key: str, value: int) -> Tensor:
            return pad_sequence([item[key] for item in items], True, value, padding_side="left")  # (B, L)

        lengths = torch.tensor([len(item["input_ids"]) for item in items])  # (B,)
        longest = int(lengths.max())
        grid = "video_grid_thw" if "video_grid_thw" in items[0] else "image_grid_thw"
        batch = {
            "input_ids": pad("input_ids", self.pad_token_id),
            # by length, not by `!= pad_token_id`: a tokenizer may use one token for padding and as text
            "attention_mask": (torch.arange(longest) >= (longest - lengths)[:, None]).long(),
            "mm_token_type_ids": pad("mm_token_type_ids", 0),
            **self._pixels(items),
            **self._positions(items),
            grid: torch.cat([item[grid] for item in items]),
            "states": torch.stack([item["state"] for item in items]),
        }
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

    def _positions(self, items: list[dict]) -> dict[str, Tensor]:
        if "position_ids" not in items[0]:
            return {}
        padded = pad_sequence([item["position_ids"].T for item in items], True, 0, padding_side="left")  # (B, L, 3)
        return {"position_ids": padded.permute(2, 0, 1)}

    def _pixels(self, items: list[dict]) -> dict[str, Tensor | list[Tensor]]:
        if "images" in items[0]:
            return {"images": [torch.stack(images) for images in zip(*(item["images"] for item in items), strict=True)]}
        return {"pixel_values": torch.cat([item["pixel_values"] for item in items])}  # patches made elsewhere
