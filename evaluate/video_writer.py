"""The video of a rollout: the cameras side by side, below them what was asked, written and reached."""

import os
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

# What PyAV may have been built with; browsers play the first two
ENCODERS = ("libx264", "libopenh264", "mpeg4")
CAMERA_HEIGHT, PANEL_HEIGHT, LEAST_WIDTH = 180, 116, 480  # pixels, even as the encoders ask
LINE_HEIGHT, LETTER_WIDTH, TEXT_SCALE = 18, 8, 0.45  # pixels, but for the scale
WHITE, YELLOW, GREEN, RED, DARK = (235, 235, 235), (245, 210, 90), (90, 220, 110), (240, 100, 90), (24, 24, 24)


class RolloutVideo:
    """Writes an mp4; the file has its name once `close` has been called.

    Args:
        path: of the mp4. rate: frames per second, a Fraction. instruction: the task in words.
    """

    def __init__(self, path: str | Path, rate: Fraction, instruction: str):
        self.path = Path(path)
        self.unfinished = self.path.with_name(f"{self.path.name}.part")
        self.rate = rate
        self.instruction = instruction
        self.frames = 0
        self.container = av.open(str(self.unfinished), "w", format="mp4")
        self.stream = None

    def add(self, images: list[np.ndarray], reasoning: str, status: str, success: bool | None = None):
        """Appends a frame.

        Args:
            images: (H, W, 3) uint8 RGB of the cameras, of any sizes that stay the same from frame to frame.
            reasoning, status: texts drawn below. success: colours the status; None while that is open.
        """
        frame = draw_frame(images, self.instruction, reasoning, status, success)
        if self.stream is None:
            encoder = next(name for name in ENCODERS if name in av.codecs_available)
            self.stream = self.container.add_stream(encoder, rate=self.rate)
            self.stream.height, self.stream.width = frame.shape[:2]
            self.stream.pix_fmt = "yuv420p"
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = self.frames, 1 / self.rate
        self.container.mux(self.stream.encode(picture))
        self.frames += 1

    def close(self):
        if self.stream is not None:
            self.container.mux(self.stream.encode())
        self.container.close()
        os.replace(self.unfinished, self.path)


def draw_frame(
    images: list[np.ndarray], instruction: str, reasoning: str, status: str, success: bool | None
) -> np.ndarray:
    """The cameras' images (H, W, 3) and the texts -> (h, w, 3) uint8 RGB, h and w even."""
    widths = [_even(image.shape[1] * CAMERA_HEIGHT / image.shape[0]) for image in images]
    cameras = [cv2.resize(image, (width, CAMERA_HEIGHT)) for image, width in zip(images, widths)]
    row = np.hstack(cameras)  # (CAMERA_HEIGHT, w, 3)
    width = max(row.shape[1], LEAST_WIDTH)
    frame = np.full((CAMERA_HEIGHT + PANEL_HEIGHT, width, 3), DARK, np.uint8)
    frame[:CAMERA_HEIGHT, : row.shape[1]] = row
    letters = (width - 12) // LETTER_WIDTH
    lines = [(line, WHITE) for line in _wrap(f"Task: {instruction}", letters, 2)]
    lines += [(line, YELLOW) for line in _wrap(f"Reasoning: {reasoning or '-'}", letters, 3)]
    lines += [(status, {None: WHITE, True: GREEN, False: RED}[success])]
    for number, (line, colour) in enumerate(lines):
        place = (6, CAMERA_HEIGHT + LINE_HEIGHT * (number + 1))
        # OpenCV's font knows ASCII only
        text = line.encode("ascii", "replace").decode()
        cv2.putText(frame, text, place, cv2.FONT_HERSHEY_SIMPLEX, TEXT_SCALE, colour, 1, cv2.LINE_AA)
    return frame


def _wrap(text: str, letters: int, lines: int) -> list[str]:
    return textwrap.wrap(text, letters, max_lines=lines, placeholder=" ...")


def _even(size: float) -> int:
    return max(2, 2 * round(size / 2))
