"""Finds what is wrong, or looks wrong, with recorded episodes.

    python -m data_utils.doctor --task_name sim_transfer_cube_scripted --report report.html
    python -m data_utils.doctor /data/shirts /data/lerobot_set /data/episode_7.hdf5 --fast
    python -m data_utils.doctor /data/shirts --fix

One line per finding: error or warning, kind, file, place, what was expected and found, what to do. The exit code is 0
without errors, else 1 (--strict: also for warnings).
"""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..dataset import as_folders, folders_of_robots, robots_of
from ..episodes import find_episodes, lerobot_folder
from ..errors import UserError, run_command
from ..normalization import STATS_JSON
from ..tasks import get_task
from .diagnosis import Diagnosis
from .examination import Examination
from .repair import repair
from .report import write_report
from .stats import rewrite_stats, stats_folder


@dataclass
class Selection:
    """The episodes to examine, and what is known about their task."""

    paths: list[str]
    stats_paths: dict[Path, list[str]]  # folder -> the episodes that its dataset_stats.json should be computed from
    camera_names: list[str] | None = None
    camera_map: dict | None = None
    title: str = ""
    robots: dict[str, list[str]] = field(default_factory=dict)  # robot -> the episodes of its statistics
    groups: list[list[str]] | None = None  # episodes of one robot each

    @classmethod
    def of_task(cls, name: str, skip_mirrored_data: bool) -> "Selection":
        task = get_task(name)
        dirs = as_folders(task["dataset_dir"])
        robot_dirs = folders_of_robots(task.get("stats_dir"), dirs)
        robot_of = robots_of(robot_dirs, dirs) if isinstance(task.get("stats_dir"), dict) else [""] * len(dirs)
        stats_dirs = [folder for folders in robot_dirs.values() for folder in folders]
        keep = task.get("name_filter") or (lambda path: True)
        found = {folder: find_episodes(folder, skip_mirrored_data) for folder in dict.fromkeys([*dirs, *stats_dirs])}
        of = {folder: [p for p in paths if folder not in dirs or keep(p)] for folder, paths in found.items()}
        if not any(of[folder] for folder in dirs):
            raise UserError(f"--task_name {name}: its name_filter leaves no episode")
        paths = list(dict.fromkeys(path for folder in dirs for path in of[folder]))
        robots = {robot: [path for folder in its for path in of[folder]] for robot, its in robot_dirs.items()}
        stats = {Path(folder): robots[robot] for robot, its in robot_dirs.items() for folder in its}
        groups = [
            list(dict.fromkeys(path for folder, its in zip(dirs, robot_of) if its == robot for path in of[folder]))
            for robot in robots
        ]
        return cls(paths, stats, task["camera_names"], task.get("camera_map"), name, robots, groups)

    @classmethod
    def of_paths(cls, given: list[str], skip_mirrored_data: bool) -> "Selection":
        paths, stats_paths = [], {}
        for path in given:
            if os.path.isdir(path):
                stats_paths[Path(path)] = find_episodes(path, skip_mirrored_data)
                paths += stats_paths[Path(path)]
            elif os.path.isfile(path) or lerobot_folder(path):
                paths.append(path)
            else:
                raise UserError(f"{path}: expected an episode or a folder with episodes, found no such file")
        return cls(list(dict.fromkeys(paths)), stats_paths, title=", ".join(given))


def find_problems(examination: Examination, selection: Selection, stats: str | None) -> list[Diagnosis]:
    owned = {folder: paths for folder, paths in selection.stats_paths.items() if (folder / STATS_JSON).is_file()}
    given = stats_folder(stats) if stats else None
    findings = examination.findings()
    for folder, paths in owned.items():
        findings += examination.stats_findings(folder, paths, owned=folder != given)
    if given and given not in owned:
        for robot, paths in (selection.robots or {"": selection.paths}).items():
            findings += examination.stats_findings(given, paths, owned=False, robot=robot)
    return findings


def fix(examination: Examination, selection: Selection, findings: list[Diagnosis], sim: bool | None, stats: str | None):
    """Repairs what can be, says so, and examines what was repaired again. Returns the findings that are left."""
    done = []
    for path in selection.paths:
        if lerobot_folder(path):
            continue
        try:
            lines = repair(path, sim)
        except OSError as error:
            print(f"not fixed: {path}: {error}")
            continue
        done += lines
        if lines:
            examination.examine([path])
    if done:
        findings = find_problems(examination, selection, stats)
    for finding in findings:
        if finding.kind == "stats" and "--fix" in finding.advice:
            folder = Path(finding.path).parent
            try:
                done.append(rewrite_stats(folder, selection.stats_paths[folder]))
            except OSError as error:
                print(f"not fixed: {finding.path}: {error}")
    print("\n".join(f"fixed: {line}" for line in done) or "fixed: nothing")
    return find_problems(examination, selection, stats)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="episodes (*.hdf5), folders of them, LeRobot datasets")
    add("--task_name", help="entry of TASK_CONFIGS, instead of paths")
    add("--chunk_size", type=int, default=50, help="actions per prediction, as in training (default: 50)")
    add("--stats", metavar="PATH", help="statistics to compare, of a checkpoint for instance: its folder or the file")
    add("--skip_mirrored_data", action="store_true", help="leave out files whose name contains `mirror`")
    add("--no_reasoning", action="store_true", help="do not look at reasonings (--use_reasoning False in training)")
    add("--fast", action="store_true", help="do not look at images")
    add("--report", metavar="FILE", help="write an HTML report, one file that needs no network")
    add("--fix", action="store_true", help="repair what is safe to repair; originals are kept as NAME.hdf5.bak")
    add("--set_sim", choices=["true", "false"], help="with --fix: set the attribute `sim` of all HDF5 episodes")
    add("--strict", action="store_true", help="exit code 1 for warnings, too")
    args = parser.parse_args(argv)
    if bool(args.paths) == bool(args.task_name):
        parser.error("expected either PATHs or --task_name")
    if args.set_sim and not args.fix:
        parser.error("--set_sim changes files, so it needs --fix")
    if args.chunk_size < 1:
        parser.error(f"--chunk_size: expected 1 or more, found {args.chunk_size}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.report and not Path(args.report).absolute().parent.is_dir():  # before hours of looking
        raise UserError(f"--report {args.report}: expected the folder {Path(args.report).parent}, found none")
    if args.task_name:
        selection = Selection.of_task(args.task_name, args.skip_mirrored_data)
    else:
        selection = Selection.of_paths(args.paths, args.skip_mirrored_data)
    examination = Examination(
        selection.paths,
        args.chunk_size,
        selection.camera_names,
        selection.camera_map,
        use_reasoning=not args.no_reasoning,
        look_at_frames=not args.fast,
        report=bool(args.report),
        groups=selection.groups,
    )
    findings = find_problems(examination, selection, args.stats)
    if args.fix:
        sim = None if args.set_sim is None else args.set_sim == "true"
        findings = fix(examination, selection, findings, sim, args.stats)
    for finding in findings:
        print(f"{'error' if finding.is_error else 'warning'} [{finding.kind}] {finding}")
    errors = sum(finding.is_error for finding in findings)
    warnings = len(findings) - errors
    print(f"{examination.headline()}, {errors} errors, {warnings} warnings")
    if args.report:
        try:
            write_report(args.report, examination, findings, selection.title)
        except OSError as error:
            raise UserError(f"--report {args.report}: expected a file that can be written, found {error}") from error
        print(f"wrote {args.report}")
    return 1 if errors or (warnings and args.strict) else 0


if __name__ == "__main__":
    run_command(main)
