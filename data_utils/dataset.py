"""From TASK_CONFIGS to training items."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from .augment import Augmentation, center_crop
from .doctor.checks import print_fast_findings
from .episodes import Episode, OpenFiles, find_episodes, open_episode, stored_camera
from .errors import DatasetError
from .index import check_episodes, summarize_all
from .normalization import Moments, by_robot, make_norm_stats, normalize_action, normalize_state
from .summary import EpisodeSummary

SPLIT_SEED = 1  # the reference splits after seeding numpy with 1
OPEN_EPISODES = 64  # per process


class EpisodicDataset(Dataset):
    """Every frame of every episode is an item: what the robot saw there, and the action chunk that follows.

    An item without `transform` (K cameras, S state and A action dimensions, T = `chunk_size`):
        images (K, 3, h, w) uint8 RGB · state (S,) float32 normalised · action (T, A) float32 in [-1, 1] ·
        is_pad (T,) bool, True beyond the episode's end · raw_lang str · reasoning str ("" without `use_reasoning`) ·
        source (episode path, frame)
    With `history_images_length` F > 1, images are (K, F, 3, h, w): the F - 1 frames before, then the current one.

    Args:
        episode_paths: HDF5 files, layout in README.md, or episodes of LeRobot datasets (`<folder>/episode_000012`).
        camera_names: K cameras, in the order the model sees them. camera_map: their names in the files, where they
            differ: name -> name or list of names.
        norm_stats: what `get_norm_stats` returns; or robot -> that, with `robots`, the robot of every episode.
        image_size_stable: (width, height) every frame is resized to.
        delta_control: actions become differences to the next row; the last real row becomes 0.
        augment: random crop, rotation and colours, one draw per item. center_crop: the middle 95 % instead, which is
            what a policy trained with augmentation sees when it acts.
        transform: item -> what the collator takes, e.g. a `Qwen2VLAProcess`. If it has `grid_sizes`, augmented images
            come in the sizes that names, resized in the same warp that crops and rotates them.
        episode_lengths: frames per episode, if known; read from the files otherwise.
    """

    def __init__(
        self,
        episode_paths: list[str],
        camera_names: list[str],
        norm_stats: dict,
        chunk_size: int,
        *,
        robots: list[str] | None = None,
        image_size_stable: tuple[int, int] = (320, 240),
        use_reasoning: bool = True,
        delta_control: bool = False,
        augment: bool = False,
        center_crop: bool = False,
        history_images_length: int = 1,
        camera_map: dict[str, str | list[str]] | None = None,
        transform: Callable[[dict], dict] | None = None,
        episode_lengths: list[int] | None = None,
    ):
        self.episode_paths = [str(path) for path in episode_paths]
        self.camera_names = list(camera_names)
        self.robot_stats = {
            robot: {key: np.asarray(value) for key, value in stats.items() if key != "example_qpos"}
            for robot, stats in by_robot(norm_stats).items()
        }
        self.robots = dict(zip(self.episode_paths, robots, strict=True)) if robots else {}
        self.chunk_size = chunk_size
        self.image_size = tuple(image_size_stable)
        self.use_reasoning = use_reasoning
        self.delta_control = delta_control
        self.augment = augment
        self.center_crop = center_crop
        self.history = history_images_length
        self.camera_map = camera_map
        self.transform = transform
        self.augmented_sizes = self._augmented_sizes()
        self.episode_lengths = np.asarray(episode_lengths or [len(open_episode(path)) for path in self.episode_paths])
        self.episode_ends = self.episode_lengths.cumsum()
        self.episodes = OpenFiles(open_episode, OPEN_EPISODES)

    def _augmented_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every camera after augmentation: those of the model's grid, unless so much smaller that
        the warp, which looks at four pixels only, would skip some."""
        if not hasattr(self.transform, "grid_sizes"):
            return [self.image_size] * len(self.camera_names)
        width, height = self.image_size
        grid_sizes = self.transform.grid_sizes(self.image_size)
        return [(w, h) if 2 * w >= width and 2 * h >= height else self.image_size for w, h in grid_sizes]

    def __len__(self) -> int:
        return int(self.episode_ends[-1]) if len(self.episode_ends) else 0

    def locate(self, index: int) -> tuple[str, int]:
        """Item index -> (episode path, frame)."""
        episode = int(np.searchsorted(self.episode_ends, index, side="right"))
        start = self.episode_ends[episode] - self.episode_lengths[episode]
        return self.episode_paths[episode], int(index - start)

    def __getitem__(self, index: int | tuple[int, tuple[int, ...]]) -> dict:
        """Item `index`, or `(index, draw)`: the numbers `draw` then seed the augmentation, so that an item depends on
        its place in the run and not on what the process did before."""
        index, draw = index if isinstance(index, tuple) else (index, None)
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        path, t = self.locate(index % len(self))
        episode = self.episodes[path]
        stats = self.robot_stats[self.robots[path]] if self.robots else next(iter(self.robot_stats.values()))
        action, is_pad = self._action_chunk(episode.action, t, episode.sim)
        item = {
            "images": self._images(episode, t, draw),
            "state": torch.from_numpy(normalize_state(episode.qpos[t], stats)),
            "action": torch.from_numpy(normalize_action(action, stats)),
            "is_pad": torch.from_numpy(is_pad),
            "raw_lang": episode.instruction(t),
            "reasoning": episode.reasoning(t) or "" if self.use_reasoning else "",
            "source": (path, t),
        }
        if self.transform:
            return self.transform(item)
        item["images"] = torch.stack(item["images"])
        return item if self.history > 1 else item | {"images": item["images"].squeeze(1)}

    def _images(self, episode: Episode, t: int, draw: tuple[int, ...] | None) -> list[torch.Tensor]:
        """One tensor (F, 3, h, w) uint8 per camera: the frames up to `t`."""
        augmentation = None
        if self.augment:
            augmentation = Augmentation.draw(np.random.default_rng(draw or int(torch.randint(2**62, ()))))
        images = []
        for camera, augmented_size in zip(self.camera_names, self.augmented_sizes):
            stored = stored_camera(camera, episode.camera_names, self.camera_map)
            if stored is None:
                found = ", ".join(episode.camera_names) or "none"
                raise DatasetError(f"{episode.path}: expected a camera {camera}, found {found}")
            frames = []
            for frame in episode.frames(stored, t, self.history, self.image_size):
                frame = cv2.resize(frame, self.image_size)
                if augmentation:
                    frame = augmentation(frame, augmented_size)
                elif self.center_crop:
                    frame = center_crop(frame)
                frames.append(frame)
            stacked = frames[0][None] if self.history == 1 else np.stack(frames)  # (F, h, w, 3)
            images.append(torch.from_numpy(stacked).permute(0, 3, 1, 2))
        return images

    def _action_chunk(self, action: np.ndarray, t: int, sim: bool) -> tuple[np.ndarray, np.ndarray]:
        """Actions (N, A) of an episode -> the T rows from `t` on, zero-padded, and the padding mask (T,)."""
        # A real robot records the command it is still executing, one step late
        rows = action[t if sim else max(0, t - 1) :]
        if self.delta_control:
            rows = np.diff(rows, axis=0, append=rows[-1:])
        rows = rows[: self.chunk_size]
        chunk = np.zeros((self.chunk_size, action.shape[1]), dtype=np.float32)
        chunk[: len(rows)] = rows
        return chunk, np.arange(self.chunk_size) >= len(rows)


