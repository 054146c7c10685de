"""LeRobot datasets (v2.0, v2.1, v3.0) -> HDF5 episodes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..episodes import Episode, lerobot_folder
from ..errors import DatasetError
from ..index import summarize
from ..lerobot import LeRobotDataset, LeRobotEpisode
from ..summary import EpisodeSummary
from .files import Report, check_places, chosen_cameras, convert_each, episode_sources, folder_of
from .hdf5_files import write_hdf5_episode

BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index", "reasoning"}


def sound_summary(path: str, cameras: dict[str, str] | None = None) -> EpisodeSummary:
    """The episode's summary.

    Raises:
        DatasetError: with the first thing that is wrong with its numbers, texts or (chosen) cameras.
    """
    summary = summarize(path)
    findings = summary.findings + summary.reasoning_findings
    for name in chosen_cameras(path, summary.cameras, cameras).values() if not findings else ():
        findings = findings + summary.camera_findings.get(name, [])
    if findings:
        raise DatasetError(str(findings[0]))
    return summary


def left_out(dataset: LeRobotDataset) -> list[str]:
    """Features that the Episode interface does not know."""
    known = BOOKKEEPING | set(dataset.cameras.values()) | {dataset.action, dataset.state}
    return [name for name in dataset.info["features"] if name not in known]


def camera_frames(episode: Episode, camera: str) -> Iterator[np.ndarray]:
    """All frames of a camera, (H, W, 3) uint8 RGB, one by one."""
    return (episode.frame(camera, t) for t in range(len(episode)))


def convert_lerobot(
    source: Path, out: Path, cameras: dict[str, str] | None = None, jpeg_quality: int | None = None
) -> Report:
    """Writes `episode_000012.hdf5` for every episode of the LeRobot datasets in `source`, or for the one it names.

    Args:
        cameras: name in the output -> name in the dataset; None takes all as they are.
        jpeg_quality: of JPEG frames, 1..100; None stores raw ones.

    Raises:
        DatasetError: naming an episode that is broken, lacks a camera, or whose task changes on the way.
    """
    check_places(source, out)
    paths = [Path(path) for path in episode_sources(source) if lerobot_folder(path)]
    if not paths:
        raise DatasetError(f"SRC {source}: expected a LeRobot dataset (meta/info.json), found none")
    for folder in dict.fromkeys(path.parent for path in paths):
        if names := left_out(LeRobotDataset.at(folder)):
            print(f"note: {folder}: HDF5 episodes have no place for {', '.join(names)}; left out")

    def convert(path: Path, target: Path):
        sound_summary(str(path), cameras)
        episode = LeRobotEpisode(path)
        write_hdf5_episode(
            target,
            source=str(path),
            action=episode.action,
            qpos=episode.qpos,
            language=_only_instruction(episode),
            reasonings=episode.reasonings or None,
            sim=episode.sim,
            cameras={
                name: camera_frames(episode, stored)
                for name, stored in chosen_cameras(str(path), episode.camera_names, cameras).items()
            },
            jpeg_quality=jpeg_quality,
        )

    base = folder_of(source)
    jobs = [(path, (out / path.relative_to(base)).with_suffix(".hdf5")) for path in paths]
    return convert_each(jobs, convert, out)


def _only_instruction(episode: LeRobotEpisode) -> str:
    first = episode.instruction(0)
    for t in range(1, len(episode)):
        if episode.instruction(t) != first:
            raise DatasetError(
                f"{episode.path}: expected one task for the whole episode, since HDF5 keeps one instruction, "
                f'found "{first}" at frame 0 and "{episode.instruction(t)}" at frame {t}'
            )
    return first
