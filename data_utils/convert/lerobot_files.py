"""The files of a LeRobot v3.0 dataset, as lerobot 0.4.4 writes them: features, tables, metadata."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..episodes import CAMERA_PREFIX
from .files import partial_file
from .lerobot_stats import joined_stats

CHUNK_SIZE = 1000  # files per folder
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
COUNTERS = ("frame_index", "episode_index", "index", "task_index")


def make_features(settings: dict, videos: dict[str, dict]) -> dict[str, dict]:
    """info.json's features. `videos`: camera -> what `video_info` says."""
    features = {}
    for camera, (height, width) in settings["cameras"].items():
        features[CAMERA_PREFIX + camera] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channel"],
            "info": videos[camera],
        }
    for name, what in (("observation.state", "state"), ("action", "action")):
        shape, names = [settings[f"{what}_dim"]], settings[f"{what}_names"]
        features[name] = {"dtype": "float32", "shape": shape, "names": names}
    if settings["reasoning"]:
        features["reasoning"] = {"dtype": "string", "shape": [1], "names": None}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    return features | {name: {"dtype": "int64", "shape": [1], "names": None} for name in COUNTERS}


def episode_table(columns: dict[str, np.ndarray | list[str]]) -> pa.Table:
    """Columns of N rows -> a table: (N, D > 1) become lists of fixed length, others plain columns. The schema carries
    what the `datasets` library wants to know."""
    arrays, described = {}, {}
    for name, values in columns.items():
        if isinstance(values, list):
            arrays[name], described[name] = pa.array(values, pa.string()), {"dtype": "string", "_type": "Value"}
            continue
        flat = pa.array(values.reshape(-1))
        value = {"dtype": str(values.dtype), "_type": "Value"}
        size = values.size // len(values)
        if size == 1:
            arrays[name], described[name] = flat, value
        else:
            kind = pa.list_(pa.field("element", flat.type), size)
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, type=kind)
            described[name] = {"feature": value, "length": size, "_type": "List"}
    return pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": described}})})


def join_tables(paths: Iterable[Path], target: Path):
    """Writes the tables of several files into one, a row group for each."""
    writer = None
    for path in paths:
        table = pq.read_table(path)
        writer = writer or pq.ParquetWriter(target, table.schema)
        writer.write_table(table, row_group_size=len(table))
    if writer:
        writer.close()


def write_tasks(tasks: list[str], target: Path):
    """tasks.parquet: pandas reads it as a frame whose index is the task's text."""

    def described(name: str | None, field: str | None, kind: str, numpy_type: str, metadata=None) -> dict:
        names = {"name": name, "field_name": field}
        return names | {"pandas_type": kind, "numpy_type": numpy_type, "metadata": metadata}

    index = "__index_level_0__"
    pandas = {
        "index_columns": [index],
        "column_indexes": [described(None, None, "unicode", "object", {"encoding": "UTF-8"})],
        "columns": [
            described("task_index", "task_index", "int64", "int64"),
            described(None, index, "unicode", "object"),
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",  # the oldest form that every later pandas reads
    }
    columns = {"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.large_string())}
    pq.write_table(pa.table(columns).replace_schema_metadata({"pandas": json.dumps(pandas)}), target)


def write_json(value: dict, target: Path):
    target.write_text(json.dumps(value, indent=4, ensure_ascii=False), encoding="utf-8")


def next_file(place: tuple[int, int] | None) -> tuple[int, int]:
    """(chunk, file) after `place`."""
    chunk, file = place or (0, -1)
    return (chunk + 1, 0) if file + 1 >= CHUNK_SIZE else (chunk, file + 1)


def published_episodes(out: Path, count: int) -> list[dict]:
    """Rows of the first `count` episodes; later ones are of a run that did not come to its end."""
    rows = []
    for path in sorted((out / "meta" / "episodes").rglob("*.parquet")):
        rows += [row for row in pq.read_table(path).to_pylist() if row["episode_index"] < count]
    return sorted(rows, key=lambda row: row["episode_index"])


def dataset_stats(rows: list[dict]) -> dict[str, dict]:
    """stats.json from the columns `stats/<feature>/<name>` of all episodes."""
    features: dict[str, list[str]] = {}
    for column in rows[0]:
        if column.startswith("stats/"):
            feature, _, name = column.removeprefix("stats/").rpartition("/")
            features.setdefault(feature, []).append(name)
    return {
        feature: joined_stats([{name: row[f"stats/{feature}/{name}"] for name in names} for row in rows])
        for feature, names in features.items()
    }


def publish(out: Path, rows: list[dict], new: int, tasks: list[str], info: dict, sources: dict):
    """Writes the metadata: of all `rows`, the last `new` of them into a file of their own.

    Every file is whole before it takes its name, and info.json, which says how many episodes there are, comes last: a
    run that is killed in between leaves the dataset as it was, and the next one writes the same files again.
    """
    last = rows[-new - 1] if len(rows) > new else None
    place = next_file(last and (last["meta/episodes/chunk_index"], last["meta/episodes/file_index"]))
    for row in rows[-new:]:
        row["meta/episodes/chunk_index"], row["meta/episodes/file_index"] = place
    meta = out / "meta"
    with partial_file(meta / "tasks.parquet") as target:
        write_tasks(tasks, target)
    with partial_file(meta / "stats.json") as target:
        write_json(dataset_stats(rows), target)
    with partial_file(out / EPISODES_PATH.format(chunk_index=place[0], file_index=place[1])) as target:
        pq.write_table(pa.Table.from_pylist(rows[-new:]), target)
    with partial_file(meta / "dexvla_sources.json") as target:
        write_json(sources, target)
    with partial_file(meta / "info.json") as target:
        write_json(info, target)
