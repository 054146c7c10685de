"""Episodes of any format -> a LeRobot v3.0 dataset.

Each episode is written on its own into OUT/.staging; at the end those are joined to files of many episodes, and the
metadata is written. So a run that was interrupted is taken up after its last whole episode, and a finished dataset
grows by new files.
"""

import os
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from ..episodes import CAMERA_PREFIX, Episode, open_episode
from ..errors import DatasetError
from ..hdf5 import IMAGES, Hdf5Episode
from ..lerobot import LeRobotEpisode
from .files import (
    Report,
    check_places,
    chosen_cameras,
    episode_sources,
    folder_of,
    partial_file,
    size_of,
    size_of_episodes,
)
from .lerobot_files import (
    CHUNK_SIZE,
    DATA_PATH,
    VIDEO_PATH,
    episode_table,
    join_tables,
    make_features,
    next_file,
    publish,
    write_json,
)
from .lerobot_source import camera_frames, left_out, sound_summary
from .lerobot_state import STAGED, Options, State
from .lerobot_stats import ImageStats, number_stats
from .lerobot_video import choose_encoder, codec_header, join_videos, video_info, write_video

DEFAULT_FPS, DEFAULT_ROBOT = 50, "aloha"
HDF5_KNOWN = {"action", "observations/qpos", "language_raw", "substep_reasonings", "reasoning", "compress_len"}


def convert_to_lerobot(source: Path, out: Path, codec: str = "av1", **options) -> Report:
    """Writes all episodes of `source`, HDF5 or LeRobot, into the LeRobot v3.0 dataset `out`; those that it holds
    already are kept and skipped. Action rows are stored as they are; for `sim` False info.json says so.

    Args:
        codec: av1, h264 or hevc. options: the other fields of `Options`.

    Raises:
        DatasetError: naming an episode that is broken or unlike the others of the dataset.
    """
    check_places(source, out)
    options = Options(encoder=choose_encoder(codec), **options)
    state, base, paths = State.of(out), folder_of(source), episode_sources(source)
    known = {entry["name"]: entry["fingerprint"] for entry in state.sources}
    report, not_written = Report(out), {}
    for path in tqdm(paths, desc="converting", unit="episode"):
        name = Path(path).relative_to(base).as_posix()
        sound_summary(path, options.cameras)
        episode = open_episode(path)
        try:
            entry = {"name": name, "fingerprint": f"{zlib.crc32(episode.action.tobytes()):08x}"}
            if name in known:
                _check_same(entry, known[name], out)
                report.skipped += 1
                continue
            not_written |= dict.fromkeys(_not_written(episode))
            state.note(_stage(state, episode, entry, options))
            report.converted += 1
        finally:
            episode.close()
    if state.staged:
        _finish(state, options)
    if not_written:
        print(f"note: not part of the LeRobot dataset, left out: {', '.join(not_written)}")
    print(f"videos: {state.settings['encoder']}, {state.settings['fps']} frames/s")
    report.before, report.after = size_of_episodes(paths), size_of([out])
    return report


def _check_same(entry: dict, fingerprint: str, out: Path):
    if entry["fingerprint"] != fingerprint:
        raise DatasetError(
            f"{entry['name']}: expected the episode that {out} holds under this name, found other actions in it; "
            "to put several folders into one dataset, convert a folder that holds them all"
        )


def _not_written(episode: Episode) -> list[str]:
    if isinstance(episode, LeRobotEpisode):
        return left_out(episode.dataset)
    names = []

    def visit(name: str, item: h5py.Dataset | h5py.Group):
        if isinstance(item, h5py.Dataset) and name not in HDF5_KNOWN and not name.startswith(f"{IMAGES}/"):
            names.append(name)

    if isinstance(episode, Hdf5Episode):
        episode.file.visititems(visit)
    return names


