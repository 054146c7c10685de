"""Entries of TASK_CONFIGS."""

import os

from aloha_scripts.constants import TASK_CONFIGS

from .errors import UserError


def get_task(name: str | None) -> dict:
    """The entry of TASK_CONFIGS; `sim_transfer_cube` is understood too, as in the simulator.

    Raises:
        UserError: when there is none, or naming the key that is missing or no such thing as is expected.
    """
    name = next((known for known in (name, f"{name}_scripted") if known in TASK_CONFIGS), name)
    if name not in TASK_CONFIGS:
        raise UserError(f"--task_name: expected one of {', '.join(sorted(TASK_CONFIGS))}, found {name}")
    task = TASK_CONFIGS[name]
    missing = [key for key in ("dataset_dir", "episode_len", "camera_names") if key not in task]
    if missing:
        raise UserError(f"TASK_CONFIGS[{name!r}]: expected {', '.join(missing)}, found only {', '.join(task)}")
    folders = task["dataset_dir"]
    for key, fine, expected in (
        ("dataset_dir", folders and all(isinstance(d, str | os.PathLike) for d in _as_list(folders)), "folders"),
        ("camera_names", isinstance(task["camera_names"], list | tuple) and task["camera_names"], "a list of names"),
        ("stats_dir", _are_stats_folders(task.get("stats_dir")), "folders, or a dict robot -> folders"),
        ("train_ratio", isinstance(task.get("train_ratio", 1), int | float) and 0 < task.get("train_ratio", 1) <= 1,
         "a number in (0, 1]"),
        ("sample_weights", task.get("sample_weights") is None or isinstance(task["sample_weights"], list | tuple),
         "a list of numbers, one per dataset_dir"),
        ("camera_map", isinstance(task.get("camera_map") or {}, dict)
         and set(task.get("camera_map") or {}) <= set(task["camera_names"]), "a dict with keys of camera_names"),
        ("name_filter", task.get("name_filter") is None or callable(task["name_filter"]), "a function path -> bool"),
    ):  # fmt: skip
        if not fine:
            raise UserError(f"TASK_CONFIGS[{name!r}]: {key}: expected {expected}, found {task[key]!r}")
    return task


def _are_stats_folders(value) -> bool:
    by_robot = value if isinstance(value, dict) else {"one": value}
    folders = [folder for folders in by_robot.values() for folder in _as_list(folders)]
    named = all(isinstance(robot, str) and robot for robot in by_robot)
    return value is None or bool(folders) and named and all(isinstance(d, str | os.PathLike) for d in folders)


def _as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]
