"""Writing videos as LeRobot does: AV1 in MP4, key frames every second frame, several episodes in one file."""

import os
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..errors import DatasetError, UserError

# What PyAV may have been built with, best first
ENCODERS = {"av1": ("libsvtav1", "libaom-av1"), "h264": ("libx264", "libopenh264"), "hevc": ("libx265",)}
# LeRobot's choices: short groups of pictures, so that any frame is decoded fast
OPTIONS = {"g": "2", "crf": "30"}
NO_REORDERING = {"libx264": {"bf": "0"}, "libx265": {"x265-params": "bframes=0:log-level=error"}}
PIXEL_FORMAT = "yuv420p"


def choose_encoder(codec: str) -> str:
    """The encoder for `codec`, or, for av1 where PyAV has none, one for h264.

    Raises:
        UserError: when PyAV has no encoder for the codec.
    """
    wanted = [*ENCODERS[codec], *(ENCODERS["h264"] if codec == "av1" else ())]
    for name in wanted:
        try:
            av.Codec(name, "w")
            return name
        except ValueError:  # UnknownCodecError is one
            continue
    raise UserError(f"--codec {codec}: expected a PyAV with {' or '.join(wanted)}, found none of them")


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int, encoder: str, place: str):
    """Encodes frames (H, W, 3) uint8 RGB of one size as MP4.

    Raises:
        DatasetError: beginning with `place`, when the sizes differ or are odd, or the encoder refuses them.
    """
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder: errors only
    stream = None
    try:
        with av.open(str(path), "w", format="mp4") as container:
            for t, frame in enumerate(frames):
                stream = stream or _add_stream(container, frame, fps, encoder, place)
                if frame.shape != (stream.height, stream.width, 3):
                    expected = f"{stream.width}x{stream.height} as before"
                    raise DatasetError(f"{place}, frame {t}: expected {expected}, found {frame.shape}")
                image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                image.pts, image.time_base = t, Fraction(1, fps)
                container.mux(stream.encode(image))
            if stream:
                container.mux(stream.encode())
    except av.FFmpegError as error:
        size = f"{stream.width}x{stream.height}" if stream else "its"
        raise DatasetError(f"{place}: expected {encoder} to encode {size} frames, found: {error}") from error


def _add_stream(container, frame: np.ndarray, fps: int, encoder: str, place: str):
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        raise DatasetError(f"{place}: expected an even width and height ({PIXEL_FORMAT}), found {width}x{height}")
    stream = container.add_stream(encoder, rate=fps, options=OPTIONS | NO_REORDERING.get(encoder, {}))
    stream.width, stream.height, stream.pix_fmt = width, height, PIXEL_FORMAT
    stream.time_base = Fraction(1, fps)
    with usual_priority():
        stream.codec_context.open()
    return stream


@contextmanager
def usual_priority():
    """Whatever happens within leaves the threads of this process as urgent as the caller.

    SVT-AV1, run by root as in a container, makes its threads and the caller real-time ones (SCHED_FIFO, 99): until the
    process ends, everything else on the machine would get what they leave.
    """
    if not os.path.isdir("/proc/self/task"):  # not Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has ended meanwhile
                if os.sched_getscheduler(int(thread)) != policy:  # else there is nothing that a sandbox could forbid
                    os.sched_setscheduler(int(thread), policy, parameters)


def join_videos(paths: list[Path], lengths: list[int], fps: int, target: Path):
    """Puts videos of the same codec, size and rate after one another without encoding them anew; `lengths` are their
    numbers of frames."""
    with av.open(str(target), "w", format="mp4") as container:
        stream, frames = None, 0
        for path, length in zip(paths, lengths):
            with av.open(str(path)) as part:
                source = part.streams.video[0]
                if stream is None:
                    stream = container.add_stream_from_template(source, opaque=True)
                    stream.time_base = source.time_base
                shift = round(Fraction(frames, fps) / source.time_base)
                for packet in part.demux(source):
                    if packet.dts is None:  # the one that only says that the file is over
                        continue
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    container.mux(packet)
            frames += length


def video_info(path: Path, fps: int) -> dict:
    """What LeRobot's info.json says of a video feature."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec_context.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": bool(container.streams.audio),
        }


def codec_header(path: Path) -> bytes:
    """What a decoder must know before the first packet. Videos in one file share it."""
    with av.open(str(path)) as container:
        return container.streams.video[0].codec_context.extradata or b""
