"""Writing ACT-style HDF5 episodes, and making other ones of them: with JPEG frames, or shorter.

The layout is that of aloha_scripts/record_sim_episodes.py; `compress_len` lists cameras in alphabetical order, which is
the order in which HDF5 lists them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np

from ..errors import DatasetError, UserError
from ..hdf5 import IMAGES, open_hdf5
from .files import Report, check_places, convert_each, folder_of, hdf5_files


def encode_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (bytes,) uint8. The channels go in as they are: the reader does not swap them either."""
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].reshape(-1)


def write_hdf5_episode(
    path: Path,
    *,
    source: str,
    action: np.ndarray,
    qpos: np.ndarray,
    language: str,
    sim: bool,
    cameras: dict[str, Iterable[np.ndarray]],
    qvel: np.ndarray | None = None,
    reasonings: list[str] | None = None,
    jpeg_quality: int | None = None,
):
    """Writes one episode of N frames.

    Args:
        source: what the episode is made of, for error messages.
        action: (N, A) float32. qpos: (N, S) float32. qvel: (N, S); zeros when None.
        sim: whether action[t] answers observation t; otherwise it lags one step.
        cameras: name -> N frames (H, W, 3) uint8 RGB, taken one by one. reasonings: one text per frame.
        jpeg_quality: of JPEG frames, 1..100; None stores raw ones.

    Raises:
        DatasetError: for frames that differ in shape or number.
    """
    with h5py.File(path, "w") as file:
        file.attrs.update(sim=sim, compress=jpeg_quality is not None)
        file["action"], file["observations/qpos"] = action, qpos
        file["observations/qvel"] = np.zeros_like(qpos) if qvel is None else qvel
        text = h5py.string_dtype("utf-8")
        file.create_dataset("language_raw", data=[language], dtype=text)
        if reasonings:
            file.create_dataset("substep_reasonings", data=reasonings, dtype=text)
        images = file.create_group(IMAGES)
        compress_len = []
        for name in sorted(cameras):
            frames = _checked(f"{source}: camera {name}", cameras[name], len(action))
            if jpeg_quality is None:
                _write_raw(images, name, frames, len(action))
            else:
                compress_len.append(_write_jpegs(images, name, frames, jpeg_quality))
        if compress_len:
            file["compress_len"] = np.array(compress_len, np.int64)  # (K, N)


