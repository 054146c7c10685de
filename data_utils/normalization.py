"""Statistics of a dataset, and the pairs of functions that use them."""

import json
import os
import pickle
from dataclasses import dataclass

import numpy as np

from .errors import UserError

STATS_JSON, STATS_PKL = "dataset_stats.json", "dataset_stats.pkl"
MIN_STD = 1e-2  # a joint that hardly moves must not blow up
RANGE_MARGIN = 1e-4


@dataclass
class Moments:
    """Count, mean, sum of squared deviations, minimum and maximum of rows; mergeable, so no data need be kept."""

    count: int
    mean: np.ndarray
    deviation: np.ndarray
    min: np.ndarray
    max: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> "Moments":
        rows = rows.astype(np.float64)  # (N, D)
        mean = rows.mean(axis=0)
        return cls(len(rows), mean, np.square(rows - mean).sum(axis=0), rows.min(axis=0), rows.max(axis=0))

    def __add__(self, other: "Moments") -> "Moments":
        # Chan et al., Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979)
        count, delta = self.count + other.count, other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.deviation + other.deviation + np.square(delta) * self.count * other.count / count,
            np.minimum(self.min, other.min),
            np.maximum(self.max, other.max),
        )

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.deviation / max(self.count - 1, 1)).clip(MIN_STD)


def make_norm_stats(action: Moments, qpos: Moments, example_qpos: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics under the reference's keys, float32 (D,); `example_qpos` (N, S) is one episode's states."""
    stats = {
        "action_mean": action.mean,
        "action_std": action.std,
        "action_min": action.min - RANGE_MARGIN,
        "action_max": action.max + RANGE_MARGIN,
        "qpos_mean": qpos.mean,
        "qpos_std": qpos.std,
        "example_qpos": example_qpos,
    }
    return {key: np.asarray(value, dtype=np.float32) for key, value in stats.items()}


def normalize_action(action: np.ndarray, stats: dict) -> np.ndarray:
    """Robot units (…, A) -> [-1, 1]."""
    return (action - stats["action_min"]) / (stats["action_max"] - stats["action_min"]) * 2 - 1


def unnormalize_action(action: np.ndarray, stats: dict) -> np.ndarray:
    """[-1, 1] (…, A) -> robot units."""
    return (action + 1) / 2 * (stats["action_max"] - stats["action_min"]) + stats["action_min"]


def normalize_state(qpos: np.ndarray, stats: dict) -> np.ndarray:
    """Robot units (…, S) -> zero mean, unit variance."""
    return (qpos - stats["qpos_mean"]) / stats["qpos_std"]


def unnormalize_state(state: np.ndarray, stats: dict) -> np.ndarray:
    """Zero mean, unit variance (…, S) -> robot units."""
    return state * stats["qpos_std"] + stats["qpos_mean"]


def save_stats(stats: dict[str, np.ndarray], folder: str | os.PathLike):
    """Writes `dataset_stats.json`, and `dataset_stats.pkl` for evaluation scripts of the reference."""
    with open(os.path.join(folder, STATS_JSON), "w") as file:
        json.dump({key: np.asarray(value).tolist() for key, value in stats.items()}, file, indent=1)
    with open(os.path.join(folder, STATS_PKL), "wb") as file:
        pickle.dump(stats, file)


def load_stats(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads what `save_stats` wrote; the pickle is never opened, since it could run code.

    Raises:
        FileNotFoundError: when the folder has no `dataset_stats.json`.
    """
    with open(os.path.join(folder, STATS_JSON)) as file:
        return _as_arrays(json.load(file))


def load_robot_stats(folder: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
    """Robot -> its statistics. `dataset_stats.json` holds them by robot, or those of a single one, named "default".

    Raises:
        UserError: when there is none, or one that is no such file.
    """
    path = os.path.join(folder, STATS_JSON)
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {folder}: expected {STATS_JSON}, written by training, found none")
    try:
        with open(path) as file:
            stats = json.load(file)
        by_robot = stats if all(isinstance(value, dict) for value in stats.values()) else {"default": stats}
        return {robot: _as_arrays(its_stats) for robot, its_stats in by_robot.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected statistics as training writes them, found {error}") from error


def _as_arrays(stats: dict) -> dict[str, np.ndarray]:
    return {key: np.asarray(value, dtype=np.float32) for key, value in stats.items()}
