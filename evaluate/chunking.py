"""Where a robot gets its next action from, when a policy elsewhere predicts chunks of them. Imports no torch."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from evaluate.execution import ActionQueue
from evaluate.wire import PolicyError

TRY_AGAIN = (503, 504)  # the server is busy: no reason for a robot to stop
REMEMBERED_ANSWERS = 10

logger = logging.getLogger("evaluate.client")


class Chunks:
    """The plain way: the robot waits while the policy computes the next chunk.

    Args:
        infer: observation -> reply, such as `PolicyClient.infer`. query_frequency: steps between queries, 1 .. T.
    """

    def __init__(self, infer: Callable[[dict], dict], query_frequency: int):
        self.infer, self.queue = infer, ActionQueue(query_frequency)
        self.latencies: list[float] = []  # s of every answer

    def next_action(self, observe: Callable[[], dict]) -> np.ndarray:
        """The action (A,) of this control step. `observe` is called when the policy is to be asked."""
        if self.queue.needs_chunk():
            observation, began = observe(), time.perf_counter()
            chunk = self.infer(observation)["actions"]  # (T, A)
            self.latencies.append(time.perf_counter() - began)
            self.queue.push(chunk)
        return self.queue.pop()

    def close(self):
        """Nothing is under way."""


class AsyncChunks:
    """Real-time chunking: the next chunk is computed while the robot executes the running one (Black et al., 2025).

    A query sends what is left of the running chunk as `prefix`, and as `frozen` the steps that will have passed when
    the answer comes: as many as with the slowest of the last answers. The new chunk begins with just these actions, so
    going over to it makes no jump. An answer that comes later is taken up where the robot is by then; where the running
    chunk ends before, the robot holds its last command.

    Args:
        infer: observation -> reply, such as `PolicyClient.infer`; called from a thread of its own.
        query_frequency: steps between queries, 1 .. T. To stay moving, T >= query_frequency + steps of an answer.
        dt: s between control steps.
        delta_control: actions are differences, so holding is zeros.

    Attributes:
        latencies: s of every answer. late: answers that came after their frozen steps, or not at all. held: steps
        without an action to execute.
    """

    def __init__(self, infer: Callable[[dict], dict], query_frequency: int, dt: float, delta_control: bool = False):
        if not dt > 0:
            raise ValueError(f"dt: expected more than 0 s, found {dt}")
        self.infer, self.dt, self.delta_control = infer, dt, delta_control
        self.queue = ActionQueue(query_frequency)
        self.latencies: list[float] = []
        self.late = self.held = 0
        self._delays: deque[int] = deque(maxlen=REMEMBERED_ANSWERS)  # steps that passed until an answer was taken up
        self._thread = ThreadPoolExecutor(1, "chunks")
        self._answer: Future | None = None  # of the query under way
        self._passed, self._frozen = 0, 0  # steps since that query, and those expected
        self._last: np.ndarray | None = None  # (A,)

    def next_action(self, observe: Callable[[], dict]) -> np.ndarray:
        """The action (A,) of this control step; to be called every `dt` seconds. Waits for the first chunk only.

        Args:
            observe: called when the policy is to be asked, and not otherwise.

        Raises:
            PolicyError: when the server refuses or has gone. That it is busy (503, 504) counts as a late answer.
        """
        if self._answer is not None and self._answer.done():
            self._take_over()
        if self._answer is None and self.queue.needs_chunk():
            self._ask(observe())
            if self._last is None:
                self._answer.exception()  # waits; the robot has not begun to move
                self._take_over()
                self._delays.append(math.ceil(self.latencies[-1] / self.dt) + 1)  # a guess, with a step to spare
        self._passed += 1
        if len(self.queue.remaining()):
            self._last = self.queue.pop()
            return self._last
        if self._last is None:
            raise PolicyError("the server is too busy to answer the first query", 503)
        self.held += 1
        return np.zeros_like(self._last) if self.delta_control else self._last

    def close(self):
        """Waits for the query under way."""
        self._thread.shutdown()

    def _ask(self, observation: dict):
        prefix = self.queue.remaining()  # (n, A)
        self._passed, self._frozen = 0, min(max(self._delays, default=0), len(prefix))
        if len(prefix):
            observation = observation | {"prefix": prefix.astype(np.float32), "frozen": self._frozen}
        self._answer = self._thread.submit(self._timed, observation)

    def _timed(self, observation: dict) -> np.ndarray | None:
        """(T, A), or None when the server is busy."""
        began = time.perf_counter()
        try:
            return self.infer(observation)["actions"]
        except PolicyError as error:
            if error.status not in TRY_AGAIN:
                raise
            logger.warning("%s", error)
            return None
        finally:
            self.latencies.append(time.perf_counter() - began)

    def _take_over(self):
        chunk, self._answer = self._answer.result(), None
        self.late += chunk is None or self._passed > self._frozen
        if self._passed:
            self._delays.append(self._passed)
        if chunk is not None and self._passed < len(chunk):
            self.queue.push(chunk, late=self._passed)
