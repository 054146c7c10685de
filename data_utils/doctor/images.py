"""What the frames of an episode show: every one is looked at, one by one, at reduced size."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import cv2
import h5py
import numpy as np

from ..episodes import lerobot_folder
from ..errors import DatasetError
from ..hdf5 import IMAGES, REDUCED, as_text, jpeg_size, open_hdf5
from ..lerobot import LeRobotEpisode
from ..video import VideoReader
from .diagnosis import Diagnosis, warning

CHECK_WIDTH, PICTURE_WIDTH = 80, 160  # pixels; JPEG is decoded down to that, not below
MEAN_SIZE = (16, 12)
PICTURES = 5  # of each camera
POINTS = 200  # of a drawn trajectory
ALL_RAW_FRAMES = 128 * 2**20  # bytes of a camera; of more raw frames, pairs of neighbours are looked at
RAW_PAIRS = 48
BLACK = 16  # of 255
MOVES = 0.01  # of a dimension's range in the episode, from one frame to the next
REPEATED = 0.2  # of the frames during which the robot moves
JPEG_END = b"\xff\xd9"


@dataclass
class Look:
    """What was seen of one episode. means: camera -> (12, 16, 3), its mean image. Filled for a report only:
    pictures, camera -> [(frame, JPEG bytes)]; tracks, "action" or "qpos" -> (frames (P,), values (P, D)); reasonings,
    text -> number of frames."""

    path: str
    findings: list[Diagnosis] = field(default_factory=list)
    means: dict[str, np.ndarray] = field(default_factory=dict)
    pictures: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    tracks: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    reasonings: Counter = field(default_factory=Counter)


@dataclass
class Shot:
    """A frame; image (h, w, 3) uint8 RGB, None if it cannot be decoded. repeats: it is the frame before once
    more; None if that was not looked at.
    problem: what was found in its place, with None, or is odd about it."""

    t: int
    image: np.ndarray | None
    repeats: bool | None
    problem: str = ""


@dataclass(frozen=True)
class Job:
    """path: of an episode, sound or not. frames: whether to look at them. report: whether to count reasonings;
    shown: whether to keep pictures and tracks."""

    path: str
    frames: bool
    report: bool
    shown: bool


def look_at(job: Job) -> Look:
    path, frames, shown = job.path, job.frames, job.shown
    look = Look(path)
    if lerobot_folder(path):
        try:
            episode = LeRobotEpisode(path)
        except DatasetError:  # stands in its summary
            return look
        _keep(look, job, episode.action, episode.qpos, episode.reasonings)
        for camera, feature in episode.dataset.cameras.items() if frames else ():
            shots = _lerobot(episode, camera)
            _look(look, camera, feature, len(episode), shots, _moving(episode.qpos), shown, expected="a frame")
        return look
    try:
        with open_hdf5(path) as file:
            qpos = _matrix(file, "observations/qpos")
            _keep(look, job, _matrix(file, "action"), qpos, _texts(file) if job.report else [])
            images = file.get(IMAGES)
            for camera in images if frames and isinstance(images, h5py.Group) else ():
                data = images.get(camera)
                if isinstance(data, h5py.Dataset) and data.dtype == np.uint8 and data.ndim in (2, 4) and data.size:
                    shots = _jpegs(data) if data.ndim == 2 else _raw(data)
                    _look(look, camera, f"{IMAGES}/{camera}", len(data), shots, _moving(qpos), shown)
    except (DatasetError, OSError, RuntimeError, KeyError):  # stands in its summary
        pass
    return look


def _matrix(file: h5py.File, name: str) -> np.ndarray:
    data = file.get(name)
    sound = isinstance(data, h5py.Dataset) and data.ndim == 2 and data.dtype.kind == "f"
    return data[()] if sound else np.zeros((0, 0))


def _texts(file: h5py.File) -> list[str]:
    data = file.get("substep_reasonings", file.get("reasoning"))
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "OSU":
        return []
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else as_text(v) for v in np.ravel(data[()])]


def _keep(look: Look, job: Job, action: np.ndarray, qpos: np.ndarray, reasonings: list[str | None]):
    if job.report:
        look.reasonings = Counter(text or "" for text in reasonings)
    for name, values in (("action", action), ("qpos", qpos)) if job.shown else ():
        if values.size:
            rows = np.unique(np.linspace(0, len(values) - 1, POINTS).astype(int))
            look.tracks[name] = rows, values[rows].astype(np.float32)


def _moving(qpos: np.ndarray) -> np.ndarray:
    """(N,) bool: whether the robot moved clearly from the frame before to this one."""
    if len(qpos) < 2:
        return np.zeros(len(qpos), bool)
    least = np.maximum(MOVES * np.ptp(qpos, axis=0), 1e-3)
    return np.append(False, (np.abs(np.diff(qpos, axis=0)) > least).any(axis=1))


def _reduction(width: int, wanted: int) -> int:
    """cv2's flag that decodes a JPEG of `width` to `wanted` or a little more."""
    factor = max((factor for factor in REDUCED if width >= factor * wanted), default=1)
    return REDUCED.get(factor, cv2.IMREAD_COLOR)


