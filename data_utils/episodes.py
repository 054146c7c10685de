"""ACT-style HDF5 episodes: finding, checking and reading them one frame at a time."""

import os
from collections import OrderedDict
from dataclasses import dataclass

import cv2
import h5py
import numpy as np
from tqdm import tqdm

from .errors import DatasetError
from .normalization import Moments

IMAGES = "observations/images"
JPEG_START = (0xFF, 0xD8)


def find_all_hdf5(dataset_dir: str | os.PathLike, skip_mirrored_data: bool = False) -> list[str]:
    """Sorted paths of all `*.hdf5` below `dataset_dir`.

    Names that contain `features`, folders that contain `pointcloud` and, on request, names that contain `mirror` are
    skipped, as in the reference.

    Raises:
        DatasetError: when the folder does not exist or holds no episode.
    """
    if not os.path.isdir(dataset_dir):
        raise DatasetError(f"dataset_dir {dataset_dir}: expected a folder with *.hdf5 episodes, found no such folder")
    paths = []
    for folder, _, names in os.walk(dataset_dir, followlinks=True):
        for name in names:
            skipped = "features" in name or "pointcloud" in folder or (skip_mirrored_data and "mirror" in name)
            if name.endswith(".hdf5") and not skipped:
                paths.append(os.path.join(folder, name))
    if not paths:
        raise DatasetError(f"dataset_dir {dataset_dir}: expected *.hdf5 episodes, found none")
    return sorted(paths)


def open_episode(path: str | os.PathLike) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(
            f"{path}: expected a readable HDF5 file, found a truncated or other one ({error})"
        ) from error


def as_text(value) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


