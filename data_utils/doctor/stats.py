"""Whether a `dataset_stats.json` holds the statistics of the data beside it."""

import json
from pathlib import Path

import numpy as np

from ..dataset import get_norm_stats
from ..errors import UserError
from ..normalization import STATS_JSON, load_stats, make_norm_stats, save_stats
from ..summary import EpisodeSummary
from .diagnosis import Diagnosis, warning

TOLERANCE = 1e-3  # of a dimension's range or spread
EXAMPLE = "example_qpos"  # of one episode, whichever


def stats_folder(path: str) -> Path:
    """The folder of the file or folder given as --stats.

    Raises:
        UserError: when there is no `dataset_stats.json`; a pickle is never opened.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not (folder / STATS_JSON).is_file():
        raise UserError(f"--stats {path}: expected {STATS_JSON} there, found none (a pickle is never opened)")
    return folder


def check_stats(folder: Path, summaries: list[EpisodeSummary], owned: bool, robot: str = "") -> list[Diagnosis]:
    """Holds a folder's statistics against the episodes. Nothing can be said while one of them is broken.

    owned: the file lies with the data and may be written anew. robot: whose statistics, if the file holds several.
    """
    file = str(folder / STATS_JSON)
    actions, states = [s.action for s in summaries], [s.qpos for s in summaries]
    dims = [{moments and moments.dim for moments in part} for part in (actions, states)]
    sound = not any(s.findings for s in summaries) and all(len(part) == 1 and None not in part for part in dims)
    try:
        stored = load_stats(folder, robot)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
        found = f"something else ({error})"
        advice = _advice(owned and sound)
        return [Diagnosis(file, "", "statistics as training writes them", found, advice, kind="stats")]
    if not sound:
        return []
    total = [sum(moments[1:], start=moments[0]) for moments in (actions, states)]
    right = make_norm_stats(*total, example_qpos=np.zeros((0, total[1].dim)))
    del right[EXAMPLE]
    scales = {"action": right["action_max"] - right["action_min"], "qpos": right["qpos_std"]}
    for key, values in right.items():
        if key not in stored or stored[key].shape != values.shape:
            expected, found = f"{key} with {len(values)} numbers", str(getattr(stored.get(key), "shape", "none"))
            return [warning("stats", file, robot, expected, found, _advice(owned))]
    # what is not finite is as wrong as can be
    wrong = {
        key: np.nan_to_num(np.abs(stored[key] - right[key]) / scales[key.split("_")[0]], nan=np.inf) for key in right
    }
    key = max(wrong, key=lambda name: wrong[name].max())
    if not wrong[key].max() > TOLERANCE:
        return []
    d = int(wrong[key].argmax())
    where = ", ".join(filter(None, [robot, key, f"dimension {d}"]))
    count = sum(int((values > TOLERANCE).sum()) for values in wrong.values())
    expected = f"{right[key][d]:.6g}, as in the {len(summaries)} episodes"
    found = f"{stored[key][d]:.6g}" + (f" (and {count - 1} more numbers that differ)" if count > 1 else "")
    return [warning("stats", file, where, expected, found, _advice(owned))]


def _advice(owned: bool) -> str:
    return "--fix writes it anew" if owned else "is this the data it was computed from? The file is left as it is"


def rewrite_stats(folder: Path, paths: list[str]) -> str:
    """Writes the statistics of the episodes; the former ones are kept as `dataset_stats.json.bak`."""
    file, stats = folder / STATS_JSON, get_norm_stats(paths)
    backup = free_name(file)
    file.rename(backup)
    save_stats(stats, folder)
    return f"{file}: computed again from {len(paths)} episodes; the former one is {backup.name}"


def free_name(path: Path) -> Path:
    """`<path>.bak`, or `.bak2` and so on: no backup is overwritten."""
    number = 1
    while (backup := path.with_name(f"{path.name}.bak{number if number > 1 else ''}")).exists():
        number += 1
    return backup
