"""Files of sub-step reasoning labels, and the same labels in episodes; `annotate.py` is the command line.

A label file is CSV with the header `episode,start,end,text`, or a JSON list of such objects. An episode is named by its
file (`.hdf5` may be left out), by its path within the dataset, or by a number n: episode_n. A text holds for the frames
from `start` up to, without, `end`; an empty `end` is the episode's.
"""

import csv
import io
import json
import os
import posixpath
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import h5py
import numpy as np
from tqdm import tqdm

from .episodes import find_episodes, lerobot_folder, open_episode
from .errors import DatasetError, Finding, UserError
from .hdf5 import open_hdf5
from .index import summarize_all
from .summary import EpisodeSummary

COLUMNS = ("episode", "start", "end", "text")
REASONINGS = "substep_reasonings"


@dataclass(frozen=True)
class Segment:
    """One row of a label file; `where` it stands there. `end` None: the episode's end."""

    episode: str
    start: int
    end: int | None
    text: str
    where: str


class EpisodeNames:
    """The episodes of a dataset, by every name that a label file may call them."""

    def __init__(self, dataset: str):
        self.dataset = dataset
        self.paths = {Path(os.path.relpath(path, dataset)).as_posix(): path for path in find_episodes(dataset)}
        self.called = defaultdict(list)  # file name without .hdf5, or number -> paths
        for name, path in self.paths.items():
            stem = PurePosixPath(name).name.removesuffix(".hdf5")
            self.called[stem].append(path)
            if number := re.fullmatch(r"episode_(\d+)", stem):
                self.called[int(number[1])].append(path)

    def find(self, name: str) -> list[str]:
        """Paths of the episodes that `name` may mean. A path within the dataset means that episode alone."""
        name = posixpath.normpath(name)
        for within in (name, f"{name}.hdf5"):
            if within in self.paths:
                return [self.paths[within]]
        stem = name.removesuffix(".hdf5")
        number = re.fullmatch(r"(?:episode_)?(\d+)", stem)
        return self.called.get(stem) or self.called.get(int(number[1]) if number else None) or []


