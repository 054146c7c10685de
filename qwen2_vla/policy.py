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

    @classmethod
    def from_pretrained(cls, folder: str, device: str | torch.device | None = None) -> "Qwen2VLAPolicy":
        """Loads a checkpoint folder written by training. `device` defaults to the accelerator, else the CPU.

        Raises:
            UserError: when the folder lacks what acting needs.
        """
        if not os.path.isfile(os.path.join(folder, "dataset_stats.json")):
            raise UserError(f"checkpoint {folder}: expected dataset_stats.json, written by training, found none")
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = torch.device(device or accelerator)
        model = load_model(folder, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16).to(device)
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
            observation: `{"images": {camera: (H, W, 3) uint8 RGB}, "qpos": (S,)}` in the robot's units.
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
        frames = [cv2.resize(images[name], self.image_size) for name in self.process.camera_names]  # (h, w, 3)
        if self.model.config.data_config.get("augment", True):
            frames = [center_crop(frame) for frame in frames]
        inputs = self.process(
            {
                "images": torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2),  # (K, 3, h, w)
                "state": torch.from_numpy(normalize_state(qpos, self.stats)),
                "raw_lang": instruction,
            }
        )
        device = self.model.device
        actions, texts = self.model.predict_action(
            input_ids=inputs["input_ids"][None].to(device),
            mm_token_type_ids=inputs["mm_token_type_ids"][None].to(device),
            pixel_values=inputs["pixel_values"].to(device),
            image_grid_thw=inputs["image_grid_thw"].to(device),
            states=inputs["state"][None].to(device),
            tokenizer=self.process.tokenizer,
            max_new_tokens=max_new_tokens,
        )
        return unnormalize_action(actions[0].cpu().numpy(), self.stats), texts[0].removesuffix("Next action:")
