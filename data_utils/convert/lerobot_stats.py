"""Statistics as LeRobot keeps them, per episode and for the dataset.

They differ from lerobot 0.4.4's in what it approximates: quantiles are values that occur, not edges of a histogram,
and the standard deviation of images is right (there, squares of 8-bit values overflow).
"""

from collections.abc import Iterable, Iterator

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def number_stats(values: np.ndarray) -> dict[str, list]:
    """Of (N, D) or (N,) numbers: lists of D."""
    rows = values.reshape(len(values), -1)
    exact = rows.astype(np.float64)
    quantiles = np.quantile(exact, list(QUANTILES.values()), axis=0, method="inverted_cdf")
    return {
        "min": rows.min(axis=0).tolist(),
        "max": rows.max(axis=0).tolist(),
        "mean": exact.mean(axis=0).tolist(),
        "std": exact.std(axis=0).tolist(),
        "count": [len(rows)],
        **dict(zip(QUANTILES, quantiles.tolist())),
    }


class ImageStats:
    """Statistics of some of an episode's frames, at lower resolution. 8-bit values need no more than counting."""

    def __init__(self, length: int):
        self.sampled = set(np.linspace(0, length - 1, sample_count(length)).round().astype(int).tolist())
        self.counts = np.zeros((3, 256), np.int64)

    def watch(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Passes frames (H, W, 3) uint8 on, and counts those of the sample."""
        for t, frame in enumerate(frames):
            if t in self.sampled:
                for counts, channel in zip(self.counts, np.moveaxis(smaller(frame), 2, 0)):
                    counts += np.bincount(channel.reshape(-1), minlength=256)
            yield frame

    def result(self) -> dict[str, list]:
        """Values in 0 .. 1, nested lists (3, 1, 1); `count` is the number of frames looked at."""
        values = np.arange(256) / 255
        total = self.counts.sum(axis=1, keepdims=True)  # (3, 1)
        mean = self.counts @ values / total[:, 0]
        variance = (self.counts * np.square(values - mean[:, None])).sum(axis=1) / total[:, 0]
        share = self.counts.cumsum(axis=1)
        stats = {
            "min": values[(share > 0).argmax(axis=1)],
            "max": values[(share == total).argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(variance),
        }
        quantiles = {name: values[(share >= q * total).argmax(axis=1)] for name, q in QUANTILES.items()}
        as_lists = {name: row.reshape(3, 1, 1).tolist() for name, row in (stats | quantiles).items()}
        return (
            {name: as_lists[name] for name in stats}
            | {"count": [len(self.sampled)]}
            | {name: as_lists[name] for name in quantiles}
        )


def sample_count(length: int) -> int:
    """How many of an episode's frames LeRobot looks at."""
    return max(min(length, 100), min(int(length**0.75), 10_000))


def smaller(frame: np.ndarray) -> np.ndarray:
    """Every n-th pixel, so that the longer side of a large image comes down to about 150."""
    longer = max(frame.shape[:2])
    step = longer // 150 if longer >= 300 else 1
    return frame[::step, ::step]


def joined_stats(parts: list[dict[str, list]]) -> dict[str, list]:
    """One feature's statistics over several episodes. Quantiles become means weighted by `count`, as in LeRobot."""
    count = np.array([part["count"][0] for part in parts], np.float64)
    arrays = {name: np.array([part[name] for part in parts]) for name in parts[0] if name != "count"}

    def mean_of(values: np.ndarray) -> np.ndarray:
        return np.tensordot(count / count.sum(), values, axes=1)

    mean = mean_of(arrays["mean"])
    variance = mean_of(np.square(arrays["std"]) + np.square(arrays["mean"] - mean))
    return {
        "min": arrays["min"].min(axis=0).tolist(),
        "max": arrays["max"].max(axis=0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(count.sum())],
        **{name: mean_of(arrays[name]).tolist() for name in QUANTILES},
    }
