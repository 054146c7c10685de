"""Single frames out of video files."""

from fractions import Fraction

import av
import numpy as np

from .errors import DatasetError


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
        self.half_frame = Fraction(1, 2) / (self.stream.average_rate or 30) / self.stream.time_base

    def frame(self, seconds: float) -> np.ndarray:
        """The frame shown at `seconds`: (H, W, 3) uint8, RGB.

        Raises:
            DatasetError: when the video ends before, or holds no frame there.
        """
        wanted = round(seconds / self.stream.time_base)
        try:
            self.container.seek(wanted, stream=self.stream, backward=True)
            for frame in self.container.decode(self.stream):
                if frame.pts is not None and frame.pts > wanted - self.half_frame:
                    if frame.pts >= wanted + self.half_frame:
                        break
                    return frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise DatasetError(f"{self.path}: {seconds:.3f} s: expected a frame, found {error}") from error
        raise DatasetError(f"{self.path}: expected a frame at {seconds:.3f} s, found none")

    def close(self):
        self.container.close()
