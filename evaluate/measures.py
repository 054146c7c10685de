"""What a policy's answers to recorded episodes measure up to."""

from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from aloha_scripts.constants import JOINT_NAMES
from data_utils import normalize_action

STILL = 0.1  # of the median joint's range: joints that move less in the recording are shown, but not judged
LEAST_STEP = 0.005  # of a joint's range; a joint that mostly rests has smaller steps, which nothing can be held against
LEAST_JERK = 0.002  # of a joint's range; planned trajectories have next to none
LIMIT = 0.999  # of -1 .. 1: clip_sample cuts off what is beyond 1
FAR = 0.1  # of the range: recorded values that far from the limit are no excuse for being there


@dataclass
class Replay:
    """An episode of N frames, and the answers of a policy to Q of them, `every` frames apart: chunks of T actions.

    recorded: (N, A) robot units, differences with delta_control. starts: (Q,) rows of it that the chunks begin at.
    chunks: (Q, T, A). hold: (Q, A) the action that would have kept the robot where it is. reasonings: of each query the
    recorded one (None without such labels) and the written one.
    """

    path: str
    every: int
    recorded: np.ndarray
    starts: np.ndarray
    chunks: np.ndarray
    hold: np.ndarray
    reasonings: list[tuple[str | None, str]]

    def __post_init__(self):
        self.chunks = np.where(np.isfinite(self.chunks), self.chunks, np.nan)  # infinity has no mean either

    def targets(self) -> tuple[np.ndarray, np.ndarray]:
        """(Q, T, A) the recorded actions that the chunks should be, and (Q, T) whether there is such a row."""
        rows = self.starts[:, None] + np.arange(self.chunks.shape[1])  # (Q, T)
        return self.recorded[np.minimum(rows, len(self.recorded) - 1)], rows < len(self.recorded)

    def executed(self) -> np.ndarray:
        """(N, A) what a robot would have been told, one chunk after the other."""
        return np.concatenate(self.chunks[:, : self.every])[: len(self.recorded)]

    def predicted(self) -> np.ndarray:
        """(N, A) the same beside the recorded rows that it should be; NaN where nothing was predicted."""
        rows = np.full_like(self.recorded, np.nan)
        for start, chunk in zip(self.starts, self.chunks[:, : self.every]):
            rows[start : start + self.every] = chunk[: len(rows) - start]
        return rows


@dataclass
class Measures:
    """Of all replays together. Arrays (A,) are per joint, in robot units unless a share or a ratio.

    queries: how many. finite: share of the predicted numbers.
    error, error_95, first_error: mean absolute error of whole chunks, 95th percentile, mean of first actions.
    holding, constant: mean errors of two baselines, holding still and the best constant action.
    span: of the recorded values, infinite for none. moving: whether that is enough to be judged.
    jump: 99th percentile of the jumps between chunks, over that of the recorded steps; None with single chunks.
    jerk: over the recorded; None for a few frames. movement: standard deviation, over the recorded.
    limit: share of values at the statistics' limits; stuck: of those that the recorded value is far from.
    by_step, holding_by_step: (T,) mean error by step of the chunk, as a share of `span`.
    followed: share of the recorded movement that is predicted.
    exact, similarity: of the reasonings, None without; mistakes: (recorded, written) -> how often.
    """

    joints: list[str]
    queries: int
    finite: float
    error: np.ndarray
    error_95: np.ndarray
    first_error: np.ndarray
    holding: np.ndarray
    constant: np.ndarray
    span: np.ndarray
    moving: np.ndarray
    jump: np.ndarray | None
    jerk: np.ndarray | None
    limit: np.ndarray
    stuck: np.ndarray
    movement: np.ndarray
    by_step: np.ndarray
    holding_by_step: np.ndarray
    followed: float
    exact: float | None
    similarity: float | None
    mistakes: Counter

    def share(self, error: np.ndarray) -> float:
        """Errors (A,) as a mean share of the ranges of the joints that move."""
        return float((error / self.span)[self.moving].mean())


def joint_names(dims: int) -> list[str]:
    """Of an action: ALOHA's for 14 dimensions, otherwise numbers."""
    if dims != 14:
        return [f"action {i}" for i in range(dims)]
    return [f"{side} {joint}" for side in ("left", "right") for joint in [*JOINT_NAMES, "gripper"]]