def _settings_of(episode: Episode, cameras: dict[str, str], options: Options) -> dict:
    """What all episodes of a dataset must share."""
    info = episode.dataset.info if isinstance(episode, LeRobotEpisode) else {}
    fps = options.fps or info.get("fps") or DEFAULT_FPS
    if info.get("fps", fps) != fps:
        raise DatasetError(f"{episode.path}: --fps: expected {info['fps']}, as the dataset says, found {fps}")
    if int(fps) != fps:
        raise DatasetError(f"{episode.path}: fps: expected a whole number, as LeRobot v3.0 wants it, found {fps}")
    return {
        "fps": int(fps),
        "robot_type": options.robot_type or info.get("robot_type") or DEFAULT_ROBOT,
        "sim": episode.sim,
        "state_dim": episode.qpos.shape[1],
        "action_dim": episode.action.shape[1],
        "state_names": _names(episode, "state", episode.qpos.shape[1]),
        "action_names": _names(episode, "action", episode.action.shape[1]),
        "cameras": {name: list(episode.frame(stored, 0).shape[:2]) for name, stored in cameras.items()},
        "reasoning": episode.reasoning(0) is not None,
        "encoder": options.encoder,
    }


def _names(episode: Episode, what: str, dim: int) -> list | dict:
    """Of the dimensions: a LeRobot source's own, else numbered ones."""
    if isinstance(episode, LeRobotEpisode):
        names = episode.dataset.info["features"][getattr(episode.dataset, what)].get("names")
        if names:
            return names
    return [f"motor_{i}" for i in range(dim)]


def _check_settings(path: str, settings: dict, expected: dict):
    for name, value in settings.items():
        if value != expected[name]:
            raise DatasetError(
                f"{path}: expected {name} {expected[name]} as in the dataset's other episodes, found {value}; "
                "convert unlike episodes (or with other flags) into a folder of their own"
            )


def _stage(state: State, episode: Episode, source: dict, options: Options) -> dict:
    """Writes an episode's table and videos into a folder of their own; returns what describes it."""
    cameras = chosen_cameras(episode.path, episode.camera_names, options.cameras)
    settings = _settings_of(episode, cameras, options)
    state.settings = state.settings or settings
    _check_settings(episode.path, settings, state.settings)
    index, first, length = len(state.rows) + len(state.staged), state.frames, len(episode)
    texts = [episode.instruction(t) for t in range(length)]
    row = {
        "episode_index": index,
        "tasks": list(dict.fromkeys(texts)),
        "length": length,
        "dataset_from_index": first,
        "dataset_to_index": first + length,
    }
    staged = {"settings": settings, "source": source, "row": row}
    unfinished = state.staging / f".episode_{index:06d}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    stats = {}
    for name, stored in cameras.items():
        images = ImageStats(length)
        frames = images.watch(camera_frames(episode, stored))
        video = unfinished / f"{name}.mp4"
        write_video(video, frames, settings["fps"], settings["encoder"], f"{episode.path}: camera {stored}")
        stats[CAMERA_PREFIX + name] = images.result()
    columns = _columns(state, episode, index, first, texts, settings)
    pq.write_table(episode_table(columns), unfinished / "data.parquet", row_group_size=length)
    stats |= {name: number_stats(values) for name, values in columns.items() if name != "reasoning"}
    row |= {f"stats/{feature}/{name}": value for feature, of in stats.items() for name, value in of.items()}
    write_json(staged, unfinished / STAGED)
    os.replace(unfinished, state.folder(staged))
    return staged


def _columns(state: State, episode: Episode, index: int, first: int, texts: list[str], settings: dict) -> dict:
    tasks = dict(state.tasks)
    task_indices = [tasks.setdefault(text, len(tasks)) for text in texts]
    frame_index = np.arange(len(episode))
    columns = {"observation.state": episode.qpos, "action": episode.action}
    if settings["reasoning"]:
        columns["reasoning"] = [episode.reasoning(t) for t in range(len(episode))]
    return columns | {
        "timestamp": (frame_index / settings["fps"]).astype(np.float32),
        "frame_index": frame_index,
        "episode_index": np.full(len(episode), index),
        "index": frame_index + first,
        "task_index": np.array(task_indices),
    }