def get_norm_stats(episode_paths: Iterable[str]) -> dict[str, np.ndarray]:
    """Statistics over all frames of the episodes: mean, std (unbiased, >= 0.01), min and max of actions, mean and std
    of qpos; float32 (D,). `example_qpos` is the last episode's."""
    summaries = summarize_all([str(path) for path in episode_paths])
    check_episodes(summaries)
    return _stats_of(summaries)


def _stats_of(summaries: dict[str, EpisodeSummary]) -> dict[str, np.ndarray]:
    def total(moments: list[Moments]) -> Moments:
        return sum(moments[1:], start=moments[0])

    last = open_episode(list(summaries)[-1])
    example_qpos = last.qpos
    last.close()
    return make_norm_stats(
        total([summary.action for summary in summaries.values()]),
        total([summary.qpos for summary in summaries.values()]),
        example_qpos,
    )


@dataclass
class SamplingPlan:
    """What a sampler needs to know: frames of every training episode, its dataset_dir, and the weight of each of
    those (None: every frame is as likely); whether an episode is drawn before its frame."""

    episode_lengths: list[int]
    episode_sources: list[int]
    sample_weights: list[float] | None
    episode_first: bool = False


def as_folders(folders: str | os.PathLike | Iterable[str]) -> list[str]:
    return [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)


def folders_of_robots(stats_dir: str | list[str] | dict | None, dataset_dirs: list[str]) -> dict[str, list[str]]:
    """Robot -> the folders that its statistics are made of; one without a name, "", if `stats_dir` names none."""
    by_name = stats_dir if isinstance(stats_dir, dict) else {"": stats_dir or dataset_dirs}
    return {robot: as_folders(folders) for robot, folders in by_name.items()}


def robots_of(robot_dirs: dict[str, list[str]], dataset_dirs: list[str]) -> list[str]:
    """The robot of every dataset_dir: one of its folders is that directory, or holds it.

    Raises:
        DatasetError: when that is not so of exactly one robot, or a robot has no dataset_dir.
    """
    known = "; ".join(f"{robot}: {', '.join(map(str, folders))}" for robot, folders in robot_dirs.items())
    robots = []
    for folder in dataset_dirs:
        real = Path(folder).resolve()
        found = [r for r, its in robot_dirs.items() if any(real.is_relative_to(Path(own).resolve()) for own in its)]
        if len(found) != 1:
            raise DatasetError(
                f"dataset_dir {folder}: expected it in the stats_dir of one robot ({known}), found it in those of "
                f"{' and '.join(found) or 'none'}"
            )
        robots += found
    for robot in robot_dirs:
        if robot not in robots:
            raise DatasetError(f"stats_dir: {robot}: expected a dataset_dir in its folders, found none ({known})")
    return robots


