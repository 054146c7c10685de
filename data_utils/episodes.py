"""Episodes, whatever file holds them: what they offer, where they are, and which of them are open.

An episode is named by a path: of its HDF5 file, or `<LeRobot folder>/episode_000012`, which need not be a file.
"""

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import numpy as np

from .errors import DatasetError

CAMERA_PREFIX = "observation.images."  # of LeRobot's feature names


class Episode(ABC):
    """An open episode of N frames. Small arrays are in memory, images are read frame by frame.

    Attributes:
        action: (N, A) float32. qpos: (N, S) float32, proprioception. Both in the robot's units.
        sim: whether action[t] already answers observation t. A real robot's recording lags one step (False).
        camera_names: as the file calls them.
        compressed: whether a frame must be decoded.
    """

    path: str
    action: np.ndarray
    qpos: np.ndarray
    sim: bool
    camera_names: list[str]
    compressed: bool

    def __len__(self) -> int:
        return len(self.action)

    @abstractmethod
    def frame(self, camera: str, t: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Frame `t` of `camera` (a name of `camera_names`): (H, W, 3) uint8, RGB.

        With `size` (width, height) a format that can decode to less does so, down to that size at the least; the
        caller still resizes.

        Raises:
            DatasetError: naming file, camera and frame that cannot be decoded.
        """

    def frames(self, camera: str, t: int, count: int = 1, size: tuple[int, int] | None = None) -> list[np.ndarray]:
        """The `count` frames up to and with `t`; the first frame stands in for those before it."""
        return [self.frame(camera, max(time, 0), size) for time in range(t - count + 1, t + 1)]

    @abstractmethod
    def instruction(self, t: int) -> str:
        """The task in words at frame `t`."""

    @abstractmethod
    def reasoning(self, t: int) -> str | None:
        """The sub-step reasoning at frame `t`; None without such labels."""

    @abstractmethod
    def close(self):
        """Releases the files."""


def lerobot_folder(path: str | os.PathLike) -> Path | None:
    """The LeRobot dataset that the episode `path` belongs to, if it does."""
    folder = Path(path).parent
    return folder if is_lerobot(folder) else None


def is_lerobot(folder: str | os.PathLike) -> bool:
    return (Path(folder) / "meta" / "info.json").is_file()


def open_episode(path: str | os.PathLike) -> Episode:
    """Opens an episode of any format.

    Raises:
        DatasetError: when there is none, or its file is unreadable.
    """
    from .hdf5 import Hdf5Episode
    from .lerobot import LeRobotEpisode

    return LeRobotEpisode(path) if lerobot_folder(path) else Hdf5Episode(path)


def walk(folder: str | os.PathLike) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, through links too, but into no folder twice: a link may lead to a folder above."""
    seen = set()
    for path, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        yield path, subfolders, names


def find_episodes(dataset_dir: str | os.PathLike, skip_mirrored_data: bool = False) -> list[str]:
    """Sorted paths of all episodes below `dataset_dir`: `*.hdf5` files and those of LeRobot datasets.

    Of HDF5 files, names that contain `features`, folders that contain `pointcloud` and, on request, names that contain
    `mirror` are skipped, as in the reference.

    Raises:
        DatasetError: when the folder does not exist or holds no episode.
    """
    from .lerobot import LeRobotDataset

    if not os.path.isdir(dataset_dir):
        raise DatasetError(f"dataset_dir {dataset_dir}: expected a folder with episodes, found no such folder")
    paths = []
    for folder, subfolders, names in walk(dataset_dir):
        if is_lerobot(folder):
            subfolders.clear()
            found = LeRobotDataset.at(folder).episode_paths()
            if not found:
                raise DatasetError(f"{folder}: expected a LeRobot dataset with episodes, found one without")
            paths += found
            continue
        for name in names:
            skipped = "features" in name or "pointcloud" in folder or (skip_mirrored_data and "mirror" in name)
            if name.endswith(".hdf5") and not skipped:
                paths.append(os.path.join(folder, name))
    if not paths:
        raise DatasetError(
            f"dataset_dir {dataset_dir}: expected *.hdf5 episodes or a LeRobot dataset (meta/info.json), found none"
        )
    return sorted(paths)


find_all_hdf5 = find_episodes  # the reference's name


def stored_camera(name: str, available: list[str], camera_map: dict[str, str | list[str]] | None = None) -> str | None:
    """The name under which an episode with the cameras `available` keeps what `camera_names` calls `name`: itself, or
    what `camera_map` lists for it. LeRobot's prefix `observation.images.` may be left out."""
    others = (camera_map or {}).get(name, [])
    for candidate in [*([others] if isinstance(others, str) else others), name]:
        candidate = candidate.removeprefix(CAMERA_PREFIX)
        if candidate in available:
            return candidate
    return None


class OpenFiles:
    """What was opened most recently, by its key; the rest is closed. Every process opens its own: file handles do not
    survive a fork. (`lerobot.py` keeps videos and tables so, `dataset.py` episodes.)"""

    def __init__(self, opener: Callable, max_open: int):
        self.opener = opener
        self.max_open = max_open
        self.pid = os.getpid()
        self.files = OrderedDict()
        self.of_parent = None

    def __reduce__(self):
        return type(self), (self.opener, self.max_open)

    def __getitem__(self, key: Hashable):
        if self.pid != os.getpid():
            # kept, not closed: a decoder that is closed waits for its threads, and a fork has none of them
            self.of_parent = self.files
            self.pid, self.files = os.getpid(), OrderedDict()
        if key not in self.files:
            while len(self.files) >= self.max_open:
                self.files.popitem(last=False)[1].close()
            self.files[key] = self.opener(key)
        self.files.move_to_end(key)
        return self.files[key]
