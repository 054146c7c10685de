"""Executing action chunks: when to ask for the next one, and what to make of chunks that overlap.

    queue = ActionQueue(query_frequency=8)
    while running:
        if queue.needs_chunk():
            queue.push(policy.predict(observe(), instruction)[0])
        robot.execute(queue.pop())

Pure numpy, so that a robot's computer can use it without PyTorch.
"""

import numpy as np


class ActionQueue:
    """Action chunks (T, A) in, one action (A,) per control step out.

    A pushed chunk takes over at the next `pop`, whether or not the running one was used up.

    Args:
        query_frequency: a new chunk every so many steps, 1 .. T. Default: T, the whole chunk; with `ensemble`, 1.
        ensemble: execute the mean of all chunks' predictions for the present step, weighted exp(-decay * i) with i = 0
            for the oldest, as ACT does (Zhao et al., 2023).
        decay: >= 0, see there. ACT's is 0.01; larger trusts older predictions more.
        smoothing: s in [0, 1): s of the last executed action is kept, executed = s * last + (1 - s) * action.
        blend: over so many steps a new chunk fades in linearly, against what was left of the running one.

    Raises:
        ValueError: beginning with the argument's name.
    """

    def __init__(
        self,
        query_frequency: int | None = None,
        *,
        ensemble: bool = False,
        decay: float = 0.01,
        smoothing: float = 0.0,
        blend: int = 0,
    ):
        if query_frequency is not None and query_frequency < 1:
            raise ValueError(f"query_frequency: expected at least 1, found {query_frequency}")
        if not decay >= 0:
            raise ValueError(f"decay: expected a number >= 0, found {decay}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: expected a number in [0, 1), found {smoothing}")
        if blend < 0 or (blend and ensemble):
            raise ValueError(f"blend: expected a number of steps >= 0, and 0 with ensemble, found {blend}")
        self.query_frequency = 1 if ensemble and query_frequency is None else query_frequency
        self.ensemble = ensemble
        self.decay = decay
        self.smoothing = smoothing
        self.blend = blend
        self.reset()

    def reset(self):
        """Forgets everything: a new rollout begins."""
        self._step = 0  # of the next pop
        self._chunks: list[tuple[int, np.ndarray]] = []  # (step of row 0, chunk (T, A)), oldest first
        self._last: np.ndarray | None = None  # (A,) executed

    def needs_chunk(self) -> bool:
        """Whether `query_frequency` steps have passed since row 0 of the newest chunk, or none is left of it."""
        if not self._chunks:
            return True
        start, chunk = self._chunks[-1]
        return self._step - start >= (self.query_frequency or len(chunk))

    def push(self, chunk: np.ndarray, late: int = 0):
        """Takes a chunk (T, A) over.

        Row 0 belongs to the step at which the observation was made. That is the next `pop`, unless `late` actions were
        popped between observing and pushing, as with a policy that computes while the robot moves: then the first
        `late` rows are past.

        Raises:
            ValueError: for a chunk of another shape, shorter than query_frequency, or that is past altogether.
        """
        chunk = np.asarray(chunk)
        dims = self._chunks[-1][1].shape[1:] if self._chunks else chunk.shape[1:]
        if chunk.ndim != 2 or chunk.shape[1:] != dims:
            raise ValueError(f"chunk: expected the shape (T, {dims[0] if dims else 'A'}), found {chunk.shape}")
        if len(chunk) < (self.query_frequency or 1):
            raise ValueError(
                f"query_frequency: expected at most the chunk's {len(chunk)} actions, found {self.query_frequency}"
            )
        if not 0 <= late < len(chunk):
            raise ValueError(f"late: expected 0 .. {len(chunk) - 1} of the chunk's steps to be past, found {late}")
        start = self._step - late
        if self.ensemble:
            self._chunks.append((start, chunk))
            return
        running = self.remaining()  # (n, A)
        steps = min(self.blend, len(running), len(chunk) - late)
        if steps:
            share = (np.arange(1, steps + 1) / (steps + 1))[:, None]  # (steps, 1) of the new chunk
            chunk = chunk.copy()
            chunk[late : late + steps] = (1 - share) * running[:steps] + share * chunk[late : late + steps]
        self._chunks = [(start, chunk)]

    def pop(self) -> np.ndarray:
        """The action (A,) of the present step.

        After `query_frequency` steps the running chunk goes on until a new one comes.

        Raises:
            IndexError: when nothing was predicted for this step.
        """
        current = [(start, chunk) for start, chunk in self._chunks if self._step - start < len(chunk)]
        if not current:
            raise IndexError("expected a chunk to be pushed before this pop, found no prediction for this step")
        self._chunks = current
        predictions = np.stack([chunk[self._step - start] for start, chunk in current])  # (n, A)
        weights = np.exp(-self.decay * np.arange(len(predictions)))  # (n,)
        action = np.average(predictions, axis=0, weights=weights)  # (A,)
        if self._last is not None:
            action = self.smoothing * self._last + (1 - self.smoothing) * action
        self._last = action
        self._step += 1
        return action

    def remaining(self) -> np.ndarray:
        """(n, A) what is left of the newest chunk, faded in if `blend`; (0, 0) before the first."""
        if not self._chunks:
            return np.empty((0, 0), np.float32)
        start, chunk = self._chunks[-1]
        return chunk[self._step - start :]


class DeltaIntegrator:
    """Differences to commands, for policies trained with `--delta_control True`.

    Training's difference is the next command minus the present one, so they add up from command to command. The
    measured qpos is the start only: added to it each time, the arms would sink, since they stay behind their commands.

    Args:
        start: (A,) the command that holds the robot where it is: its qpos.
    """

    def __init__(self, start: np.ndarray):
        self.command = np.asarray(start, dtype=np.float64)  # (A,)

    def __call__(self, difference: np.ndarray) -> np.ndarray:
        """(A,) difference -> (A,) the next command."""
        self.command = self.command + difference
        return self.command