def measure(replays: list[Replay], stats: dict[str, np.ndarray]) -> Measures:
    """Measures replays of the same policy; `stats` are those that its actions are normalised with.

    Predicted numbers that are not finite make what depends on them NaN.

    Raises:
        ValueError: when no joint moves in the recordings.
    """
    chunks = np.concatenate([replay.chunks for replay in replays]).astype(np.float64)  # (Q, T, A)
    finite = np.isfinite(chunks)
    targets, inside = map(np.concatenate, zip(*(replay.targets() for replay in replays)))  # (Q, T, A), (Q, T)
    hold = np.concatenate([replay.hold for replay in replays])[:, None]  # (Q, 1, A)

    recorded = np.concatenate([replay.recorded for replay in replays])  # (frames, A)
    span = recorded.max(axis=0) - recorded.min(axis=0)
    if not span.any():
        raise ValueError("expected recorded actions that move, found constant ones")
    moving = span > STILL * np.median(span[span > 0])
    span = np.where(span > 0, span, np.inf)

    errors, holding = np.abs(chunks - targets), np.abs(hold - targets)  # (Q, T, A)
    center = targets[inside].mean(axis=0)
    predicted_way, way = (np.where(inside[..., None], a - hold, 0).sum(axis=1) / span for a in (chunks, targets))
    predicted_way, way = predicted_way[:, moving], way[:, moving]  # (Q, moving joints)

    scaled, scaled_targets = (normalize_action(actions[inside], stats) for actions in (chunks, targets))  # (n, A)
    at_limit = np.abs(scaled) >= LIMIT
    stuck = at_limit & (np.abs(scaled - scaled_targets) > 2 * FAR)

    def by_step(error: np.ndarray) -> np.ndarray:
        shares = (error / span)[..., moving].mean(axis=-1)  # (Q, T)
        return np.array([shares[inside[:, j], j].mean() for j in range(shares.shape[1]) if inside[:, j].any()])

    # Both are None without replays that are long enough
    every = replays[0].every
    jumps = [np.abs(replay.chunks[1:, 0] - replay.chunks[:-1, every - 1]) for replay in replays]
    jump = _percentile_99(jumps), _percentile_99([np.abs(np.diff(replay.recorded, axis=0)) for replay in replays])
    jerks = (_mean_jerk([r.executed() for r in replays]), _mean_jerk([r.recorded for r in replays]))
    texts = [pair for replay in replays for pair in replay.reasonings if pair[0] is not None]
    return Measures(
        joints=joint_names(chunks.shape[2]),
        queries=len(chunks),
        finite=float(finite[inside].mean()),
        error=errors[inside].mean(axis=0),
        error_95=np.percentile(errors[inside], 95, axis=0),
        first_error=errors[:, 0].mean(axis=0),
        holding=holding[inside].mean(axis=0),
        constant=np.abs(center - targets)[inside].mean(axis=0),
        span=span,
        moving=moving,
        jump=None if jump[0] is None else jump[0] / np.maximum(jump[1], LEAST_STEP * span),
        jerk=None if jerks[0] is None else jerks[0] / np.maximum(jerks[1], LEAST_JERK * span),
        limit=at_limit.mean(axis=0),
        stuck=stuck.mean(axis=0),
        movement=chunks[inside].std(axis=0) / np.maximum(targets[inside].std(axis=0), 1e-6),
        by_step=by_step(errors),
        holding_by_step=by_step(holding),
        followed=float((predicted_way * way).sum() / max(np.square(way).sum(), 1e-12)),
        exact=float(np.mean([want == got for want, got in texts])) if texts else None,
        similarity=float(np.mean([SequenceMatcher(None, *pair).ratio() for pair in texts])) if texts else None,
        mistakes=Counter(pair for pair in texts if pair[0] != pair[1]),
    )


def _percentile_99(steps: list[np.ndarray]) -> np.ndarray | None:
    """Over the rows of (n, A) arrays."""
    rows = np.concatenate(steps)
    return np.percentile(rows, 99, axis=0) if len(rows) else None


def _mean_jerk(actions: list[np.ndarray]) -> np.ndarray | None:
    """(A,) mean absolute third difference, per frame cubed."""
    rows = np.concatenate([np.abs(np.diff(a, n=3, axis=0)) for a in actions])
    return rows.mean(axis=0) if len(rows) else None