def _picture_frames(length: int) -> set[int]:
    return set(np.linspace(0, max(length - 1, 0), PICTURES).astype(int).tolist())


def _jpegs(data: h5py.Dataset) -> Iterator[Shot]:
    previous, first_size, pictures = None, None, _picture_frames(len(data))
    for t in range(len(data)):
        try:
            row = data[t]
        except (OSError, RuntimeError):
            yield Shot(t, None, False, "bytes that cannot be read")
            continue
        size = jpeg_size(row)
        image = None
        if row.any():
            image = cv2.imdecode(row, _reduction(size[0], PICTURE_WIDTH if t in pictures else CHECK_WIDTH))
        first_size = first_size or (None if image is None else size)
        problem = ""
        if image is None:
            problem = "something else"
        elif not row.tobytes().rstrip(b"\0").endswith(JPEG_END):
            problem = "JPEG bytes without their end"
        elif size != first_size:
            problem = "{} x {} pixels unlike the {} x {} before".format(*size, *first_size)
        yield Shot(t, image, np.array_equal(row, previous), problem)
        previous = row


def _raw(data: h5py.Dataset) -> Iterator[Shot]:
    frames = np.arange(len(data))
    if data.nbytes > ALL_RAW_FRAMES and len(data) > 2 * RAW_PAIRS:
        starts = np.linspace(0, len(data) - 2, RAW_PAIRS).astype(int)
        frames = np.union1d([*starts, *starts + 1], sorted(_picture_frames(len(data))))
    previous = (-1, None)
    stride = max(1, data.shape[2] // PICTURE_WIDTH)
    for t in frames.tolist():
        try:
            frame = data[t]
        except (OSError, RuntimeError):
            yield Shot(t, None, False, "bytes that cannot be read")
            continue
        repeats = np.array_equal(frame, previous[1]) if previous[0] == t - 1 else None
        yield Shot(t, frame[::stride, ::stride, :3], repeats)
        previous = t, frame


def _lerobot(episode: LeRobotEpisode, camera: str) -> Iterator[Shot]:
    feature, previous = episode.dataset.cameras[camera], None
    if feature in episode.files.videos:
        try:
            VideoReader(episode.files.videos[feature][0]).close()
        except DatasetError:  # stands in its summary
            return
    for t in range(len(episode)):
        try:
            frame = episode.frame(camera, t)
        except (DatasetError, OSError, TypeError):  # no image, another file's, none at all
            yield Shot(t, None, None, "none that can be decoded")
            continue
        stride = max(1, frame.shape[1] // PICTURE_WIDTH)
        yield Shot(t, frame[::stride, ::stride], None if previous is None else np.array_equal(frame, previous))
        previous = frame


def _look(look: Look, camera: str, name: str, length: int, shots: Iterator[Shot], moving, shown, expected="JPEG bytes"):
    """Adds to `look` what the shots of a camera show. name: of its dataset; moving (N,) bool, see `_moving`."""
    problems: dict[tuple[str, bool], list[int]] = {}
    black, repeated, seen, looked_at = [], [], 0, 0
    total, pictures = np.zeros((*MEAN_SIZE[::-1], 3)), _picture_frames(length) if shown else ()
    compared = 0
    for shot in shots:
        looked_at += 1
        if shot.problem:
            problems.setdefault((shot.problem, shot.image is None), []).append(shot.t)
        if shot.image is None:
            continue
        seen += 1
        total += cv2.resize(shot.image, MEAN_SIZE, interpolation=cv2.INTER_AREA)
        if shot.image.max() < BLACK:
            black.append(shot.t)
        elif shot.repeats is not None and shot.t < len(moving) and moving[shot.t]:
            compared += 1
            if shot.repeats:
                repeated.append(shot.t)
        if shot.t in pictures:
            look.pictures.setdefault(camera, []).append((shot.t, _thumbnail(shot.image)))
    if seen:
        look.means[camera] = (total / seen).astype(np.float32)

    def of_all(frames: list[int]) -> str:
        return f"{len(frames)} of {looked_at} frames{' looked at' if looked_at < length else ''}"

    for (problem, lost), frames in problems.items():
        where, found = f"{name}, frame {frames[0]}", f"{problem} ({of_all(frames)})"
        advice = "record or copy it again, or cut these frames"
        look.findings.append(Diagnosis(look.path, where, expected, found, advice, lost, kind="frames"))
    if black:
        advice = "was the camera covered or unplugged? Drop the episode, or cut it"
        found = f"a black one ({of_all(black)})"
        look.findings.append(warning("black", look.path, f"{name}, frame {black[0]}", "a picture", found, advice))
    if len(repeated) >= max(3, REPEATED * compared):
        run = _longest_run(repeated)
        found = f"the frame before again ({len(repeated)} of {compared} times, at most {run} in a row)"
        advice = "does the camera deliver fewer frames than the robot states, or nothing in its view move?"
        where = f"{name}, frame {repeated[0]}"
        expected = "new pictures while the robot moves"
        look.findings.append(warning("duplicates", look.path, where, expected, found, advice))


def _longest_run(frames: list[int]) -> int:
    longest = run = 1
    for before, after in pairwise(frames):
        run = run + 1 if after == before + 1 else 1
        longest = max(longest, run)
    return longest


def _thumbnail(image: np.ndarray) -> bytes:
    height = max(1, round(image.shape[0] * PICTURE_WIDTH / image.shape[1]))
    small = cv2.resize(image, (PICTURE_WIDTH, height), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def exchanged_cameras(looks: list[Look]) -> list[Diagnosis]:
    """Episodes in which two cameras look like each other's in the other episodes. Of two ways that both occur, the
    rarer one is reported; the later one if both are as frequent."""
    findings = []
    cameras = sorted({camera for look in looks for camera in look.means})
    for i, a in enumerate(cameras):
        for b in cameras[i + 1 :]:
            both = [look for look in looks if a in look.means and b in look.means]
            crossed = [look for look in both if _is_crossed(both[0].means, look.means, a, b)]
            if 2 * len(crossed) > len(both):
                crossed = [look for look in both if not any(look is other for other in crossed)]
            for look in crossed:
                where, found = f"{a} and {b}", "views like those of the other episodes exchanged"
                advice = "were the cameras plugged in the other way round? Exchange their names in the file"
                expected = "the views these names have in the other episodes"
                findings.append(warning("camera order", look.path, where, expected, found, advice))
    return findings


def _is_crossed(reference: dict[str, np.ndarray], means: dict[str, np.ndarray], a: str, b: str) -> bool:
    def distance(x: str, y: str) -> float:
        return float(np.abs(reference[x] - means[y]).mean())

    return distance(a, b) + distance(b, a) < 0.5 * (distance(a, a) + distance(b, b))