def _checked(place: str, frames: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    shape, t = None, -1
    for t, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise DatasetError(
                f"{place}, frame {t}: expected (height, width, 3) uint8, all frames alike (the first: {shape}), "
                f"found {frame.shape} {frame.dtype}"
            )
        yield frame
    if t + 1 != count:
        raise DatasetError(f"{place}: expected {count} frames, as many as action has, found {t + 1}")


def _write_raw(images: h5py.Group, name: str, frames: Iterable[np.ndarray], count: int):
    for t, frame in enumerate(frames):
        if t == 0:
            images.create_dataset(name, (count, *frame.shape), np.uint8, chunks=(1, *frame.shape))
        images[name][t] = frame


def _write_jpegs(images: h5py.Group, name: str, frames: Iterable[np.ndarray], quality: int) -> list[int]:
    """Writes (N, L) zero-padded bytes; returns the N lengths before the padding."""
    encoded = [encode_jpeg(frame, quality) for frame in frames]
    lengths = [len(data) for data in encoded]
    data = images.create_dataset(name, (len(encoded), max(lengths)), np.uint8, chunks=(1, max(lengths)))
    for t, row in enumerate(encoded):
        data[t, : len(row)] = row
    return lengths


def compress_hdf5(source: Path, out: Path, quality: int = 90) -> Report:
    """Raw frames become JPEG frames of `quality` (1..100); everything else is copied as it is.

    Files whose frames are JPEG already are copied unchanged; their number is printed.
    """
    untouched = []

    def convert(path: Path, target: Path):
        with open_hdf5(path) as file, h5py.File(target, "w") as new:
            if file.attrs.get("compress", False):
                untouched.append(path)
                copy_items(file, new, lambda data, group, name: False)
            else:
                _compress(path, file, new, quality)

    report = _convert_files(source, out, convert)
    if untouched:
        print(f"note: {len(untouched)} files hold JPEG frames already and were copied unchanged: {untouched[0]} …")
    return report


def _compress(path: Path, file: h5py.File, new: h5py.File, quality: int):
    count = _frames_of(path, file)
    compress_len = {}

    def write(data: h5py.Dataset, group: h5py.Group, name: str) -> bool:
        if group.name != f"/{IMAGES}":
            return data.name == "/compress_len"  # a leftover, if there is one; written anew below
        if data.ndim != 4 or data.shape[-1] != 3 or data.dtype != np.uint8 or len(data) != count:
            raise DatasetError(
                f"{path}: {IMAGES}/{name}: expected {count} raw frames, ({count}, height, width, 3) uint8, "
                f"found {data.shape} {data.dtype}"
            )
        compress_len[name] = _write_jpegs(group, name, _rows(data, 0, count), quality)
        copy_attributes(data, group[name])
        return True

    copy_items(file, new, write)
    if not compress_len:
        raise DatasetError(f"{path}: {IMAGES}: expected raw frames, found no camera")
    new["compress_len"] = np.array([compress_len[name] for name in sorted(compress_len)], np.int64)
    new.attrs["compress"] = True


def truncate_hdf5(source: Path, out: Path, start: int = 0, stop: int | None = None) -> Report:
    """Keeps frames `start` .. `stop` - 1 of every dataset whose first dimension is the number of frames, and of
    `compress_len`, whose second one is. An episode that ends before `stop` keeps its end; their number is printed.

    Raises:
        UserError: unless 0 <= start < stop. DatasetError: naming an episode that has no frame `start`.
    """
    if start < 0 or (stop is not None and stop <= start):
        raise UserError(f"truncate: expected 0 <= start < stop, found start {start}, stop {stop}")
    short = []

    def convert(path: Path, target: Path):
        with open_hdf5(path) as file, h5py.File(target, "w") as new:
            count = _frames_of(path, file)
            if start >= count:
                raise DatasetError(f"{path}: --start: expected one of its {count} frames, found {start}")
            if stop is not None and stop > count:
                short.append(path)
            copy_items(file, new, functools.partial(write_cut, count, start, min(stop or count, count)))

    report = _convert_files(source, out, convert)
    if short:
        print(f"note: {len(short)} episodes end before frame {stop} and keep their end: {short[0]} …")
    return report


def write_cut(count: int, start: int, stop: int, data: h5py.Dataset, group: h5py.Group, name: str) -> bool:
    """Writes the frames `start` .. `stop` - 1 of a dataset of `count` frames into `group`; False for another one."""
    axis = 1 if data.name == "/compress_len" else 0
    if data.ndim <= axis or data.shape[axis] != count:
        return False
    shape = tuple(stop - start if i == axis else size for i, size in enumerate(data.shape))
    new = _create_like(data, group, name, shape)
    if axis:
        new[...] = data[:, start:stop]
    else:
        for t, row in enumerate(_rows(data, start, stop)):
            new[t] = row
    copy_attributes(data, new)
    return True


def _create_like(data: h5py.Dataset, group: h5py.Group, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
    """A dataset of another shape with the same type, filters and, as far as it fits, chunks."""
    if data.is_virtual or data.external:
        return group.create_dataset(name, shape, data.dtype)
    properties = data.id.get_create_plist()
    if data.chunks:
        properties.set_chunk(tuple(map(min, data.chunks, shape)))
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), data.id.get_type(), space, dcpl=properties))


def _rows(data: h5py.Dataset, start: int, stop: int) -> Iterator[np.ndarray]:
    """Rows one by one, but read chunk by chunk: a chunk of several rows is not unpacked once for each."""
    step = data.chunks[0] if data.chunks else 1
    for first in range(start - start % step, stop, step):
        yield from data[max(first, start) : min(first + step, stop)]


def _frames_of(path: Path, file: h5py.File) -> int:
    action = file.get("action")
    if not isinstance(action, h5py.Dataset) or action.ndim != 2 or not len(action):
        found = action.shape if isinstance(action, h5py.Dataset) else f"only {', '.join(file) or 'nothing'}"
        raise DatasetError(f"{path}: expected a dataset `action` (N, A), N being the number of frames, found {found}")
    return len(action)


def _convert_files(source: Path, out: Path, convert: Callable[[Path, Path], None]) -> Report:
    check_places(source, out)

    def convert_readable(path: Path, target: Path):
        try:
            convert(path, target)
        except (OSError, RuntimeError) as error:  # what HDF5 raises on broken chunks
            raise DatasetError(f"{path}: expected to read it and to write {target}, found: {error}") from error

    base = folder_of(source)
    return convert_each([(path, out / path.relative_to(base)) for path in hdf5_files(source)], convert_readable, out)


def copy_items(source: h5py.Group, target: h5py.Group, write: Callable[[h5py.Dataset, h5py.Group, str], bool]):
    """Copies a group with attributes, links and subgroups. Every dataset goes to `write(dataset, group to write in,
    name)`; when that returns False it is copied unchanged."""
    copy_attributes(source, target)
    for name in source:
        link = source.get(name, getlink=True)
        # What another file holds is copied instead: the link may not reach it. One that leads nowhere stays as it is
        if isinstance(link, h5py.SoftLink) or source.get(name) is None:
            target[name] = link
        elif isinstance(source[name], h5py.Group):
            copy_items(source[name], target.create_group(name), write)
        elif not isinstance(source[name], h5py.Dataset) or not write(source[name], target, name):
            source.copy(name, target, name)


def copy_attributes(source: h5py.Group | h5py.Dataset, target: h5py.Group | h5py.Dataset):
    for name, value in source.attrs.items():
        target.attrs.create(name, value, dtype=source.attrs.get_id(name).dtype)
