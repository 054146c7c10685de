"""Puts right what can be put right without guessing, in HDF5 episodes. The original is kept as `NAME.hdf5.bak`."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np

from ..convert.hdf5_files import copy_attributes, copy_items, write_cut
from ..errors import DatasetError
from ..hdf5 import IMAGES, JPEG_START, as_text, open_hdf5
from .stats import free_name

FEW = 5  # frames that may be missing at the end


def repair(path: str, sim: bool | None = None) -> list[str]:
    """Repairs one HDF5 episode, if there is something to repair; says what was done, one line each.

    - Per-frame datasets that differ by at most 5 frames are cut to the shortest.
    - `compress` is set where all images are JPEG bytes.
    - An empty reasoning becomes that of the frame before.
    - `sim` is set to what is given.

    The repaired copy is written beside the file and then takes its name, so the file is whole at any time.

    Raises:
        OSError: when the file cannot be read or its folder not be written. The episode is as it was then.
    """
    try:
        with open_hdf5(path) as file:
            length, done = _length(file)
            texts, filled = _filled_reasonings(file, length)
            attributes = {}
            if not file.attrs.get("compress", False) and _all_jpeg(file):
                attributes["compress"] = True
                done.append("compress: set, since the images are JPEG bytes")
            if sim is not None and (bool(file.attrs.get("sim", False)) != sim or "sim" not in file.attrs):
                attributes["sim"] = sim
                done.append(f"sim: set to {sim}")
            done += filled
            if done:
                _replace(file, Path(path), length, texts, attributes)
    except (DatasetError, RuntimeError):  # unreadable: what is wrong has been reported
        return []
    return [f"{path}: {line}" for line in done]


def _per_frame(file: h5py.File) -> dict[str, tuple[int, int]]:
    """Datasets with one entry per frame -> (the axis of frames, their number)."""
    found = {}

    def visit(name: str, item):
        if not isinstance(item, h5py.Dataset) or not item.ndim:
            return
        if name in ("action", "substep_reasonings") or name.startswith("observations/"):
            found[name] = 0, item.shape[0]
        elif name == "compress_len" and item.ndim == 2:
            found[name] = 1, item.shape[1]

    file.visititems(visit)
    lengths = {length for _, length in found.values()}

    def visit_others(name: str, item):  # such as a base's actions: of the same number of frames as something known
        if isinstance(item, h5py.Dataset) and item.ndim and name not in found and item.shape[0] in lengths - {1}:
            found[name] = 0, item.shape[0]

    file.visititems(visit_others)
    return found


def _length(file: h5py.File) -> tuple[int | None, list[str]]:
    """The number of frames to cut all datasets to, None to cut nothing; what there is to say."""
    lengths = {name: length for name, (_, length) in _per_frame(file).items()}
    shortest, longest = min(lengths.values(), default=0), max(lengths.values(), default=0)
    if shortest == longest or longest - shortest > FEW or shortest <= FEW:
        return None, []
    cut = ", ".join(f"{name} ({length})" for name, length in sorted(lengths.items()) if length > shortest)
    return shortest, [f"cut to {shortest} frames: {cut}"]


def _all_jpeg(file: h5py.File) -> bool:
    images = file.get(IMAGES)
    cameras = list(images.values()) if isinstance(images, h5py.Group) else []
    return bool(cameras) and all(
        isinstance(data, h5py.Dataset)
        and data.ndim == 2
        and data.dtype == np.uint8
        and data.size > 0
        and all(tuple(data[t, :2]) == JPEG_START for t in (0, len(data) - 1))
        for data in cameras
    )


def _filled_reasonings(file: h5py.File, length: int | None) -> tuple[list[str] | None, list[str]]:
    """The reasonings with empty ones filled from the frame before, None when there is nothing to fill."""
    data = file.get("substep_reasonings")
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "OSU" or data.ndim != 1:
        return None, []
    try:
        texts = [as_text(value) for value in data[:length]]
    except UnicodeDecodeError:
        return None, []
    filled = []
    for t in range(1, len(texts)):
        if not texts[t].strip() and texts[t - 1].strip():
            texts[t] = texts[t - 1]
            filled.append(t)
    if not filled:
        return None, []
    return texts, [
        f"substep_reasonings: filled {len(filled)} empty ones from the frame before, first frame {filled[0]}"
    ]


def _replace(file: h5py.File, path: Path, length: int | None, texts: list[str] | None, attributes: dict):
    per_frame = {} if length is None else _per_frame(file)

    def write(data: h5py.Dataset, group: h5py.Group, name: str) -> bool:
        if texts is not None and data.name == "/substep_reasonings":
            copy_attributes(data, group.create_dataset(name, data=texts, dtype=h5py.string_dtype("utf-8")))
            return True
        _, count = per_frame.get(data.name.lstrip("/"), (0, 0))
        return length is not None and count > length and write_cut(count, 0, length, data, group, name)

    partial = path.with_name(f".{path.name}.partial")
    try:
        with h5py.File(partial, "w") as copy:
            copy_items(file, copy, write)
            copy.attrs.update(attributes)
        shutil.copymode(path, partial)
        backup = free_name(path)
        try:
            os.link(path, backup)
        except OSError:  # a file system without hard links
            shutil.copy2(path, backup)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
