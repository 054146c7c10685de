"""Few numbers that tell how an episode moves: enough to hold it against its neighbours without reading it again."""

import base64

import numpy as np

# Rows of what `motion_of` returns
LOW, HIGH, MIN_AT, MAX_AT, STEP, MAX_STEP, MAX_STEP_AT = range(7)
SHIFTS = np.arange(-5, 11)  # frames by which the state may follow the action
WORTH_A_LAG = 30  # frames that must be left to compare
EXACT = 1e-6  # of a value: rounding


def motion_of(values: np.ndarray) -> np.ndarray:
    """(N, D) of an episode -> (7, D) float32, per dimension: the lowest and highest value without the 1 % (at least
    one) beyond, the frames of minimum and maximum, the size of a big step between frames (1 % and at least two are
    bigger), that of the biggest, and the frame it leads to.

    The biggest step of a dimension that only switches between two levels, as a gripper does, is given as 0.
    """
    ordered = np.sort(values, axis=0)
    last = len(values) - 1
    beyond = last - int(0.99 * last)
    low, high = ordered[min(beyond, last // 2)], ordered[max(last - beyond, last - last // 2)]
    motion = [low, high, values.argmin(axis=0), values.argmax(axis=0)]
    steps = np.abs(np.diff(values, axis=0))
    if len(steps) < 3:
        return np.array([*motion, *np.zeros((3, values.shape[1]))], np.float32)
    big = np.sort(steps, axis=0)[min(int(0.99 * (len(steps) - 1)), len(steps) - 3)]
    biggest = np.where(_two_levels(values, ordered[0], ordered[-1]), 0, steps.max(axis=0))
    return np.array([*motion, big, biggest, steps.argmax(axis=0) + 1], np.float32)


def _two_levels(values: np.ndarray, lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """(D,) bool: nearly all values are near the lowest or the highest, several near each."""
    near = 0.05 * (highest - lowest)
    at_low, at_high = (values <= lowest + near).sum(axis=0), (values >= highest - near).sum(axis=0)
    return (np.minimum(at_low, at_high) >= 5) & (at_low + at_high >= 0.9 * len(values))


def lag_of(action: np.ndarray, qpos: np.ndarray) -> int | None:
    """By how many frames the state follows the action, action[t] ~ qpos[t + lag]; None when that is not clear.

    Controllers and loads delay some joints more than others, so the least of the clear delays is the recording's own.
    """
    frames = min(len(action), len(qpos))
    if action.shape[1] != qpos.shape[1] or frames < WORTH_A_LAG + SHIFTS[-1] - SHIFTS[0]:
        return None
    action, qpos = action[:frames].astype(np.float64), qpos[:frames].astype(np.float64)
    moving = np.ptp(action, axis=0) > 1e-2
    action, qpos = action[:, moving], qpos[:, moving]
    start, end = -SHIFTS[0], frames - SHIFTS[-1]
    # Variances, so that a constant offset (a load, another zero) does not count; in units of the usual step's
    steps = np.diff(action[start:end], axis=0).var(axis=0) + 1e-12
    errors = np.array([(action[start:end] - qpos[start + k : end + k]).var(axis=0) / steps for k in SHIFTS])  # (K, D)
    best = errors.argmin(axis=0)
    inner = best.clip(1, len(SHIFTS) - 2)
    dims = np.arange(errors.shape[1])
    least, neighbours = errors[best, dims], np.minimum(errors[inner - 1, dims], errors[inner + 1, dims])
    clear = (best == inner) & (least < 0.3) & (least < 0.3 * neighbours)
    return int(SHIFTS[best[clear].min()]) if clear.any() else None


def is_copy(action: np.ndarray, qpos: np.ndarray) -> bool:
    """Whether the actions are the states of the same frames, in an episode that moves."""
    if action.shape != qpos.shape or not np.ptp(action, axis=0).any():
        return False
    return bool((np.abs(action - qpos) <= EXACT * (1 + np.abs(qpos))).all())


def to_text(motion: np.ndarray | None) -> str | None:
    """A (7, D) array as text for JSON: shorter than its numbers and much faster to read."""
    return None if motion is None else base64.b64encode(motion.astype("<f4").tobytes()).decode()


def from_text(text: str | None) -> np.ndarray | None:
    return None if text is None else np.frombuffer(base64.b64decode(text), "<f4").reshape(7, -1)
