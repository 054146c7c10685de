"""Shared pieces of the tests: golden numbers, synthetic episodes, running the training script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch
from safetensors.torch import load_file
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from data_utils import save_stats
from qwen2_vla.loading import build_config, load_model, load_processor

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "test" / "golden"
LENGTH, ONE_CAMERA = 12, ["cam_high"]  # of the datasets to be labelled
CAMERAS = ["cam_high", "cam_left_wrist", "cam_right_wrist"]
HEAD = {"depth": 1, "width": 64, "num_heads": 4, "chunk_size": 8}  # of tiny models
EPISODES = [str(GOLDEN / "episodes" / f"episode_{i}.hdf5") for i in range(3)]


def unpack_patches(packed: torch.Tensor) -> torch.Tensor:
    """Golden patches are kept as uint8 and without the temporal copy: (P, 588) -> (P, 1176) float32, normalised."""
    patches = packed.reshape(-1, 3, 1, 14, 14).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((patches - mean) / std).expand(-1, -1, 2, -1, -1).reshape(len(packed), -1)


def golden(name: str) -> dict:
    path = GOLDEN / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    tensors = load_file(path)
    return {k: unpack_patches(v) if k.endswith("pixel_values") else v for k, v in tensors.items()}


def golden_batch() -> dict:
    batch = golden("batch.safetensors")
    return batch | {"attention_mask": batch["attention_mask"].long()}


def relative_error(got, want) -> float:
    got, want = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape
    return ((got - want).norm() / (want.norm() + 1e-12)).item()


def old_name(name: str) -> str:
    """The reference's name of one of our parameters."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_episode(
    path: Path,
    length: int = 12,
    *,
    cameras: list[str] = CAMERAS,
    size: tuple[int, int] = (64, 48),
    dim: int = 14,
    sim: bool = True,
    jpeg: bool = False,
    reasonings: bool = True,
    seed: int = 0,
    instruction: str = "Transfer the red cube to the other arm.",
) -> Path:
    """A synthetic ACT episode; images are smooth, so that JPEG and resizing hardly change them."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = sim
        steps = np.linspace(0, 1, length)[:, None]
        file["action"] = (np.sin(3 * steps + rng.normal(size=dim)) + rng.normal(size=dim)).astype(np.float32)
        file["observations/qpos"] = file["action"][()] + rng.normal(scale=0.01, size=(length, dim))
        file["observations/qvel"] = np.zeros((length, dim), np.float32)
        file.create_dataset("language_raw", data=[instruction])
        if reasonings:
            texts = ["Pick up the cube." if t < length // 2 else "Hand the cube over." for t in range(length)]
            file.create_dataset("substep_reasonings", data=texts)
        compress_len = []
        for camera in cameras:
            small = rng.integers(0, 255, (length, 4, 4, 3), dtype=np.uint8)
            images = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in small])
            if jpeg:
                encoded = [cv2.imencode(".jpg", image)[1].reshape(-1) for image in images]
                compress_len.append([len(data) for data in encoded])
                images = np.zeros((length, max(compress_len[-1])), np.uint8)
                for row, data in zip(images, encoded):
                    row[: len(data)] = data
            file[f"observations/images/{camera}"] = images
        if jpeg:
            file.attrs["compress"] = True
            file["compress_len"] = np.array(compress_len)
    return path


def run(command: list[str], env: dict[str, str] | None = None, timeout: int = 300) -> subprocess.CompletedProcess:
    """Runs a command of the clone; stdout and stderr together in `.stdout`."""
    return subprocess.run(
        [sys.executable, *command] if command[0] in ("train_vla.py", "-m") else command,
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def label_file(dataset: Path, *rows: str, header: str = "episode,start,end,text") -> str:
    """Path of a CSV of reasoning labels, beside the dataset."""
    path = dataset.parent / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def write_checkpoint(
    folder: Path, base: str, stats: dict, head: dict | None = None, untrained: bool = False, **data
) -> str:
    """A tiny policy with random weights, as training would write it. head: settings other than `HEAD`. untrained: its
    head predicts nothing. data: entries of data_config other than the usual."""
    usual = {"camera_names": CAMERAS, "image_size_stable": [84, 56], "image_size_wrist": [56, 56],
             "use_reasoning": True, "delta_control": False, "augment": True}  # fmt: skip
    torch.manual_seed(3)
    config = build_config(base, **HEAD | (head or {}), data_config=usual | data)
    if config.policy_head_config.model_type == "unet_diffusion_policy":
        config.policy_head_config.down_dims = [32, 64]  # instead of 70 M parameters
    model = load_model(base, config)
    for parameter in [] if untrained else model.policy_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # so that it answers to its condition
    model.save_pretrained(folder)
    load_processor(base).save_pretrained(folder)
    save_stats(stats, folder)
    return str(folder)
