"""A policy drives simulated robots: rollouts, and what they say about it.

Every simulated robot is a process; those that have executed what they were given are looked at, and the policy is
asked for all of them at once. Robots wait for each other, so that the same seeds give the same results.
"""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aloha_scripts.scripted_policy import instruction
from aloha_scripts.simulation import MAX_REWARD
from data_utils import UserError
from evaluate.execution import ActionQueue, DeltaIntegrator
from evaluate.simulated_robot import REWARDS, Progress, Simulation, serve_robot

Z_95 = 1.959964  # standard deviations that hold the middle 95 % of a normal distribution


@dataclass(frozen=True)
class Settings:
    """How the rollouts 0 .. num_rollouts - 1 are made.

    seed: rollout i starts where seed + i places the objects, and noise_seed and i give its diffusion noise: neither
    depends on num_envs, the number of robots at work at once.
    query_frequency, ensemble, decay, smoothing, blend: see `ActionQueue`.
    reasoning_every: write the reasoning at every n-th query only and reuse it in between; no_reasoning: never.
    """

    num_rollouts: int = 50
    seed: int = 1000
    noise_seed: int = 0
    num_envs: int = 1
    query_frequency: int | None = None
    ensemble: bool = False
    decay: float = 0.01
    smoothing: float = 0.0
    blend: int = 0
    reasoning_every: int = 1
    no_reasoning: bool = False
    max_new_tokens: int = 256
    unnorm_key: str | None = None

    def queue(self) -> ActionQueue:
        """An empty one. Raises ValueError, beginning with the name of a setting."""
        return ActionQueue(
            self.query_frequency,
            ensemble=self.ensemble,
            decay=self.decay,
            smoothing=self.smoothing,
            blend=self.blend,
        )


class RobotProcess:
    """A simulated robot that works while this process does something else: `send` a command, `receive` what came of it.

    Raises:
        UserError: naming the rollout, when the process died or cannot render.
    """

    def __init__(self, simulation: Simulation):
        context = multiprocessing.get_context("spawn")  # a renderer does not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve_robot, args=(theirs, simulation), daemon=True)
        self.process.start()
        theirs.close()  # the other process has its own: if it dies, receive says so instead of waiting
        self.rollout = ""

    def send(self, *command):
        try:
            self.connection.send(command)
        except OSError:
            raise self._died() from None

    def receive(self) -> Progress:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, str):
            raise UserError(f"{self.rollout}: {answer}")
        return answer

    def close(self):
        self.connection.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.terminate()

    def _died(self) -> UserError:
        self.process.join(timeout=5)
        return UserError(
            f"{self.rollout}: expected its simulator process to run, found that it ended with exit code "
            f"{self.process.exitcode} (-9: killed, often for want of memory; a smaller --num_envs needs less)"
        )


@dataclass
class Rollout:
    """One that is under way."""

    index: int
    seed: int
    instruction: str
    robot: RobotProcess
    queue: ActionQueue
    video: str | None
    progress: Progress | None = None
    integrate: DeltaIntegrator | None = None
    queries: int = 0
    reasoning: str = ""
    reasonings: list[dict] = field(default_factory=list)

    def next_actions(self) -> np.ndarray:
        """(n, A) what to execute before the next query."""
        actions = []
        while not self.queue.needs_chunk():
            action = self.queue.pop()
            actions.append(self.integrate(action) if self.integrate else action)
        return np.stack(actions)

    def note(self, reasoning: str):
        if reasoning != self.reasoning or not self.reasonings:
            self.reasonings.append({"step": self.progress.step, "text": reasoning})
        self.reasoning = reasoning

    def result(self) -> dict:
        progress = self.progress
        return {
            "rollout": self.index,
            "seed": self.seed,
            "success": progress.steps_to_success is not None,
            "highest_reward": progress.highest_reward,
            "steps": progress.step,
            "steps_to_success": progress.steps_to_success,
            "ended": progress.ended,
            "final_qpos": [round(float(value), 4) for value in progress.qpos],
            "queries": self.queries,
            "instruction": self.instruction,
            "reasonings": self.reasonings,
            "video": self.video,
        }


