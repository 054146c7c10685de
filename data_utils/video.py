"""Single frames out of video files."""

from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from .errors import DatasetError

NEAR = 4  # frames: decoding on is cheaper than going back to a key frame


class VideoReader:
    """Random access to the frames of the first video stream of a file.

    A frame costs decoding from the key frame before it, so short groups of pictures (LeRobot writes 2) read fast.
    """

    def __init__(self, path: str):
        self.path = str(path)
        try:
            self.container = av.open(self.path)
            self.stream = self.container.streams.video[0]
        except (OSError, av.FFmpegError, IndexError) as error:
            raise DatasetError(f"{self.path}: expected a readable video, found {error}") from error
        # Loader workers are the parallelism; a frame-threaded decoder would only add delay
        self.stream.thread_type = "NONE"
        self.stream.codec_context.thread_count = 1
        duration = (self.stream.duration or 0) * self.stream.time_base
        self.seconds = float(duration or Fraction(self.container.duration or 0, av.time_base))
        self.frame_length = 1 / (self.stream.average_rate or 30) / self.stream.time_base  # in units of time_base
        self.decoded: Iterator[av.VideoFrame] = iter(())
        self.position: int | None = None  # of the frame decoded last

    def frame(self, seconds: float) -> np.ndarray:
        """The frame shown at `seconds`: (H, W, 3) uint8, RGB.

        Raises:
            DatasetError: when the video ends before, or holds no frame there.
        """
        wanted = round(seconds / self.stream.time_base)
        try:
            if self.position is None or not 0 < wanted - self.position < NEAR * self.frame_length:
                self.container.seek(wanted, stream=self.stream, backward=True)
                self.decoded = self.container.decode(self.stream)
            self.position = None  # until a frame is decoded without an error
            for frame in self.decoded:
                if frame.pts is not None and frame.pts > wanted - self.frame_length / 2:
                    if frame.pts >= wanted + self.frame_length / 2:
                        break
                    self.position = frame.pts
                    return frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise DatasetError(f"{self.path}: {seconds:.3f} s: expected a frame, found {error}") from error
        raise DatasetError(f"{self.path}: expected a frame at {seconds:.3f} s, found none")

    def close(self):
        self.container.close()
