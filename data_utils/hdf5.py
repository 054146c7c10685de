"""ACT-style HDF5 episodes (Zhao et al., 2023), raw or JPEG-compressed; the layout stands in README.md."""

import os

import cv2
import h5py
import numpy as np

from .episodes import Episode
from .errors import DatasetError, Finding
from .normalization import Moments
from .summary import EpisodeSummary

IMAGES = "observations/images"
JPEG_START = (0xFF, 0xD8)
# JPEG decoders can leave out detail that a smaller image would not show: by these factors of width and height
REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


def open_hdf5(path: str | os.PathLike) -> h5py.File:
    try:
        # Frames are read once and at random: a chunk cache would only copy and keep them
        return h5py.File(path, "r", rdcc_nbytes=0)
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: expected an episode, found no such file") from error
    except OSError as error:
        raise DatasetError(
            f"{path}: expected a readable HDF5 file, found a truncated or other one ({error})"
        ) from error


def as_text(value) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


class Hdf5Episode(Episode):
    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self.file = open_hdf5(path)
        try:
            self._read_all()
        except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            self.file.close()
            summary = summarize_hdf5(self.path)
            findings = [*summary.findings, *summary.reasoning_findings]
            problem = findings[0] if findings else f"{path}: expected an episode, found something else ({error})"
            raise DatasetError(str(problem)) from error
        self.plain_file = open(path, "rb", buffering=0)  # noqa: SIM115  open as long as the episode; see _read
        self._in_one_piece: dict[str, bool] = {}

    def _read_all(self):
        self.sim = bool(self.file.attrs.get("sim", False))
        self.compressed = bool(self.file.attrs.get("compress", False))
        self.action = self.file["action"][()].astype(np.float32)
        self.qpos = self.file["observations/qpos"][()].astype(np.float32)
        self._instruction = as_text(np.ravel(self.file["language_raw"][()])[0])
        source = next((name for name in ("substep_reasonings", "reasoning") if name in self.file), None)
        self._reasonings = [as_text(text) for text in np.ravel(self.file[source][()])] if source else []
        images = {name: self.file.get(f"{IMAGES}/{name}") for name in self.file.get(IMAGES, ())}
        self.images = {name: data for name, data in images.items() if isinstance(data, h5py.Dataset)}
        self.camera_names = list(self.images)

    def instruction(self, t: int) -> str:
        return self._instruction

    def reasoning(self, t: int) -> str | None:
        if not self._reasonings:
            return None
        return self._reasonings[t if len(self._reasonings) > 1 else 0]

    def frame(self, camera: str, t: int, size: tuple[int, int] | None = None) -> np.ndarray:
        data = self._read(camera, t)
        if not self.compressed:
            return data
        # The frames were encoded without a channel swap, so decoding needs none either.
        image = cv2.imdecode(data, _least_decoding(data, size))
        if image is None:
            raise DatasetError(f"{self.path}: {IMAGES}/{camera}, frame {t}: expected JPEG bytes, found something else")
        return image

    def _read(self, camera: str, t: int) -> np.ndarray:
        """Frame `t` as it is stored. Where that is in one piece, not compressed by HDF5, the piece is read from the
        file directly, in a third of the time."""
        images = self.images[camera]
        if camera not in self._in_one_piece:
            whole = images.chunks in (None, (1, *images.shape[1:])) and not images.id.get_create_plist().get_nfilters()
            self._in_one_piece[camera] = whole and not self.file.userblock_size
        offset = None
        if self._in_one_piece[camera] and images.chunks:
            offset = images.id.get_chunk_info_by_coord((t,) + (0,) * (images.ndim - 1)).byte_offset
        elif self._in_one_piece[camera] and (start := images.id.get_offset()) is not None:
            offset = start + t * (images.nbytes // len(images))
        if offset is None:  # in other pieces, or never written
            try:
                return images[t]
            except OSError as error:
                raise DatasetError(
                    f"{self.path}: {IMAGES}/{camera}, frame {t}: expected a frame, found damaged data ({error})"
                ) from error
        frame = np.empty(images.shape[1:], np.uint8)
        if os.preadv(self.plain_file.fileno(), [frame], offset) != frame.nbytes:
            raise DatasetError(f"{self.path}: {IMAGES}/{camera}, frame {t}: expected {frame.nbytes} bytes, found fewer")
        return frame

    def close(self):
        self.file.close()
        self.plain_file.close()


def _least_decoding(data: np.ndarray, size: tuple[int, int] | None) -> int:
    """cv2's flag that decodes JPEG bytes as far as an image of `size` needs."""
    width, height = jpeg_size(data) if size else (0, 0)
    if not width:
        return cv2.IMREAD_COLOR
    factor = max((f for f in REDUCED if width >= f * size[0] and height >= f * size[1]), default=1)
    return REDUCED.get(factor, cv2.IMREAD_COLOR)


def jpeg_size(data: np.ndarray) -> tuple[int, int]:
    """(width, height) from the frame header of JPEG bytes (ITU-T T.81, B.2.2); (0, 0) when there is none."""
    header, at = data[:4096].tobytes(), 2
    while at + 9 <= len(header) and header[at] == 0xFF:
        marker, length = header[at + 1], int.from_bytes(header[at + 2 : at + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(header[at + 7 : at + 9]), int.from_bytes(header[at + 5 : at + 7])
        at += 2 + length
    return 0, 0


def summarize_hdf5(path: str) -> EpisodeSummary:
    """Checks layout and numbers of an episode; of JPEG frames the first and the last bytes' marks.

    Raises:
        DatasetError: when the file cannot be opened.
    """
    summary = EpisodeSummary(path)
    with open_hdf5(path) as file:

        def dataset(name: str) -> h5py.Dataset | None:
            if isinstance(data := file.get(name), h5py.Dataset) and data.shape is not None:
                return data
            summary.find(name, "a dataset", f"none (the file holds {', '.join(sorted(file)) or 'nothing'})")
            return None

        def numbers(name: str) -> Moments | None:
            data = dataset(name)
            return None if data is None else summary.check_numbers(name, data[()])

        try:
            summary.sim = bool(file.attrs.get("sim", False))
            compressed = bool(file.attrs.get("compress", False))
            summary.action, summary.qpos = numbers("action"), numbers("observations/qpos")
            if "action" not in file or not summary.length:
                return summary
            length = summary.length
            if summary.qpos is not None and summary.qpos.count != length:
                summary.find("observations/qpos", f"{length} frames, as many as action has", summary.qpos.count)
            if summary.action is not None and summary.qpos is not None:
                summary.describe_motion(file["action"][()], file["observations/qpos"][()])
            if (language := dataset("language_raw")) is not None:
                texts, findings = _read_texts(path, "language_raw", language)
                summary.findings += findings
                summary.describe_instructions(texts[:1])
            name = "substep_reasonings" if "substep_reasonings" in file else "reasoning"
            if name in file and (stored := dataset(name)) is not None and (stored.size or name != "reasoning"):
                summary.reasonings = stored.size
                texts, summary.reasoning_findings = _read_texts(path, name, stored)
                summary.describe_reasonings(texts)
                if stored.size != length and (name == "substep_reasonings" or stored.size > 1):
                    expected = f"{length} texts, one per frame" + (", or one" if name == "reasoning" else "")
                    summary.reasoning_findings.insert(0, Finding(path, name, expected, str(stored.size)))
            images = file.get(IMAGES)
            summary.cameras = sorted(images) if isinstance(images, h5py.Group) else []
            for camera in summary.cameras:
                _check_camera(summary, camera, images.get(camera), compressed)
        except (OSError, RuntimeError) as error:  # what HDF5 raises on broken chunks
            summary.find("", "a readable HDF5 file", f"a damaged one ({error})", "record or copy it again")
    return summary


def _read_texts(path: str, name: str, data: h5py.Dataset) -> tuple[list[str], list[Finding]]:
    if data.dtype.kind not in "OSU" or not data.size:
        return [], [Finding(path, name, "text", f"{data.shape} of {data.dtype}")]
    try:
        return [as_text(value) for value in np.ravel(data[()])], []
    except UnicodeDecodeError as error:
        return [], [Finding(path, name, "UTF-8 text", str(error))]


def _check_camera(summary: EpisodeSummary, camera: str, data, compressed: bool):
    def find(where: str, expected: str, found):
        summary.find(where, expected, found, camera=camera)

    name = f"{IMAGES}/{camera}"
    if not isinstance(data, h5py.Dataset):
        return find(name, "a dataset", "a link that leads nowhere" if data is None else "a group")
    if data.dtype != np.uint8:
        return find(name, "uint8", data.dtype)
    if compressed and data.ndim != 2:
        return find(name, "shape (N, bytes) because the attribute `compress` is set", data.shape)
    if not compressed and data.ndim == 2:
        return find(name, "the attribute `compress`, because the images are (N, bytes)", "no such attribute")
    if not compressed and (data.ndim != 4 or data.shape[-1] != 3):
        return find(name, "shape (N, height, width, 3)", data.shape)
    if len(data) != summary.length:
        return find(name, f"{summary.length} frames, as many as action has", len(data))
    summary.image_sizes[camera] = list(jpeg_size(data[0])) if compressed else [data.shape[2], data.shape[1]]
    for t in (0, summary.length - 1) if compressed else ():
        if tuple(data[t, :2]) != JPEG_START:
            return find(f"{name}, frame {t}", "JPEG bytes", f"bytes that start with {data[t, :2].tolist()}")
