"""LeRobot datasets v2.0, v2.1 and v3.0 in a local folder: parquet tables, mp4 videos or embedded images.

The layout was read off datasets written by lerobot 0.3.3 and 0.4.4; the package itself is not needed.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .episodes import CAMERA_PREFIX, Episode, OpenFiles, lerobot_folder
from .errors import DatasetError, Finding
from .summary import EpisodeSummary
from .video import VideoReader

ACTION_NAMES, STATE_NAMES = ("action", "actions"), ("observation.state", "state")
NAME = "episode_{:06d}"
LISTS = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list


@dataclass
class EpisodeFiles:
    """Where one episode's rows and videos are."""

    length: int
    table: Path
    videos: dict[str, tuple[Path, float]] = field(default_factory=dict)  # feature -> (file, seconds before it starts)


class LeRobotDataset:
    """The metadata of a dataset: what it records, which episodes it has, in which files they are."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            self._read()
        except DatasetError:
            raise
        # what JSON and tables of another form lead to
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
            raise DatasetError(
                f"{folder}/meta: expected the metadata of a LeRobot dataset (v2.0, v2.1 or v3.0), found something else "
                f"({type(error).__name__}: {error})"
            ) from error

    def _read(self):
        self.info = _json((self.folder / "meta" / "info.json").read_text("utf-8"), self.folder / "meta" / "info.json")
        version = str(self.info.get("codebase_version"))
        if not version.startswith(("v2.", "v3.")):
            raise DatasetError(f"{self.folder}: codebase_version: expected v2.0, v2.1 or v3.0, found {version}")
        features = self.info["features"]
        self.cameras = {
            name.removeprefix(CAMERA_PREFIX): name for name in features if features[name]["dtype"] in ("video", "image")
        }
        self.action, self.state = (self._feature(names) for names in (ACTION_NAMES, STATE_NAMES))
        self.has_reasoning = features.get("reasoning", {}).get("dtype") == "string"
        # LeRobot's own recordings pair an action with the observation it answers; ours say so when it is not so
        self.sim = bool(self.info.get("dexvla", {}).get("sim", True))
        is_v2 = version.startswith("v2.")
        names = ("tasks.jsonl", "episodes.jsonl") if is_v2 else ("tasks.parquet", "episodes/**/*.parquet")
        found = [path.stat() for name in names for path in (self.folder / "meta").glob(name)]
        # size and last change of what is read below
        self.metadata_status = [sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=-1)]
        self.tasks, self.episodes = self._read_v2() if is_v2 else self._read_v3()

    @classmethod
    def at(cls, folder: str | os.PathLike) -> "LeRobotDataset":
        """As the constructor, but a folder that has not changed is read once."""
        status = os.stat(Path(folder) / "meta" / "info.json")
        return _dataset(os.path.abspath(folder), status.st_mtime_ns, status.st_size)

    def _feature(self, names: tuple[str, ...]) -> str:
        for name in names:
            if name in self.info["features"]:
                return name
        raise DatasetError(f"{self.folder}: expected a feature {names[0]}, found {', '.join(self.info['features'])}")

    def _video_features(self) -> list[str]:
        return [name for name in self.cameras.values() if self.info["features"][name]["dtype"] == "video"]

    def _read_v2(self) -> tuple[dict[int, str], dict[int, EpisodeFiles]]:
        tasks = {row["task_index"]: row["task"] for row in _json_lines(self.folder / "meta" / "tasks.jsonl")}
        episodes = {}
        for row in _json_lines(self.folder / "meta" / "episodes.jsonl"):
            index = row["episode_index"]
            place = {"episode_index": index, "episode_chunk": index // self.info["chunks_size"]}
            videos = {
                name: (self.folder / self.info["video_path"].format(**place, video_key=name), 0.0)
                for name in self._video_features()
            }
            table = self.folder / self.info["data_path"].format(**place)
            episodes[index] = EpisodeFiles(row["length"], table, videos)
        return tasks, episodes

    def _read_v3(self) -> tuple[dict[int, str], dict[int, EpisodeFiles]]:
        table = pq.read_table(self.folder / "meta" / "tasks.parquet")
        text = next(name for name in table.column_names if name != "task_index")  # pandas names its index otherwise
        tasks = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))
        episodes = {}
        for path in sorted((self.folder / "meta" / "episodes").rglob("*.parquet")):
            file = pq.ParquetFile(path)
            columns = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
            for row in file.read(columns=columns).to_pylist():
                place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
                videos = {}
                for name in self._video_features():
                    at = f"videos/{name}"
                    where = {"chunk_index": row[f"{at}/chunk_index"], "file_index": row[f"{at}/file_index"]}
                    video = self.folder / self.info["video_path"].format(**where, video_key=name)
                    videos[name] = (video, row[f"{at}/from_timestamp"])
                table = self.folder / self.info["data_path"].format(**place)
                episodes[row["episode_index"]] = EpisodeFiles(row["length"], table, videos)
        return tasks, episodes

    def episode_paths(self) -> list[str]:
        return [str(self.folder / NAME.format(index)) for index in sorted(self.episodes)]

    def files_of(self, path: str | os.PathLike) -> tuple[int, EpisodeFiles]:
        """`<folder>/episode_000012` -> (12, its files)."""
        name = Path(path).name
        index = int(name.removeprefix("episode_")) if name.removeprefix("episode_").isdecimal() else -1
        if index not in self.episodes:
            raise DatasetError(f"{path}: expected one of the {len(self.episodes)} episodes there, found none such")
        return index, self.episodes[index]


@lru_cache(maxsize=64)
def _dataset(folder: str, mtime_ns: int, size: int) -> LeRobotDataset:
    return LeRobotDataset(folder)


def _json_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [_json(line, f"{path}, line {number}") for number, line in enumerate(file, 1) if line.strip()]


def _json(text: str, place: str | Path) -> dict:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{place}: expected JSON, found something else ({error})") from error


class DataFile:
    """A parquet table that holds one or many episodes. Row groups are read when asked for."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{path}: expected a readable parquet table, found {error}") from error
        metadata = self.file.metadata
        every_group = range(metadata.num_row_groups)
        self.episodes = self._read(every_group, ["episode_index"]).column(0).to_numpy()  # (rows,)
        self.ends = np.cumsum([metadata.row_group(i).num_rows for i in every_group])
        self.images: tuple[tuple[str, int] | None, list] = (None, [])  # the row group of images read last

    def rows_of(self, episode: int) -> slice:
        rows = np.flatnonzero(self.episodes == episode)
        return slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)

    def read(self, columns: list[str], rows: slice) -> pa.Table:
        first, last = np.searchsorted(self.ends, [rows.start, max(rows.stop - 1, 0)], side="right")
        table = self._read(range(first, last + 1) if rows.stop else (), columns)
        start = rows.start - (int(self.ends[first - 1]) if first else 0)
        return table.slice(start, rows.stop - rows.start)

    def _read(self, groups: Iterable[int], columns: list[str]) -> pa.Table:
        names = self.file.schema_arrow.names
        if missing := [name for name in columns if name not in names]:  # pyarrow would leave them out
            raise DatasetError(f"{self.path}: expected a column {missing[0]}, found only {', '.join(names)}")
        try:
            return self.file.read_row_groups(list(groups), columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{self.path}: expected a readable parquet table, found {error}") from error

    def image(self, feature: str, row: int) -> dict:
        """{"bytes", "path"} of an embedded image. Its row group is kept, since neighbours are often asked for."""
        group = int(np.searchsorted(self.ends, row, side="right"))
        if self.images[0] != (feature, group):
            self.images = ((feature, group), self._read([group], [feature]).column(0))
        return self.images[1][row - (int(self.ends[group - 1]) if group else 0)].as_py()

    def close(self):
        self.file.close()


_tables = OpenFiles(DataFile, max_open=16)
_videos = OpenFiles(VideoReader, max_open=48)


class LeRobotEpisode(Episode):
    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self.dataset = LeRobotDataset.at(Path(path).parent)
        self.index, self.files = self.dataset.files_of(path)
        self.sim = self.dataset.sim
        self.compressed = True
        self.camera_names = list(self.dataset.cameras)
        data = _tables[self.files.table]
        self.rows = data.rows_of(self.index)
        columns = [self.dataset.action, self.dataset.state, "timestamp", "task_index"]
        table = data.read(columns + ["reasoning"] * self.dataset.has_reasoning, self.rows)
        self.action, self.qpos = (self._matrix(table, name).astype(np.float32) for name in columns[:2])
        self.seconds = self._matrix(table, "timestamp").reshape(-1).astype(np.float64)  # (N,), from the episode's start
        if not np.isfinite(self.seconds).all():
            frame = np.flatnonzero(~np.isfinite(self.seconds))[0]
            raise DatasetError(f"{path}: timestamp, frame {frame}: expected seconds, found none")
        self.task_indices = table["task_index"].to_pylist()
        self.reasonings = table["reasoning"].to_pylist() if self.dataset.has_reasoning else []

    def _matrix(self, table: pa.Table, name: str) -> np.ndarray:
        """A column of N lists of D numbers, or of N numbers -> (N, D), NaN for none."""
        column = values = table[name].combine_chunks()
        if any(is_type(column.type) for is_type in LISTS):
            sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            if (sizes != sizes[:1]).any() or column.null_count:
                odd = int(np.flatnonzero(sizes != np.median(sizes))[:1].sum())
                expected = f"{np.median(sizes):.0f} numbers, as in most frames"
                raise DatasetError(f"{self.path}: {name}, frame {odd}: expected {expected}, found {sizes[odd]}")
            values = column.flatten()
        if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
            raise DatasetError(f"{self.path}: {name}: expected numbers, or lists of them, found {column.type}")
        return values.to_numpy(zero_copy_only=False).reshape(len(table), -1 if len(table) else 0)

    def instruction(self, t: int) -> str:
        return self.dataset.tasks[self.task_indices[t]]

    def reasoning(self, t: int) -> str | None:
        return self.reasonings[t] if self.reasonings else None

    def frame(self, camera: str, t: int, size: tuple[int, int] | None = None) -> np.ndarray:
        feature = self.dataset.cameras[camera]
        if feature in self.files.videos:
            path, start = self.files.videos[feature]
            return _videos[path].frame(start + self.seconds[t])
        stored = _tables[self.files.table].image(feature, self.rows.start + t)
        try:
            encoded = stored["bytes"] or (self.dataset.folder / stored["path"]).read_bytes()
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        except (OSError, TypeError, KeyError, cv2.error) as error:  # no such file; neither bytes nor a path
            place = f"{self.path}: {feature}, frame {t}"
            raise DatasetError(f"{place}: expected an encoded image, found none ({error})") from error
        if image is None:
            raise DatasetError(f"{self.path}: {feature}, frame {t}: expected an encoded image, found something else")
        return image

    def close(self):
        """Tables and videos serve other episodes too and are closed by their caches."""


def fps_of(path: str, fps: float | None) -> float:
    """Frames per second of an episode: `fps`; if None, what its LeRobot dataset says; else ALOHA's 50."""
    folder = lerobot_folder(path)
    return fps or (folder and LeRobotDataset.at(folder).info.get("fps")) or 50.0


def summarize_lerobot(path: str) -> EpisodeSummary:
    """Checks an episode's rows against the metadata, and that its videos are there and long enough.

    Raises:
        DatasetError: when metadata or table cannot be read.
    """
    episode = LeRobotEpisode(path)
    dataset, files = episode.dataset, episode.files
    summary = EpisodeSummary(path, sim=episode.sim, cameras=episode.camera_names, reasonings=len(episode.reasonings))
    summary.length = len(episode.seconds)
    if summary.length != files.length:
        summary.find(str(files.table), f"{files.length} rows of the episode, as meta says", summary.length)
    summary.action = summary.check_numbers(dataset.action, episode.action)
    summary.qpos = summary.check_numbers(dataset.state, episode.qpos)
    if summary.action is not None and summary.qpos is not None:
        summary.describe_motion(episode.action, episode.qpos)
    summary.describe_instructions(dataset.tasks[i] for i in set(episode.task_indices) & set(dataset.tasks))
    summary.describe_reasonings(episode.reasonings)
    unknown = sorted(set(episode.task_indices) - set(dataset.tasks))
    if unknown:
        summary.find("task_index", f"one of {len(dataset.tasks)} tasks of meta", unknown[0])
    if None in episode.reasonings:
        empty = episode.reasonings.index(None)
        summary.reasoning_findings.append(Finding(path, f"reasoning, frame {empty}", "a text", "none"))
    for camera, feature in dataset.cameras.items():
        about = dataset.info["features"][feature]
        shape = dict(zip(about.get("names") or (), about.get("shape") or ()))
        if "width" in shape and "height" in shape:
            summary.image_sizes[camera] = [shape["width"], shape["height"]]
        if feature in files.videos and summary.length:
            video, start = files.videos[feature]
            try:
                seconds = _videos[video].seconds
                if start + episode.seconds[-1] >= seconds:
                    found = f"{seconds:.3f} s"
                    summary.find(str(video), f"{start + episode.seconds[-1]:.3f} s and a frame", found, camera=camera)
            except DatasetError as error:
                summary.find(feature, "a readable video", error, camera=camera)
    return summary