def _grouped(sizes: list[int], limit: int, headers: list[bytes] | None = None) -> list[slice]:
    """Neighbours that go into one file: up to `limit` bytes, and with the same header."""
    groups, start, size = [], 0, 0
    for i, more in enumerate(sizes):
        if i > start and (size + more > limit or (headers and headers[i] != headers[start])):
            groups.append(slice(start, i))
            start, size = i, 0
        size += more
    return [*groups, slice(start, len(sizes))]


def _finish(state: State, options: Options):
    """Joins the staged episodes to files, writes the metadata, and clears the stage."""
    out, settings, staged = state.out, state.settings, state.staged
    last = state.rows[-1] if state.rows else {}
    folders = [state.folder(episode) for episode in staged]
    new = [dict(episode["row"]) for episode in staged]

    place = (last["data/chunk_index"], last["data/file_index"]) if last else None
    parts = [folder / "data.parquet" for folder in folders]
    for group in _grouped([part.stat().st_size for part in parts], options.data_megabytes << 20):
        place = next_file(place)
        with partial_file(out / DATA_PATH.format(chunk_index=place[0], file_index=place[1])) as target:
            join_tables(parts[group], target)
        for row in new[group]:
            row["data/chunk_index"], row["data/file_index"] = place
    for camera in settings["cameras"]:
        _join_camera(state, camera, [folder / f"{camera}.mp4" for folder in folders], new, last, options)

    rows = state.rows + [_ordered(row) for row in new]
    videos = {name: video_info(folders[0] / f"{name}.mp4", settings["fps"]) for name in settings["cameras"]}
    info = _info(settings, rows, len(state.tasks), options) | {"features": make_features(settings, videos)}
    if not settings["sim"]:
        info["dexvla"] = {"sim": False}
    sources = {"settings": settings, "episodes": state.sources}
    publish(out, rows, len(new), list(state.tasks), info, sources)
    shutil.rmtree(state.staging)


def _join_camera(state: State, camera: str, parts: list[Path], new: list[dict], last: dict, options: Options):
    key, fps = CAMERA_PREFIX + camera, state.settings["fps"]
    column = f"videos/{key}"
    place = (last[f"{column}/chunk_index"], last[f"{column}/file_index"]) if last else None
    sizes, headers = [part.stat().st_size for part in parts], [codec_header(part) for part in parts]
    for group in _grouped(sizes, options.video_megabytes << 20, headers):
        place, frames = next_file(place), 0
        path = state.out / VIDEO_PATH.format(video_key=key, chunk_index=place[0], file_index=place[1])
        with partial_file(path) as target:
            join_videos(parts[group], [row["length"] for row in new[group]], fps, target)
        for row in new[group]:
            row[f"{column}/chunk_index"], row[f"{column}/file_index"] = place
            row[f"{column}/from_timestamp"] = frames / fps
            frames += row["length"]
            row[f"{column}/to_timestamp"] = frames / fps


def _ordered(row: dict) -> dict:
    """Columns in LeRobot's order: statistics after everything else."""
    first = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    rest = sorted((name for name in row if name not in first), key=lambda name: name.startswith("stats/"))
    return {name: row[name] for name in [*first, *rest]}


def _info(settings: dict, rows: list[dict], tasks: int, options: Options) -> dict:
    return {
        "codebase_version": "v3.0",
        "robot_type": settings["robot_type"],
        "total_episodes": len(rows),
        "total_frames": rows[-1]["dataset_to_index"],
        "total_tasks": tasks,
        "chunks_size": CHUNK_SIZE,
        "data_files_size_in_mb": options.data_megabytes,
        "video_files_size_in_mb": options.video_megabytes,
        "fps": settings["fps"],
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if settings["cameras"] else None,
    }
