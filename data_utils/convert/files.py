"""Where conversions read and write: sources, targets, files that appear only when they are whole, the last line."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..episodes import find_episodes, lerobot_folder, walk
from ..errors import DatasetError, UserError


@dataclass
class Report:
    """What a conversion did. Sizes in bytes: of all sources, and of all their outputs, old ones included."""

    out: Path
    converted: int = 0
    skipped: int = 0
    before: int = 0
    after: int = 0

    def __str__(self) -> str:
        skipped = f", skipped {self.skipped} (already there)" if self.skipped else ", skipped 0"
        sizes = f"{self.before / 1e6:.1f} MB before, {self.after / 1e6:.1f} MB after"
        return f"converted {self.converted} episodes{skipped}: {self.out}, {sizes}"


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A file to write, `.NAME.partial` beside `path`, which takes that name when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def folder_of(source: Path) -> Path:
    """The folder that output paths are relative to."""
    return source if source.is_dir() else source.parent


def check_places(source: Path, out: Path):
    """Refuses to write among the files that are read.

    Raises:
        UserError: when `source` does not exist, `out` is a file, or is or lies in the source's folder.
    """
    if not source.exists() and not lerobot_folder(source):
        raise UserError(f"SRC {source}: expected a file or folder, found none")
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT {out}: expected a folder, or a name that is free, found a file")
    place, folder = out.resolve(), folder_of(source).resolve()
    if place == folder or (source.is_dir() and folder in place.parents):
        raise UserError(f"OUT {out}: expected a folder outside SRC {source}, found one in it; name another one")


def hdf5_files(source: Path) -> list[Path]:
    """All `*.hdf5` of a folder and its subfolders, sorted; or the one file.

    Raises:
        DatasetError: when there is none.
    """
    if source.is_file():
        return [source]
    found = [Path(folder, name) for folder, _, names in walk(source) for name in names if name.endswith(".hdf5")]
    if not found:
        raise DatasetError(f"SRC {source}: expected *.hdf5 files, found none")
    return sorted(found)


def episode_sources(source: Path) -> list[str]:
    """Paths for `open_episode`: all episodes below a folder, or the one that `source` names.

    Raises:
        DatasetError: when there is none.
    """
    return find_episodes(source) if source.is_dir() else [str(source)]


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of files, and of folders with all that is in them."""
    total = 0
    for path in paths:
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def size_of_episodes(paths: Iterable[str]) -> int:
    """Bytes of the files that hold episodes; LeRobot datasets count whole."""
    return size_of({lerobot_folder(path) or Path(path) for path in paths})


def convert_each(jobs: list[tuple[Path, Path]], convert: Callable[[Path, Path], None], out: Path) -> Report:
    """Calls `convert(source, unfinished target)` for every (source, target) whose target does not exist yet."""
    report = Report(out)
    for source, target in tqdm(jobs, desc="converting", unit="episode"):
        if target.exists():
            report.skipped += 1
            continue
        with partial_file(target) as unfinished:
            convert(source, unfinished)
        report.converted += 1
    report.before = size_of_episodes(str(source) for source, _ in jobs)
    report.after = size_of(target for _, target in jobs)
    return report


def chosen_cameras(path: str, available: Iterable[str], wanted: dict[str, str] | None) -> dict[str, str]:
    """Output name -> name in the episode. Without `wanted` all cameras keep their names.

    Raises:
        DatasetError: naming a camera the episode does not have.
    """
    available = list(available)
    if not wanted:
        return {name: name for name in available}
    for name in wanted.values():
        if name not in available:
            found = ", ".join(available) or "no camera"
            raise DatasetError(f"{path}: --camera: expected a camera {name}, found {found}")
    return dict(wanted)
