"""Checking and summing up all episodes of a dataset: in parallel, and once, since what was found is kept."""

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from .episodes import lerobot_folder
from .errors import DatasetError, Finding
from .hdf5 import summarize_hdf5
from .lerobot import LeRobotDataset, summarize_lerobot
from .summary import EpisodeSummary

FORMAT = 3  # of the kept summaries; raise it when EpisodeSummary or a check changes
WORTH_A_POOL = 64  # episodes; fewer are read faster than processes start


def cache_folder() -> Path:
    """Where summaries are kept: $DEXVLA_CACHE_DIR, or `dexvla` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DEXVLA_CACHE_DIR") or Path(base) / "dexvla")


def summarize(path: str) -> EpisodeSummary:
    """Reads and checks one episode of any format, without decoding images. What is wrong stands in the summary."""
    try:
        return summarize_lerobot(path) if lerobot_folder(path) else summarize_hdf5(path)
    except DatasetError as error:
        # its message begins with the file's name
        where, _, rest = str(error).removeprefix(f"{path}: ").rpartition("expected ")
        expected, _, found = rest.partition(", found ")
        return EpisodeSummary(path, findings=[Finding(path, where.rstrip(": "), expected, found)])


def identity(path: str) -> list:
    """Size and time of change of the files that hold an episode."""
    if folder := lerobot_folder(path):
        dataset = LeRobotDataset.at(folder)
        files = dataset.files_of(path)[1]
        paths = [folder / "meta" / "info.json", files.table, *(video for video, _ in files.videos.values())]
        return [dataset.metadata_status, *map(_status, paths)]
    return [_status(path)]


def _status(path: str | os.PathLike) -> list[int]:
    try:
        status = os.stat(path)
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def summarize_all(
    paths: list[str], dataset_dir: str | os.PathLike | None = None, show_progress: bool = True
) -> dict[str, EpisodeSummary]:
    """Summaries of the episodes, in the order of `paths`.

    With `dataset_dir` they are kept in `cache_folder()` under its name; an episode whose files have the same size and
    time of change is not read again. A cache that cannot be read or written is done without.
    """
    cache = cache_folder() / f"{hashlib.sha1(os.path.abspath(dataset_dir or '').encode()).hexdigest()}.jsonl"
    identities = {path: identity(path) for path in paths}
    kept, stale = _read(cache, identities) if dataset_dir else ({}, False)
    new = {}
    try:
        for summary in _summarize(sorted(set(paths) - set(kept)), show_progress):
            new[summary.path] = summary
    finally:  # an interrupted start is not begun from nothing
        if dataset_dir and new:
            lines = [json.dumps({"identity": identities[p], "summary": s.to_json()}) for p, s in new.items()]
            _write(cache, lines, list(kept.values()) if stale else None)
    return {path: new.get(path) or EpisodeSummary.from_json(json.loads(kept[path])["summary"]) for path in paths}


def _summarize(paths: list[str], show_progress: bool) -> Iterator[EpisodeSummary]:
    """Summaries in the order of `paths`."""
    pooled = len(paths) >= WORTH_A_POOL
    with tqdm(total=len(paths), desc="checking episodes", disable=not (show_progress and pooled)) as bar:
        if not pooled:
            yield from map(summarize, paths)
            return
        # Forked, so that workers need not import everything again; they touch files and numpy only
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=context) as pool:
            for summary in pool.map(summarize, paths, chunksize=16):
                bar.update()
                yield summary


def _read(cache: Path, identities: dict[str, list]) -> tuple[dict[str, str], bool]:
    """The kept lines of the episodes that have not changed, and whether the file holds others."""
    kept, stale = {}, False
    try:
        with open(cache) as file:
            if json.loads(file.readline()).get("format") != FORMAT:
                return {}, True
            for line in file:
                entry = json.loads(line)
                path = entry["summary"]["path"]
                if entry["identity"] == identities.get(path):
                    kept[path] = line.rstrip("\n")
                else:
                    stale = True
    except (OSError, ValueError, KeyError):  # none yet, or its last line was cut off
        stale = True
    return kept, stale


def _write(cache: Path, lines: list[str], kept: list[str] | None):
    """Appends lines; with `kept`, the file is written anew, and whole before it takes its name."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        if kept is None:
            with open(cache, "a") as file:
                file.writelines(f"{line}\n" for line in lines)
            return
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
            file.writelines(f"{line}\n" for line in [json.dumps({"format": FORMAT}), *kept, *lines])
        os.replace(file.name, cache)
    except OSError as error:
        print(f"note: summaries of the episodes are not kept: {error}")


def check_episodes(
    summaries: dict[str, EpisodeSummary],
    camera_names: list[str] | None = None,
    use_reasoning: bool = False,
    action_dim: int | None = None,
    state_dim: int | None = None,
    camera_map: dict[str, str | list[str]] | None = None,
):
    """Holds every episode against the task, and against the others.

    `action_dim` and `state_dim` default to those of the first sound episode.

    Raises:
        DatasetError: with one line per broken episode (the first 20 of them).
    """
    sound = [s for s in summaries.values() if s.action is not None and s.qpos is not None]
    if sound:
        action_dim, state_dim = action_dim or sound[0].action.dim, state_dim or sound[0].qpos.dim
    problems = []
    for summary in summaries.values():
        findings = summary.findings_for(camera_names, camera_map, use_reasoning, action_dim, state_dim)
        problems += [str(finding) for finding in findings if finding.is_error][:1]
    if problems:
        more = f"\n… and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DatasetError("\n".join(problems[:20]) + more)
