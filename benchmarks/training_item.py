"""`python benchmarks/training_item.py`: what one training item costs a core, beside the least it could cost.

Three raw 480x640 cameras (and the same as JPEG) -> 320x240, augmentation on, tokens, ready for the collator, a thread.
The floor reads (and decodes) the same three frames and resizes each once with cv2. Both run in turn, in one process.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import h5py
import numpy as np
import torch

import qwen2_vla.environment  # noqa: F401
from data_utils import Augmentation, EpisodicDataset, Qwen2VLADataCollatorForSupervisedDataset, get_norm_stats
from qwen2_vla import Qwen2VLAProcess
from qwen2_vla.loading import load_processor
from qwen2_vla.tiny import write_tiny_model

CAMERAS = ["cam_high", "cam_left_wrist", "cam_right_wrist"]
FRAMES, ITEMS = 60, 200


def write_episode(path: Path, jpeg: bool):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = False
        for camera in CAMERAS:
            small = rng.integers(0, 255, (FRAMES, 12, 16, 3), dtype=np.uint8)
            images = np.stack([cv2.resize(image, (640, 480), interpolation=cv2.INTER_CUBIC) for image in small])
            if jpeg:
                encoded = [cv2.imencode(".jpg", image)[1].reshape(-1) for image in images]
                images = np.zeros((FRAMES, max(map(len, encoded))), np.uint8)
                for row, data in zip(images, encoded):
                    row[: len(data)] = data
            file.create_dataset(f"observations/images/{camera}", data=images, chunks=(1, *images.shape[1:]))
        if jpeg:
            file.attrs["compress"] = True
        file["action"] = file["observations/qpos"] = rng.normal(size=(FRAMES, 14))
        file.create_dataset("language_raw", data=["Transfer the red cube to the other arm."])
        file.create_dataset("substep_reasonings", data=["Pick up the cube."] * FRAMES)


def milliseconds(function, arguments) -> float:
    start = time.perf_counter()
    for argument in arguments:
        function(argument)
    return (time.perf_counter() - start) / len(arguments) * 1e3


def main():
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    folder = Path(tempfile.mkdtemp())
    write_tiny_model(folder / "model")
    processor = load_processor(str(folder / "model"))
    rng = np.random.default_rng(0)
    order = rng.integers(0, FRAMES, ITEMS).tolist()
    for kind in ("raw", "jpeg"):
        path = str(folder / f"{kind}.hdf5")
        write_episode(path, jpeg=kind == "jpeg")
        stats, process = get_norm_stats([path]), Qwen2VLAProcess(processor, CAMERAS)
        data = EpisodicDataset([path], CAMERAS, stats, 50, augment=True, transform=process)
        raw_items = EpisodicDataset([path], CAMERAS, stats, 50)
        episode = data.episodes[path]

        def read(t, episode=episode):
            return [episode.frame(camera, t) for camera in CAMERAS]

        def floor(t, read=read):
            return [cv2.resize(frame, (320, 240)) for frame in read(t)]

        for t in order[:20]:
            data[t], floor(t)
        turns = [(milliseconds(data.__getitem__, [a]), milliseconds(floor, [b])) for a, b in zip(order, order[::-1])]
        item, least = np.mean(turns, axis=0)
        frames = floor(0)
        augmented = [Augmentation.draw(rng) for _ in range(50)]
        augmenting = milliseconds(lambda augment, frames=frames: [augment(frame) for frame in frames], augmented)
        items = [raw_items[t] for t in order[:50]]
        milliseconds(process, items)  # fills the caches of texts
        patches = milliseconds(lambda item, process=process: process._images(item["images"]), items)
        text = milliseconds(process, items) - patches
        collator = Qwen2VLADataCollatorForSupervisedDataset(pad_token_id=processor.tokenizer.pad_token_id)
        batch = [data[t] for t in order[:12]]
        collating = milliseconds(collator, [batch] * 10) / len(batch)
        print(
            f"{kind}: {item:.1f} ms an item, floor {least:.1f} ms, ratio {item / least:.1f}; of it read and decode "
            f"{milliseconds(read, order[:50]):.1f}, resize {least - milliseconds(read, order[:50]):.1f}, augment "
            f"{augmenting:.1f}, patches {patches:.1f}, text and labels {text:.1f}; then collating {collating:.1f}"
        )


if __name__ == "__main__":
    main()
