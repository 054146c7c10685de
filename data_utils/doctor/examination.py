"""Everything that is known of the episodes under examination, gathered in parallel."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..index import summarize_all
from ..summary import EpisodeSummary
from .checks import fast_findings, start_up_findings
from .diagnosis import KINDS, Diagnosis
from .images import Job, Look, exchanged_cameras, look_at
from .stats import check_stats

SHOWN = 20  # episodes in a report
WORTH_A_POOL = 5000  # frames of all cameras; fewer are seen faster than processes start


class Examination:
    """Summaries and looks of episodes, by path, in order.

    Args:
        camera_names, camera_map: of the task; without, what most episodes have.
        look_at_frames: whether frames are decoded. report: whether to keep what a report shows.
        groups: episodes of one robot each, whose numbers can be compared; by default all.
    """

    def __init__(
        self,
        paths: list[str],
        chunk_size: int,
        camera_names: list[str] | None = None,
        camera_map: dict | None = None,
        *,
        use_reasoning: bool = True,
        look_at_frames: bool = True,
        report: bool = False,
        groups: list[list[str]] | None = None,
    ):
        self.paths = paths
        self.chunk_size = chunk_size
        self.camera_names, self.camera_map = camera_names, camera_map
        self.use_reasoning = use_reasoning
        self.look_at_frames, self.report = look_at_frames, report
        self.groups = groups or [paths]
        chosen = np.unique(np.linspace(0, len(paths) - 1, SHOWN).astype(int))
        self.shown = [paths[i] for i in chosen]
        self.summaries: dict[str, EpisodeSummary] = {}
        self.looks: dict[str, Look] = {}
        self.examine(paths)

    def examine(self, paths: list[str]):
        """Reads the episodes, also those that were read before."""
        self.summaries |= summarize_all(paths)
        if not (self.look_at_frames or self.report):
            return
        shown = set(self.shown) if self.report else set()
        jobs = [Job(path, self.look_at_frames, self.report, path in shown) for path in paths]
        frames = sum(self.summaries[path].length * len(self.summaries[path].cameras) for path in paths)
        workers = min(16, os.cpu_count() or 1, len(jobs) if frames >= WORTH_A_POOL else 1)
        with tqdm(total=len(jobs), desc="looking at frames", disable=len(jobs) < 2 or not self.look_at_frames) as bar:

            def keep(look: Look):
                self.looks[look.path] = look
                bar.update()

            if workers < 2:
                for job in jobs:
                    keep(look_at(job))
                return
            # spawn: pyarrow's threads, which reading LeRobot tables starts, do not survive a fork
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                for look in pool.map(look_at, jobs):
                    keep(look)

    def findings(self) -> list[Diagnosis]:
        """Errors and warnings, by kind and in the order of the episodes; warnings about the dataset come first."""
        summaries = [self.summaries[path] for path in self.paths]
        reasoned = self.use_reasoning and any(summary.reasonings for summary in summaries)
        found = start_up_findings(summaries, self.camera_names, self.camera_map, reasoned)
        looks = [self.looks[path] for path in self.paths if path in self.looks]
        seen = [finding for look in looks for finding in look.findings]
        # A frame that start-up stumbles over was looked at again, with all others
        frames = {(finding.path, _camera(finding)) for finding in seen if finding.kind == "frames"}
        found = [f for f in found if f.kind != "frames" or (f.path, _camera(f)) not in frames]
        for paths in self.groups:
            alike = [self.summaries[path] for path in paths]
            found += fast_findings(alike, self.chunk_size, self.camera_names, self.camera_map, reasoned)
        found += seen + exchanged_cameras(looks)
        order = {path: number for number, path in enumerate(self.paths)}
        kinds = list(KINDS)
        return sorted(found, key=lambda f: (not f.is_error, kinds.index(f.kind), order.get(f.path, -1)))

    def stats_findings(self, folder: Path, paths: list[str], owned: bool, robot: str = "") -> list[Diagnosis]:
        """Holds a folder's `dataset_stats.json` against the episodes `paths`, which need not be under examination."""
        summaries = self.summaries | summarize_all([path for path in paths if path not in self.summaries])
        return check_stats(folder, [summaries[path] for path in paths], owned, robot)

    def headline(self) -> str:
        frames = sum(summary.length for summary in self.summaries.values())
        return f"{len(self.paths)} episodes, {frames} frames"


def _camera(finding: Diagnosis) -> str:
    return finding.where.rpartition(", frame")[0]
