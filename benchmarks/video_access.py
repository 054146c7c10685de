"""`python benchmarks/video_access.py`: one random frame out of a video, by how often it has a key frame.

An AV1 clip of 120 frames (crf 30, yuv420p) at two sizes; beside it the same frames as JPEG of quality 90. One thread.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import cv2
import numpy as np
from training_item import RAW, SMALL, milliseconds, scene

from data_utils.convert.lerobot_video import usual_priority
from data_utils.video import VideoReader

FRAMES, FPS, READS = 120, 50, 200


def encode(path: Path, size: tuple[int, int], frames_per_key: int):
    with av.open(str(path), "w") as container:
        options = {"g": str(frames_per_key), "crf": "30", "preset": "8"}
        stream = container.add_stream("libsvtav1", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        with usual_priority():
            stream.codec_context.open()
        for t in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(0, t, size), format="rgb24")))
        container.mux(stream.encode())


def main():
    cv2.setNumThreads(1)
    order = np.random.default_rng(0).integers(0, FRAMES, READS).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        for size in (SMALL, RAW):
            for frames_per_key in (1, 2, 10, 30, 120):
                path = Path(scratch) / f"{size[0]}_{frames_per_key}.mp4"
                encode(path, size, frames_per_key)
                reader = VideoReader(str(path))
                one = milliseconds(lambda t, reader=reader: reader.frame(t / FPS), order)
                in_turn = milliseconds(lambda t, reader=reader: reader.frame(t / FPS), range(FRAMES))
                kilobytes = path.stat().st_size / FRAMES / 1e3
                print(
                    f"{size[0]}x{size[1]}, a key frame every {frames_per_key:3d}: {one:5.2f} ms a random frame, "
                    f"{in_turn:4.2f} in turn, {kilobytes:4.1f} kB"
                )
            quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
            jpegs = [cv2.imencode(".jpg", scene(0, t, size), quality)[1] for t in range(FRAMES)]
            one = milliseconds(lambda t, jpegs=jpegs: cv2.imdecode(jpegs[t], cv2.IMREAD_COLOR), order)
            print(f"{size[0]}x{size[1]}, JPEG: {one:5.2f} ms, {np.mean([len(j) for j in jpegs]) / 1e3:4.1f} kB")


if __name__ == "__main__":
    main()