def _rows(labels: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a label file and where they stand: their line of a CSV file, their place in a JSON list."""
    try:
        with open(labels, encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
            if labels.suffix.lower() == ".json":
                rows = json.load(file)
                if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                    raise UserError(
                        f"{labels}: expected a list of objects with {', '.join(COLUMNS)}, found another JSON"
                    )
                yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))
                return
            reader = csv.DictReader(file, restkey="too many columns", strict=True)
            if sorted(reader.fieldnames or []) != sorted(COLUMNS):
                found = ",".join(reader.fieldnames or []) or "none"
                raise UserError(
                    f"{labels}: expected the header {','.join(COLUMNS)}, separated by commas, found {found}"
                )
            yield from ((f"line {reader.line_num}", row) for row in reader if any(row.values()))
    except csv.Error as error:
        raise UserError(f"{labels}: line {reader.line_num + 1}: expected CSV, found {error}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{labels}: expected a CSV or JSON file in UTF-8, found {error}") from error


def _is_text(value) -> bool:
    """Whether HDF5 can keep `value`, and somebody can read it."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    return value == value.encode(errors="ignore").decode()  # JSON may hold half of a surrogate pair


def read_labels(labels: str | os.PathLike) -> tuple[list[Segment], list[Finding]]:
    """The rows of a label file, and what is wrong with them; a row without usable frame numbers is left out.

    Raises:
        UserError: when the file cannot be read, or is of another form.
    """
    segments, findings = [], []
    for where, row in _rows(Path(labels)):
        if surplus := sorted(set(row) - set(COLUMNS)):
            expected, advice = f"only {', '.join(COLUMNS)}", "a text with commas needs double quotes around it"
            findings.append(Finding(str(labels), where, expected, ", ".join(surplus), advice))
        if not _is_text(row.get("text")):
            findings.append(Finding(str(labels), where, "a text", repr(row.get("text"))))
        start, end = ("" if row.get(name) is None else str(row[name]).strip() for name in ("start", "end"))
        if re.fullmatch("[0-9]+", start) and re.fullmatch("[0-9]*", end):
            text = row["text"] if _is_text(row.get("text")) else ""
            name = str(row.get("episode", "")).strip()
            segments.append(Segment(name, int(start), int(end) if end else None, text, where))
        else:
            expected = "frame numbers as start and end (or no end)"
            findings.append(Finding(str(labels), where, expected, f"{start!r} and {end!r}"))
    return segments, findings


def find_segments(labels: str, names: EpisodeNames) -> tuple[dict[str, list[Segment]], list[Finding]]:
    """The segments of every episode named in a label file, by its path, and what is wrong with the rows."""
    segments, findings = read_labels(labels)
    by_path = defaultdict(list)
    for segment in segments:
        paths = names.find(segment.episode)
        if len(paths) == 1:
            by_path[paths[0]].append(segment)
        else:
            found = f"{len(paths)} of that name: {', '.join(paths)}" if paths else f"{segment.episode!r}"
            advice = "write its path within the dataset" if paths else ""
            findings.append(Finding(labels, segment.where, f"an episode of {names.dataset}", found, advice))
    return by_path, findings


def texts_per_frame(segments: Iterable[Segment], length: int, fill_gaps: bool) -> tuple[list[str], list[tuple]]:
    """One text for each of the episode's `length` frames. With `fill_gaps`, the text before a gap goes on through it.

    Also returns what is wrong with the segments: (where, expected, found, advice) of each.
    """
    texts, wrong, last = [], [], ""

    def fill(end: int, where: str):
        if end > len(texts) and not (fill_gaps and texts):
            advice = "--fill previous goes on with the text before" if texts else ""
            wrong.append((where, "a text for every frame", f"none for frames {len(texts)} to {end - 1}", advice))
        texts.extend([texts[-1] if texts else ""] * (end - len(texts)))

    for segment in sorted(segments, key=lambda segment: segment.start):
        start, end = segment.start, length if segment.end is None else segment.end
        if not start < end <= length:
            bounds = f"start < end <= {length}, its number of frames"
            wrong.append((segment.where, bounds, f"start {start} and end {end}", "end is the frame after the last one"))
        start, end = min(start, length), min(end, length)
        if start < min(len(texts), end):
            both = f"frames {start} to {min(len(texts), end) - 1} in both"
            wrong.append((segment.where, f"no frame that {last} has a text for", both, ""))
        fill(start, segment.where)
        texts[start:end] = [segment.text] * (end - start)
        last = segment.where
    fill(length, last)
    return texts, wrong


def _holds(path: str, texts: list[str]) -> bool | None:
    """Whether the labels in an HDF5 episode are `texts`; None without labels."""
    with open_hdf5(path) as file:
        if REASONINGS not in file:
            return None
        stored = file[REASONINGS]
        return isinstance(stored, h5py.Dataset) and np.ravel(stored[()]).tolist() == [text.encode() for text in texts]


@dataclass
class Applied:
    """What `apply` did: paths of the episodes written, and of those that held these labels already; frames that had no
    text of their own; names of the episodes that the label file does not name."""

    written: list[str]
    unchanged: list[str]
    filled_frames: int
    unnamed: list[str]


def apply(labels: str, dataset: str, fill: str = "error", overwrite: bool = False) -> Applied:
    """Writes the texts of a label file as `substep_reasonings` (N,) into the HDF5 episodes of the folder `dataset`.

    Nothing is written unless all labels are in order.

    Args:
        fill: what becomes of frames without a text: "error", or "previous", the text before them.
        overwrite: whether other labels may be replaced.

    Raises:
        UserError: with one line for each thing that is wrong.
    """
    names = EpisodeNames(dataset)
    if folder := next(filter(None, map(lerobot_folder, names.paths.values())), None):
        raise UserError(
            f"{folder}: expected HDF5 episodes, which labels are written into, found a LeRobot dataset; convert it "
            "first: python -m data_utils.convert lerobot"
        )
    by_path, findings = find_segments(labels, names)
    if not by_path and not findings:
        raise UserError(f"{labels}: expected labels, found none")
    applied = Applied([], [], 0, [name for name, path in names.paths.items() if path not in by_path])
    texts_of = {}
    for path, summary in summarize_all(sorted(by_path)).items():
        if not summary.length:
            findings += summary.findings
            continue
        texts, wrong = texts_per_frame(by_path[path], summary.length, fill == "previous")
        findings += [Finding(labels, f"{where}, {path}", *what) for where, *what in wrong]
        named = sum((summary.length if s.end is None else s.end) - s.start for s in by_path[path])
        applied.filled_frames += summary.length - named
        same = _holds(path, texts)
        if same is False and not overwrite:
            findings.append(Finding(path, REASONINGS, "no labels yet", "other ones", "--overwrite replaces them"))
        (applied.unchanged if same else applied.written).append(path)
        texts_of[path] = texts
    if findings:
        raise UserError("\n".join(map(str, findings)))
    for path in tqdm(applied.written, desc="writing labels", unit="episode"):
        write_reasonings(path, texts_of[path])
    return applied


def write_reasonings(path: str, texts: list[str]):
    """Makes `texts` (N,) the episode's `substep_reasonings`. A copy is changed, and then takes the episode's name, so
    that there is never a half-written one.

    Raises:
        UserError: when that cannot be done; the episode is then as it was.
    """
    episode = Path(path).resolve()  # of a link, the file it leads to
    partial = episode.with_name(f".{episode.name}.partial")
    try:
        shutil.copy2(episode, partial)
        with h5py.File(partial, "r+") as file:
            if REASONINGS in file:
                del file[REASONINGS]
            file.create_dataset(REASONINGS, data=texts, dtype=h5py.string_dtype("utf-8"))
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # before the old one goes: recordings cannot be made again
        os.replace(partial, episode)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: expected to write {REASONINGS}, found {error}; the episode is as it was") from error
    finally:
        partial.unlink(missing_ok=True)


def segments_of(starts: Iterable[int], texts: list[str], length: int) -> list[tuple[int, int, str]]:
    """Texts that hold from `starts` on -> (start, end, text); equal neighbours are one segment."""
    starts = list(starts)
    first = [i for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]
    ends = [starts[i] for i in first[1:]] + [length]
    return [(starts[i], end, texts[i]) for i, end in zip(first, ends)]


def csv_text(rows: Iterable[tuple]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def export(dataset: str, output: str) -> tuple[int, list[str]]:
    """Writes the labels that the episodes of `dataset` hold as a CSV label file: what `apply` would take.

    Returns:
        the number of episodes with labels, and the names of those without.

    Raises:
        UserError: when `output` is there already; naming each episode that cannot be read.
    """
    check_output(output)
    if Path(output).exists():
        raise UserError(f"--output {output}: expected no such file yet, found one that may hold somebody's edits")
    names = EpisodeNames(dataset).paths
    summaries = readable(names.values(), dataset)
    if findings := [str(finding) for summary in summaries.values() for finding in summary.reasoning_findings]:
        raise DatasetError("\n".join(findings))
    labelled = [name for name, path in names.items() if summaries[path].reasonings]
    rows: list[tuple] = [COLUMNS]
    for name in tqdm(labelled, desc="reading labels", unit="episode"):
        episode = open_episode(names[name])
        texts = [episode.reasoning(t) for t in range(len(episode))]
        rows += [(name, *segment) for segment in segments_of(range(len(texts)), texts, len(texts))]
        episode.close()
    Path(output).write_text(csv_text(rows), encoding="utf-8", newline="")
    return len(labelled), [name for name, path in names.items() if not summaries[path].reasonings]


def check_output(output: str):
    """Raises UserError unless `output` can name a label file to be written."""
    if Path(output).suffix.lower() != ".csv":
        raise UserError(f"--output {output}: expected a name that ends in .csv")
    if not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output {output}: expected the folder {Path(output).parent}, found none")


def readable(paths: Iterable[str], dataset: str) -> dict[str, EpisodeSummary]:
    """Summaries of the episodes of `dataset`. Raises DatasetError with one line for each thing wrong with them."""
    summaries = summarize_all(list(paths), dataset)
    if findings := [str(finding) for summary in summaries.values() for finding in summary.findings]:
        raise DatasetError("\n".join(findings))
    return summaries