def load_data(
    dataset_dir: str | list[str],
    name_filter: Callable[[str], bool] | None,
    camera_names: list[str],
    chunk_size: int,
    *,
    stats_dir: str | list[str] | dict[str, str | list[str]] | None = None,
    sample_weights: list[float] | None = None,
    train_ratio: float = 0.999,
    episode_first: bool = False,
    skip_mirrored_data: bool = False,
    action_dim: int | None = None,
    state_dim: int | None = None,
    augment: bool = True,
    transform: Callable[[dict], dict] | None = None,
    camera_map: dict[str, str | list[str]] | None = None,
    show_progress: bool = True,
    **dataset_options,
) -> tuple[EpisodicDataset, EpisodicDataset | None, dict, SamplingPlan]:
    """Finds, checks and splits the episodes of a task.

    The validation episodes are drawn from the first directory alone; the others are training data. `dataset_options`
    go to `EpisodicDataset`. A `stats_dir` that maps robots to folders makes statistics of each, and every dataset_dir
    is normalised with those of the robot whose folder it is or lies in.

    What was found in the episodes is kept between runs (see `summarize_all`). With `show_progress`, what looks wrong
    with them is printed; see `python -m data_utils.doctor`.

    Returns:
        training set, validation set (None when the split leaves nothing for it), statistics (by robot, if stats_dir
        is), sampling plan.

    Raises:
        DatasetError: for a missing or empty directory, a broken episode, weights that do not fit the directories, or
            a directory that is not exactly one robot's.
    """
    dirs = as_folders(dataset_dir)
    robot_dirs = folders_of_robots(stats_dir, dirs)
    robots = robots_of(robot_dirs, dirs) if isinstance(stats_dir, dict) else None  # of every directory
    if sample_weights is not None and (
        len(sample_weights) != len(dirs) or min(sample_weights) < 0 or not sum(sample_weights)
    ):
        raise DatasetError(
            f"sample_weights: expected {len(dirs)} non-negative numbers, one per dataset_dir, found {sample_weights}"
        )

    def episodes_in(folder: str) -> list[str]:
        found = find_episodes(folder, skip_mirrored_data)
        keep_all = name_filter is None or folder not in dirs  # a stats_dir of its own is taken whole
        paths = [path for path in found if keep_all or name_filter(path)]
        if not paths:
            raise DatasetError(f"dataset_dir {folder}: name_filter leaves none of its {len(found)} episodes")
        return paths

    every_dir = dict.fromkeys(dirs + [folder for folders in robot_dirs.values() for folder in folders])
    paths_of = {folder: episodes_in(folder) for folder in every_dir}
    first = paths_of[dirs[0]]
    order = np.random.RandomState(SPLIT_SEED).permutation(len(first))
    num_train = max(1, int(train_ratio * len(first)))
    validation = [first[i] for i in order[num_train:]]
    train = [(first[i], 0) for i in order[:num_train]]
    train += [(path, source) for source, folder in enumerate(dirs[1:], start=1) for path in paths_of[folder]]

    summaries: dict[str, EpisodeSummary] = {}
    for folder, paths in paths_of.items():
        summaries |= summarize_all(paths, folder, show_progress)
    sources = [source for _, source in train]
    source_of = dict(train) | dict.fromkeys(validation, 0)  # of the episodes in use
    use_reasoning = dataset_options.get("use_reasoning", True)
    check_episodes({p: summaries[p] for p in source_of}, camera_names, use_reasoning, action_dim, state_dim, camera_map)
    for robot in robot_dirs if show_progress else []:
        its_own = [summaries[p] for p, source in source_of.items() if robots is None or robots[source] == robot]
        print_fast_findings(its_own, chunk_size, camera_names, camera_map, use_reasoning)
    stats_paths = {robot: [p for folder in its for p in paths_of[folder]] for robot, its in robot_dirs.items()}
    first_summary = summaries[train[0][0]]
    check_episodes(
        {path: summaries[path] for paths in stats_paths.values() for path in paths},
        action_dim=first_summary.action.dim,
        state_dim=first_summary.qpos.dim,
    )
    stats = {robot: _stats_of({path: summaries[path] for path in paths}) for robot, paths in stats_paths.items()}
    stats = stats if robots else next(iter(stats.values()))

    def dataset(paths: list[str], **images) -> EpisodicDataset:
        lengths = [summaries[path].length for path in paths]
        its_robots = [robots[source_of[path]] for path in paths] if robots else None
        return EpisodicDataset(
            paths, camera_names, stats, chunk_size,
            robots=its_robots, **images, transform=transform, camera_map=camera_map,
            episode_lengths=lengths, **dataset_options,
        )  # fmt: skip

    train_set = dataset([path for path, _ in train], augment=augment)
    plan = SamplingPlan(train_set.episode_lengths.tolist(), sources, sample_weights, episode_first)
    return train_set, dataset(validation, center_crop=augment) if validation else None, stats, plan