class ClosedLoop:
    """Rollouts of a policy.

    Args:
        policy: a `Qwen2VLAPolicy`, or anything with its `predict`, `chunk_size`, `action_dim` and `delta_control`.
        output: folder for the videos, in its `videos/`; None makes none.
        report: called with the result of each rollout as it ends.
    """

    def __init__(
        self,
        policy,
        simulation: Simulation,
        settings: Settings,
        output: str | Path | None = None,
        report: Callable[[dict], None] = lambda result: None,
    ):
        self.policy, self.simulation, self.settings, self.report = policy, simulation, settings, report
        self.output = Path(output) if output else None
        self.latencies: list[float] = []  # s of every call of the policy
        self.batches: list[int] = []  # observations in it
        self.results: list[dict] = []

    def run(self) -> list[dict]:
        """Makes all rollouts; their results in order.

        Raises:
            UserError: naming the rollout whose simulator failed.
        """
        if self.output:
            (self.output / "videos").mkdir(parents=True, exist_ok=True)
        waiting = iter(range(self.settings.num_rollouts))
        robots = [RobotProcess(self.simulation) for _ in range(min(self.settings.num_envs, self.settings.num_rollouts))]
        try:
            under_way = self._begin(robots, waiting)
            while under_way:
                self._query(under_way)
                for rollout in under_way:
                    rollout.robot.send("advance", rollout.next_actions(), rollout.reasoning)
                for rollout in under_way:
                    rollout.progress = rollout.robot.receive()
                ended = [rollout for rollout in under_way if rollout.progress.ended]
                for rollout in ended:
                    self.results.append(rollout.result())
                    self.report(self.results[-1])
                under_way = [rollout for rollout in under_way if not rollout.progress.ended]
                under_way += self._begin([rollout.robot for rollout in ended], waiting)
        finally:
            for robot in robots:
                robot.close()
        self.results.sort(key=lambda result: result["rollout"])
        return self.results

    def _begin(self, robots: list[RobotProcess], waiting) -> list[Rollout]:
        """The next rollouts, one for each robot while there are any."""
        begun = []
        for robot, index in zip(robots, waiting):
            seed = self.settings.seed + index
            video = f"videos/seed_{seed}.mp4" if self.output else None
            robot.rollout = f"rollout {index} (seed {seed})"
            robot.send("start", seed, str(self.output / video) if video else None)
            text = instruction(self.simulation.task_name, seed)
            begun.append(Rollout(index, seed, text, robot, self.settings.queue(), video))
        for rollout in begun:
            rollout.progress = rollout.robot.receive()
            if self.policy.delta_control:
                rollout.integrate = DeltaIntegrator(rollout.progress.qpos)
        return begun

    def _query(self, rollouts: list[Rollout]):
        """Asks the policy for all of them; each gets its chunk and its reasoning."""
        settings = self.settings
        shape = self.policy.chunk_size, self.policy.action_dim
        generators = [np.random.default_rng([settings.noise_seed, run.index, run.queries]) for run in rollouts]
        noise = np.stack([generator.standard_normal(shape, np.float32) for generator in generators])  # (B, T, A)
        began = time.perf_counter()
        chunks, texts = self.policy.predict(
            [rollout.progress.observation for rollout in rollouts],
            [rollout.instruction for rollout in rollouts],
            settings.max_new_tokens,
            unnorm_key=settings.unnorm_key,
            reasoning=[self._given_reasoning(rollout) for rollout in rollouts],
            noise=noise,
        )
        self.latencies.append(time.perf_counter() - began)
        self.batches.append(len(rollouts))
        for rollout, chunk, text in zip(rollouts, chunks, texts):
            rollout.queue.push(chunk)
            rollout.note(text)
            rollout.queries += 1

    def _given_reasoning(self, rollout: Rollout) -> str | None:
        """What the policy is to take as its reasoning; None lets it write one."""
        if self.settings.no_reasoning:
            return ""
        return rollout.reasoning if rollout.queries % self.settings.reasoning_every else None

    def latency(self) -> dict:
        """Of the policy's calls so far: median and 99th percentile in ms, calls, observations per call."""
        p50, p99 = np.percentile(self.latencies, [50, 99]) * 1000
        return {
            "p50_ms": round(p50, 2),
            "p99_ms": round(p99, 2),
            "calls": len(self.latencies),
            "mean_batch": round(float(np.mean(self.batches)), 2),
        }


def confidence_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate, for any number of trials > 0."""
    rate, z2 = successes / trials, Z_95**2
    middle = rate + z2 / (2 * trials)
    half = Z_95 * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def summarize(task_name: str, results: list[dict]) -> dict:
    """Success rate with its interval, the share of rollouts that reached each reward, mean steps to success."""
    steps = [result["steps_to_success"] for result in results if result["success"]]
    interval = confidence_interval(len(steps), len(results))
    return {
        "rollouts": len(results),
        "successes": len(steps),
        "success_rate": len(steps) / len(results),
        "confidence_interval_95": [round(bound, 4) for bound in interval],
        "mean_steps_to_success": float(np.mean(steps)) if steps else None,
        "reached": [
            {
                "reward": reward,
                "meaning": REWARDS[task_name][reward - 1],
                "share": sum(result["highest_reward"] >= reward for result in results) / len(results),
            }
            for reward in range(1, MAX_REWARD + 1)
        ],
    }


def write_results(path: Path, settings: dict, summary: dict, rollouts: list[dict]):
    """Writes them as JSON; the file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, "summary": summary, "rollouts": rollouts}, indent=2, ensure_ascii=False)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)
