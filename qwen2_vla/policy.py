"""A checkpoint folder -> robot observations in, un-normalised action chunks out."""

import os

import cv2
import numpy as np
import torch

from data_utils import center_crop, load_stats, normalize_state, unnormalize_action
from data_utils.errors import UserError

from .loading import load_model, load_processor
from .modeling_qwen2_vla import Qwen2VLForConditionalGenerationForVLA
from .processing_qwen2_vla import Qwen2VLAProcess


class Qwen2VLAPolicy:
    """Acts with a trained checkpoint. The folder alone is enough: it knows cameras, image sizes and statistics."""

    def __init__(self, model: Qwen2VLForConditionalGenerationForVLA, process: Qwen2VLAProcess, stats: dict):
        self.model = model.eval()
        self.process = process
        self.stats = stats
        self.image_size = tuple(model.config.data_config["image_size_stable"])
        self.history = model.config.data_config.get("history_images_length", 1)

    @classmethod
    def from_pretrained(
        cls, folder: str, device: str | torch.device | None = None, *, ema: bool = False
    ) -> "Qwen2VLAPolicy":
        """Loads a checkpoint folder written by training. `device` defaults to the accelerator, else the CPU.

        With `ema` it acts with the averaged weights, if it was trained with `--using_ema True`.

        Raises:
            UserError: when the folder lacks what acting needs.
        """
        if not os.path.isfile(os.path.join(folder, "dataset_stats.json")):
            raise UserError(f"checkpoint {folder}: expected dataset_stats.json, written by training, found none")
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = torch.device(device or accelerator)
        model = load_model(folder, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, ema=ema).to(device)
        data = model.config.data_config
        if not data:
            raise UserError(
                f"checkpoint {folder}: expected data_config (cameras, image sizes) in config.json, found none"
            )
        process = Qwen2VLAProcess(
            load_processor(folder),
            data["camera_names"],
            image_size_wrist=tuple(data["image_size_wrist"]),
            use_reasoning=data["use_reasoning"],
        )
        return cls(model, process, load_stats(folder))

    def predict(self, observation: dict, instruction: str, max_new_tokens: int = 256) -> tuple[np.ndarray, str]:
        """One observation -> what to do next.

        Args:
            observation: `{"images": {camera: (H, W, 3) uint8 RGB}, "qpos": (S,)}` in the robot's units. A policy
                trained with `--history_images_length` F > 1 takes (F, H, W, 3), the current frame last.
            instruction: the task in words.

        Returns:
            actions (T, A) float32 in the robot's units (differences, if trained with delta_control); the reasoning.

        Raises:
            UserError: naming a missing camera or a wrong shape.
        """
        images, qpos = observation["images"], np.asarray(observation["qpos"], dtype=np.float32)
        missing = [name for name in self.process.camera_names if name not in images]
        if missing:
            raise UserError(
                f"observation: expected cameras {', '.join(self.process.camera_names)}, missing {', '.join(missing)}"
            )
        if qpos.shape != self.stats["qpos_mean"].shape:
            raise UserError(f"observation: qpos: expected shape {self.stats['qpos_mean'].shape}, found {qpos.shape}")
        inputs = self.process(
            {
                "images": [self._prepare(name, np.asarray(images[name])) for name in self.process.camera_names],
                "state": torch.from_numpy(normalize_state(qpos, self.stats)),
                "raw_lang": instruction,
            }
        )
        device = self.model.device
        grid = "video_grid_thw" if self.history > 1 else "image_grid_thw"
        actions, texts = self.model.predict_action(
            input_ids=inputs["input_ids"][None].to(device),
            mm_token_type_ids=inputs["mm_token_type_ids"][None].to(device),
            images=[image[None].to(device) for image in inputs["images"]],
            states=inputs["state"][None].to(device),
            tokenizer=self.process.tokenizer,
            max_new_tokens=max_new_tokens,
            **{grid: inputs[grid].to(device)},
        )
        return unnormalize_action(actions[0].cpu().numpy(), self.stats), texts[0].removesuffix("Next action:")

    def _prepare(self, camera: str, image: np.ndarray) -> torch.Tensor:
        """(H, W, 3), or (F, H, W, 3) with history -> (F, 3, h, w) uint8, as the validation set sees it."""
        frames = image[None] if image.ndim == 3 else image
        if frames.ndim != 4 or len(frames) != self.history or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise UserError(
                f"observation: images[{camera!r}]: expected {self.history} frames (H, W, 3) of uint8, found "
                f"{image.shape} of {image.dtype}"
            )
        frames = [cv2.resize(frame, self.image_size) for frame in frames]
        if self.model.config.data_config.get("augment", True):
            frames = [center_crop(frame) for frame in frames]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
