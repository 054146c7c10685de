"""`python benchmarks/start_up.py [--episodes 10000]`: how long training looks at its episodes before it starts.

Writes small synthetic episodes (60 frames, 14 dimensions, three cameras), then times the first start, which reads and
checks them all, the second, which finds them unchanged, and one after 1 % of them were added.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
from tqdm import tqdm

from data_utils import load_data

CAMERAS = ["cam_high", "cam_left_wrist", "cam_right_wrist"]
FRAMES = 60


def write_episodes(folder: Path, first: int, count: int):
    rng = np.random.default_rng(first)
    for i in tqdm(range(first, first + count), desc="writing episodes"):
        with h5py.File(folder / f"episode_{i}.hdf5", "w") as file:
            file.attrs["sim"] = True
            file["action"] = rng.normal(size=(FRAMES, 14)).astype(np.float32)
            file["observations/qpos"] = file["action"][()]
            file["language_raw"] = ["Transfer the red cube to the other arm."]
            file["substep_reasonings"] = ["Pick up the cube."] * FRAMES
            for camera in CAMERAS:
                file[f"observations/images/{camera}"] = np.zeros((FRAMES, 4, 4, 3), np.uint8)


def seconds_to_start(folder: Path) -> float:
    start = time.perf_counter()
    load_data(str(folder), None, CAMERAS, 50)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DEXVLA_CACHE_DIR"] = f"{scratch}/cache"
        folder = Path(scratch) / "episodes"
        folder.mkdir()
        write_episodes(folder, 0, args.episodes)
        first, second = seconds_to_start(folder), seconds_to_start(folder)
        write_episodes(folder, args.episodes, args.episodes // 100)
        added = seconds_to_start(folder)
        kept = sum(path.stat().st_size for path in Path(f"{scratch}/cache").iterdir())
    print(
        f"{args.episodes} episodes: first start {first:.1f} s ({first / args.episodes * 1e3:.2f} ms each), second "
        f"{second:.1f} s, after adding {args.episodes // 100} {added:.1f} s; {kept / 1e6:.0f} MB kept"
    )


if __name__ == "__main__":
    main()
