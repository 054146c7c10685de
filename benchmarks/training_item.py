"""`python benchmarks/training_item.py`: what one training item costs a core, beside the least it could cost.

Three cameras -> 320x240, augmentation on, tokens, collated, one thread; from raw and JPEG HDF5 episodes of 480x640, and
from LeRobot videos (AV1, a key frame every second frame) of 240x320 and 480x640, frames at random. Reading a video is
part of decoding it. The floor reads
the same three frames with h5py (and cv2.imdecode), or decodes them, and resizes each once with cv2. Item and floor take
turns, in one process.
"""

import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import h5py
import numpy as np
import torch

import qwen2_vla.environment  # noqa: F401
from data_utils import Augmentation, EpisodicDataset, Qwen2VLADataCollatorForSupervisedDataset, find_episodes
from data_utils import get_norm_stats as stats_of
from data_utils.convert import convert_to_lerobot
from data_utils.convert.hdf5_files import write_hdf5_episode
from data_utils.hdf5 import IMAGES, Hdf5Episode
from qwen2_vla import Qwen2VLAProcess
from qwen2_vla.loading import load_processor
from qwen2_vla.tiny import write_tiny_model

CAMERAS = ["cam_high", "cam_left_wrist", "cam_right_wrist"]
RAW, SMALL = (640, 480), (320, 240)
FRAMES, ITEMS, BATCH = 60, 200, 12


@lru_cache
def scene(camera: int, t: int, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) uint8: soft shapes with a camera's noise, moving 3 pixels a frame."""
    rng = np.random.default_rng(camera)
    soft = cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), RAW, interpolation=cv2.INTER_CUBIC)
    grain = cv2.GaussianBlur(rng.integers(0, 255, (RAW[1], RAW[0], 3), dtype=np.uint8), (0, 0), 1.5)
    return cv2.resize(np.roll(cv2.addWeighted(soft, 0.7, grain, 0.3, 0), 3 * t, axis=1), size)


def write_episode(path: Path, *, jpeg: bool = False, size: tuple[int, int] = RAW, frames: int = FRAMES):
    action = np.random.default_rng(0).normal(size=(frames, 14)).astype(np.float32)
    write_hdf5_episode(
        path,
        source="benchmark",
        action=action,
        qpos=action,
        language="Transfer the red cube to the other arm.",
        sim=True,
        cameras={name: [scene(k, t, size) for t in range(frames)] for k, name in enumerate(CAMERAS)},
        reasonings=["Pick up the cube."] * frames,
        jpeg_quality=90 if jpeg else None,
    )


def write_lerobot(folder: Path, *, episodes: int = 1, frames: int = FRAMES, size: tuple[int, int] = SMALL):
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(episodes):
            write_episode(Path(scratch) / f"episode_{i}.hdf5", size=size, frames=frames)
        convert_to_lerobot(Path(scratch), folder)


def milliseconds(function, arguments) -> float:
    start = time.perf_counter()
    for argument in arguments:
        function(argument)
    return (time.perf_counter() - start) / len(arguments) * 1e3


def measure(name: str, path: str, processor):
    rng = np.random.default_rng(0)
    order = rng.integers(0, FRAMES, ITEMS).tolist()
    process = Qwen2VLAProcess(processor, CAMERAS)
    data = EpisodicDataset([path], CAMERAS, stats_of([path]), 50, augment=True, transform=process)
    collate = Qwen2VLADataCollatorForSupervisedDataset(pad_token_id=processor.tokenizer.pad_token_id)
    episode = data.episodes[path]

    def read(t):
        return [episode.frame(camera, t, SMALL) for camera in CAMERAS]

    plain = h5py.File(path) if isinstance(episode, Hdf5Episode) else None

    def floor(t):
        if plain:
            frames = [plain[f"{IMAGES}/{camera}"][t] for camera in CAMERAS]
            frames = [cv2.imdecode(frame, cv2.IMREAD_COLOR) if episode.compressed else frame for frame in frames]
        else:
            frames = read(t)
        return [cv2.resize(frame, SMALL) for frame in frames]

    def augment(draw):
        return [draw(frame, size) for frame, size in zip(frames, data.augmented_sizes)]

    for t in order[:20]:
        data[t], floor(t)
    turns = [(milliseconds(data.__getitem__, [a]), milliseconds(floor, [b])) for a, b in zip(order, order[::-1])]
    item, least = np.mean(turns, axis=0)
    frames, decoding = floor(0), milliseconds(read, order)
    reading = milliseconds(lambda t: [episode._read(camera, t) for camera in CAMERAS], order) if plain else 0.0
    resize = milliseconds(lambda frames: [cv2.resize(frame, SMALL) for frame in frames], [read(0)] * 50)
    augmenting = milliseconds(augment, [Augmentation.draw(rng) for _ in range(50)])
    images = data._images(episode, 0, (0,))
    ready = {"images": images, "state": torch.zeros(14), "action": torch.zeros(50, 14), "is_pad": torch.zeros(50),
             "raw_lang": episode.instruction(0), "reasoning": episode.reasoning(0)}  # fmt: skip
    text = milliseconds(process, [ready] * 50)
    collating = milliseconds(collate, [[data[t] for t in order[:BATCH]]] * 20) / BATCH
    print(
        f"{name:16s} {item:5.2f} ms an item, floor {least:5.2f} ms, ratio {item / least:4.2f} | read {reading:4.2f}, "
        f"decode {max(decoding - reading, 0):4.2f}, resize {resize:4.2f}, augment {augmenting:4.2f}, "
        f"text {text:4.2f}, collate {collating:4.2f}"
    )


def main():
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tiny_model(folder / "model")
        processor = load_processor(str(folder / "model"))
        write_episode(folder / "raw.hdf5")
        write_episode(folder / "jpeg.hdf5", jpeg=True)
        write_lerobot(folder / "small", size=SMALL)
        write_lerobot(folder / "large", size=RAW)
        for name, path in (
            ("raw", folder / "raw.hdf5"),
            ("JPEG", folder / "jpeg.hdf5"),
            ("video 240x320", find_episodes(folder / "small")[0]),
            ("video 480x640", find_episodes(folder / "large")[0]),
        ):
            measure(name, str(path), processor)


if __name__ == "__main__":
    main()
