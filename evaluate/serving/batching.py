"""The queue in front of the model: first come, first served, and those who wait together are answered together."""

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from data_utils import UserError
from evaluate.wire import RequestError
from qwen2_vla import Qwen2VLAPolicy

from .queries import Query

logger = logging.getLogger("evaluate.serve")


@dataclass
class Answer:
    """`actions` (T, A) float32 in robot units, the reasoning, and how long the query waited and computed, in s."""

    actions: np.ndarray
    reasoning: str
    waited: float
    computed: float
    batch_size: int


@dataclass(eq=False)
class _Job:
    query: Query
    future: asyncio.Future
    arrived: float


class Batcher:
    """Owns the model's thread. Nothing waits for a batch to fill: whatever waits when the model is free is taken.

    Args:
        max_batch: queries answered at once. max_waiting: queries that may wait; more are refused.
        max_new_tokens: limit of the generated reasoning.
    """

    def __init__(self, policy: Qwen2VLAPolicy, *, max_batch: int = 8, max_waiting: int = 64, max_new_tokens: int = 256):
        self.policy = policy
        self.max_waiting, self.max_new_tokens = max_waiting, max_new_tokens
        # Few sizes, since a GPU's work is recorded once for each: 1, 2, 4, …, and the largest
        self.batch_sizes = sorted({max_batch} | {2**i for i in range(max_batch.bit_length())}, reverse=True)
        self.answered = 0
        self._waiting: deque[_Job] = deque()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "policy")
        self._closed = False

    async def predict(self, query: Query, timeout: float) -> Answer:
        """Queues a query. Whoever stops waiting (a client that has gone) takes it out of the queue.

        Raises:
            RequestError: 400 when the policy refuses the query, 500 when it fails, 503 when the queue is full or
                closed, 504 after `timeout` seconds.
        """
        if self._closed:
            raise RequestError(503, "the server is shutting down")
        if len(self._waiting) >= self.max_waiting:
            raise RequestError(503, f"{len(self._waiting)} queries are waiting already; try again later")
        job = _Job(query, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._waiting.append(job)
        self._arrival.set()
        try:
            async with asyncio.timeout(timeout):
                return await job.future
        except TimeoutError:
            raise RequestError(504, f"no answer within {timeout:g} s (--timeout)") from None
        finally:
            if job in self._waiting:
                self._waiting.remove(job)

    async def run(self):
        """Answers queries until cancelled."""
        while True:
            await self._arrival.wait()
            if not self._waiting:
                self._arrival.clear()
                continue
            size = next(size for size in self.batch_sizes if size <= len(self._waiting))
            jobs = [self._waiting.popleft() for _ in range(size)]
            started = time.perf_counter()
            results = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._answer, [job.query for job in jobs]
            )
            for job, result in zip(jobs, results, strict=True):
                if job.future.done():  # nobody waits for it any more
                    continue
                if isinstance(result, RequestError):
                    job.future.set_exception(result)
                else:
                    result.waited = started - job.arrived
                    job.future.set_result(result)
                    self.answered += 1

    async def warm_up(self, query: Query):
        """Predicts on the model's thread, so that it compiles and allocates before a robot waits for it.

        Raises:
            RequestError: when it fails.
        """
        first = await self._warm_up([query])
        if self.policy.model.device.type == "cpu":
            return  # which records nothing
        for size in self.batch_sizes:
            for prefix in (None, first.actions):
                await self._warm_up([replace(query, prefix=prefix)] * size)

    async def _warm_up(self, queries: list[Query]) -> Answer:
        result, *_ = await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, queries)
        if isinstance(result, RequestError):
            raise result
        return result

    def close(self):
        """Refuses further queries; those that wait are still answered."""
        self._closed = True

    def _answer(self, queries: list[Query]) -> list[Answer | RequestError]:
        """On the model's thread. A batch that fails is tried again one by one, so only the guilty query fails."""
        began = time.perf_counter()
        try:
            actions, texts = self.policy.predict(
                [query.observation for query in queries],
                [query.instruction for query in queries],
                self.max_new_tokens,
                unnorm_key=[query.unnorm_key for query in queries],
                reasoning=[query.reasoning for query in queries],
                prefix=[query.prefix for query in queries],
                frozen=[query.frozen for query in queries],
            )  # (B, T, A)
            if not np.isfinite(actions).all():
                raise ArithmeticError("the policy's actions are not finite; the checkpoint's weights may be broken")
        except Exception as error:  # whatever it is, the server goes on
            if len(queries) > 1:
                logger.warning("a batch of %d failed (%s); trying one by one", len(queries), type(error).__name__)
                return [answer for query in queries for answer in self._answer([query])]
            if isinstance(error, UserError):
                return [RequestError(400, str(error).removeprefix("observation: "))]
            logger.exception("the policy failed")
            return [RequestError(500, f"the policy failed ({type(error).__name__}); the server's log says where")]
        computed = time.perf_counter() - began
        return [Answer(chunk, text, 0.0, computed, len(queries)) for chunk, text in zip(actions, texts, strict=True)]
