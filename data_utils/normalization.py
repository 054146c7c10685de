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
KEYS = ("action_min", "action_max", "qpos_mean", "qpos_std")  # without which nothing can be un-normalised


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


def by_robot(stats: dict) -> dict[str, dict[str, np.ndarray]]:
    """Robot -> its statistics, of both forms: those of one robot, which is then called "default", or that already."""
    return stats if stats and all(isinstance(value, dict) for value in stats.values()) else {"default": stats}


def save_stats(stats: dict, folder: str | os.PathLike):
    """Writes `dataset_stats.json`, and `dataset_stats.pkl` for evaluation scripts of the reference; `stats` are those
    of one robot, or robot -> its statistics."""
    with open(os.path.join(folder, STATS_JSON), "w") as file:
        json.dump(_as_lists(stats), file, indent=1)
    with open(os.path.join(folder, STATS_PKL), "wb") as file:
        pickle.dump(stats, file)


def load_stats(folder: str | os.PathLike, robot: str = "") -> dict[str, np.ndarray]:
    """Reads what `save_stats` wrote for one robot; the pickle is never opened, since it could run code.

    Args:
        robot: which one, where the file may hold several.

    Raises:
        FileNotFoundError: when the folder has no `dataset_stats.json`. UserError: when it does not hold the robot.
    """
    path = os.path.join(folder, STATS_JSON)
    with open(path) as file:
        robots = by_robot(json.load(file))
    if robot not in robots and (robot or len(robots) > 1):
        raise UserError(f"{path}: expected statistics of {robot or 'one robot'}, found those of {', '.join(robots)}")
    return _as_arrays(robots[robot] if robot else next(iter(robots.values())))


def load_robot_stats(folder: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
    """Robot -> its statistics. `dataset_stats.json` holds them by robot, or those of a single one, named "default".

    Raises:
        UserError: when there is none, or one that is no such file.
    """
    path = os.path.join(folder, STATS_JSON)
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {folder}: expected {STATS_JSON}, written by training, found none")
    return read_stats(path)


def read_stats(path: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
    """Robot -> its statistics, of a `dataset_stats.json`, or of the reference's `dataset_stats.pkl`. Of a pickle
    nothing is made but arrays, numbers, texts and containers, so whatever it holds, no code of it runs.

    Raises:
        UserError: for a file that is not there, or holds something else.
    """
    try:
        if str(path).endswith(".json"):
            with open(path) as file:
                stats = json.load(file)
        else:
            with open(path, "rb") as file:
                stats = _ArrayUnpickler(file).load()
        return {str(robot): _as_arrays(its_stats) for robot, its_stats in by_robot(stats).items()}
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise UserError(f"{path}: expected statistics as training writes them, found {error}") from error


def check_stats(stats: dict[str, dict[str, np.ndarray]], action_dim: int, state_dim: int, source: str):
    """Raises UserError, naming `source`, robot and key, unless the statistics are those of a model with this head."""
    for robot, its_stats in stats.items():
        of = f"{source}: " if len(stats) == 1 else f"{source}: {robot}: "
        for key, dim in {key: action_dim if key.startswith("action") else state_dim for key in KEYS}.items():
            if key not in its_stats:
                raise UserError(f"{of}expected {key}, found only {', '.join(its_stats) or 'nothing'}")
            values = its_stats[key]
            if values.shape != (dim,) or not np.isfinite(values).all():
                expected = f"{dim} finite numbers, as the checkpoint's policy head takes"
                raise UserError(f"{of}{key}: expected {expected}, found shape {values.shape}: {values.tolist()!s:.80}")


class _ArrayUnpickler(pickle.Unpickler):
    """Knows what numpy's arrays and numbers are made with, and nothing else."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy.core.", "numpy._core.")  # its name before numpy 2
        makers = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy._core.multiarray", "scalar"): np._core.multiarray.scalar,
            ("numpy._core.numeric", "_frombuffer"): _from_buffer,
            ("collections", "OrderedDict"): dict,
            ("_codecs", "encode"): _encode,
        }
        if (module, name) not in makers:
            raise pickle.UnpicklingError(f"{module}.{name}, which is neither an array nor a number")
        return makers[module, name]


def _from_buffer(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """Old pickles hold an array's bytes as text."""
    return text.encode("latin1")


def _as_lists(stats: dict) -> dict:
    return {key: _as_lists(value) if isinstance(value, dict) else np.asarray(value).tolist()
            for key, value in stats.items()}  # fmt: skip


def _as_arrays(stats: dict) -> dict[str, np.ndarray]:
    return {key: np.asarray(value, dtype=np.float32) for key, value in stats.items()}
