"""`python benchmarks/loader_memory.py [--items 20000]`: the memory of one loader worker over many items.

80 episodes, more than are kept open, of raw, JPEG and video frames in turn; items in random order, in this process.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from training_item import CAMERAS, write_episode, write_lerobot

import qwen2_vla.environment  # noqa: F401
from data_utils import EpisodicDataset, find_episodes, get_norm_stats
from qwen2_vla import Qwen2VLAProcess
from qwen2_vla.loading import load_processor
from qwen2_vla.tiny import write_tiny_model


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=20_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tiny_model(folder / "model")
        (folder / "episodes").mkdir()
        for i in range(40):
            write_episode(folder / "episodes" / f"episode_{i}.hdf5", jpeg=i % 2 == 1, frames=10)
        write_lerobot(folder / "lerobot", episodes=40, frames=10)
        paths = find_episodes(folder / "episodes") + find_episodes(folder / "lerobot")
        process = Qwen2VLAProcess(load_processor(str(folder / "model")), CAMERAS)
        data = EpisodicDataset(paths, CAMERAS, get_norm_stats(paths), 50, augment=True, transform=process)
        order = np.random.default_rng(0).integers(0, len(data), args.items).tolist()
        start = time.perf_counter()
        for done, index in enumerate(order, 1):
            data[index]
            if done % (args.items // 10) == 0:
                rate = done / (time.perf_counter() - start)
                print(f"{done} items: {resident_mb():.0f} MB resident, {rate:.0f} items/s", flush=True)


if __name__ == "__main__":
    main()