class Episode:
    """An open episode. Small arrays are in memory, images are read frame by frame.

    Attributes:
        action: (N, A) float32. qpos: (N, S) float32. sim: whether action[t] already answers observation t.
        instruction: the task in words. reasonings: one text per frame, or one for all, or None.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self.file = open_episode(path)
        self.sim = bool(self.file.attrs.get("sim", False))
        self.compressed = bool(self.file.attrs.get("compress", False))
        self.action = self.file["action"][()].astype(np.float32)
        self.qpos = self.file["observations/qpos"][()].astype(np.float32)
        self.instruction = as_text(np.ravel(self.file["language_raw"][()])[0])
        source = next((name for name in ("substep_reasonings", "reasoning") if name in self.file), None)
        self.reasonings = [as_text(text) for text in np.ravel(self.file[source][()])] if source else None
        self.images = {name: self.file[f"{IMAGES}/{name}"] for name in self.file[IMAGES]}

    def __len__(self) -> int:
        return len(self.action)

    def reasoning(self, t: int) -> str:
        return self.reasonings[t if len(self.reasonings) > 1 else 0]

    def frame(self, camera: str, t: int) -> np.ndarray:
        """Frame `t` of `camera`: (H, W, 3) uint8, RGB."""
        data = self.images[camera][t]
        if not self.compressed:
            return data
        # The frames were encoded without a channel swap, so decoding needs none either.
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        if image is None:
            raise DatasetError(f"{self.path}: {IMAGES}/{camera}, frame {t}: expected JPEG bytes, found something else")
        return image

    def close(self):
        self.file.close()


class EpisodeCache:
    """The most recently used open episodes. Every process opens its own: HDF5 handles do not survive a fork."""

    def __init__(self, max_open: int = 64):
        self.max_open = max_open
        self._forget()

    def _forget(self):
        self.pid = os.getpid()
        self.episodes: OrderedDict[str, Episode] = OrderedDict()

    def __getstate__(self):
        return {"max_open": self.max_open}

    def __setstate__(self, state):
        self.__init__(**state)

    def __getitem__(self, path: str) -> Episode:
        if self.pid != os.getpid():
            self._forget()
        if path not in self.episodes:
            if len(self.episodes) >= self.max_open:
                self.episodes.popitem(last=False)[1].close()
            self.episodes[path] = Episode(path)
        self.episodes.move_to_end(path)
        return self.episodes[path]


@dataclass
class EpisodeSummary:
    """What start-up needs to know of an episode, so that each file is read once."""

    path: str
    length: int
    action: Moments
    qpos: Moments


def check_episode(path: str, camera_names: list[str] | None = None, use_reasoning: bool = False) -> EpisodeSummary:
    """Checks one episode's layout and numbers without decoding images.

    Raises:
        DatasetError: naming file, dataset, frame, what was expected and what was found.
    """

    def fail(name: str, expected: str, found) -> None:
        raise DatasetError(f"{path}: {name}: expected {expected}, found {found}")

    with open_episode(path) as file:

        def dataset(name: str) -> h5py.Dataset:
            if not isinstance(file.get(name), h5py.Dataset):
                fail(name, "a dataset", f"none (the file holds {', '.join(sorted(file)) or 'nothing'})")
            return file[name]

        def numbers(name: str) -> np.ndarray:
            data = dataset(name)
            if data.ndim != 2 or data.dtype.kind != "f" or not len(data):
                fail(name, "shape (N, D) of float32 or float64", f"{data.shape} of {data.dtype}")
            values = data[()]
            if not np.isfinite(values).all():
                frame, column = np.argwhere(~np.isfinite(values))[0]
                fail(f"{name}, frame {frame}, dimension {column}", "a finite number", values[frame, column])
            return values

        action, qpos = numbers("action"), numbers("observations/qpos")
        length = len(action)
        if len(qpos) != length:
            fail("observations/qpos", f"{length} frames, as many as action has", len(qpos))

        def check_texts(name: str):
            data = dataset(name)
            if data.dtype.kind not in "OSU" or not data.size:
                fail(name, "text", f"{data.shape} of {data.dtype}")
            try:
                for value in np.ravel(data[()]):
                    as_text(value)
            except UnicodeDecodeError as error:
                fail(name, "UTF-8 text", error)

        check_texts("language_raw")
        if use_reasoning:
            if "substep_reasonings" in file and dataset("substep_reasonings").size != length:
                fail("substep_reasonings", f"{length} texts, one per frame", dataset("substep_reasonings").size)
            if "substep_reasonings" not in file and not ("reasoning" in file and dataset("reasoning").size):
                fail(
                    "substep_reasonings",
                    "one text per frame (or `reasoning` with one, or --use_reasoning False)",
                    "none",
                )

        if use_reasoning:
            check_texts("substep_reasonings" if "substep_reasonings" in file else "reasoning")
        compressed = bool(file.attrs.get("compress", False))
        present = sorted(file[IMAGES]) if isinstance(file.get(IMAGES), h5py.Group) else []
        for camera in camera_names or []:
            name = f"{IMAGES}/{camera}"
            if camera not in present:
                fail(name, "a camera of camera_names", f"only {', '.join(present) or 'no cameras'}")
            data = dataset(name)
            if data.dtype != np.uint8:
                fail(name, "uint8", data.dtype)
            if compressed and data.ndim != 2:
                fail(name, "shape (N, bytes) because the attribute `compress` is set", data.shape)
            if not compressed and data.ndim == 2:
                fail(name, "the attribute `compress`, because the images are (N, bytes)", "no such attribute")
            if not compressed and (data.ndim != 4 or data.shape[-1] != 3):
                fail(name, "shape (N, height, width, 3)", data.shape)
            if len(data) != length:
                fail(name, f"{length} frames, as many as action has", len(data))
            for t in (0, length - 1) if compressed else ():
                if tuple(data[t, :2]) != JPEG_START:
                    fail(f"{name}, frame {t}", "JPEG bytes", f"bytes that start with {data[t, :2].tolist()}")
    return EpisodeSummary(path, length, Moments.of(action), Moments.of(qpos))


def check_episodes(
    paths: list[str],
    camera_names: list[str] | None = None,
    use_reasoning: bool = False,
    action_dim: int | None = None,
    state_dim: int | None = None,
    show_progress: bool = True,
) -> dict[str, EpisodeSummary]:
    """Checks every episode, also against the others, and reports all broken ones at once.

    `action_dim` and `state_dim` default to those of the first episode.

    Raises:
        DatasetError: with one line per broken episode (the first 20 of them).
    """
    summaries, problems = {}, []
    for path in tqdm(paths, desc="checking episodes", disable=not show_progress or len(paths) < 50):
        try:
            summary = check_episode(path, camera_names, use_reasoning)
            action_dim, state_dim = action_dim or summary.action.dim, state_dim or summary.qpos.dim
            for name, flag, expected, found in (
                ("action", "--action_dim", action_dim, summary.action.dim),
                ("observations/qpos", "--state_dim", state_dim, summary.qpos.dim),
            ):
                if expected != found:
                    raise DatasetError(f"{path}: {name}: expected {expected} columns ({flag}), found {found}")
            summaries[path] = summary
        except DatasetError as error:
            problems.append(str(error))
    if problems:
        more = f"\n… and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DatasetError("\n".join(problems[:20]) + more)
    return summaries
