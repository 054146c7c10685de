"""A robot in simulation, in a process of its own: it acts, and looks only when the policy is asked or a video is made.

Imports nothing of PyTorch, so that many of these processes start fast and stay small.
"""

import signal
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import Connection

import numpy as np
from dm_control.rl.control import PhysicsError

from aloha_scripts.constants import DT, FPS
from aloha_scripts.scripted_policy import instruction
from aloha_scripts.simulation import MAX_REWARD, AlohaSimulation, RenderingError
from evaluate.video_writer import RolloutVideo

STEPS_AFTER_SUCCESS = 25  # so that the video shows it

# What the rewards 1 .. MAX_REWARD of gym-aloha stand for
REWARDS = {
    "sim_transfer_cube_scripted": (
        "right gripper touches the cube",
        "right gripper has lifted the cube off the table",
        "left gripper touches the cube",
        "left gripper has the cube off the table",
    ),
    "sim_insertion_scripted": (
        "grippers touch the peg and the socket",
        "both are lifted off the table",
        "the peg touches the socket in the air",
        "the peg is in the socket",
    ),
}


@dataclass(frozen=True)
class Simulation:
    """What all rollouts of a run share.

    task_name: one of SIM_TASKS. cameras: the policy's name -> the simulator's. image_size: (width, height) rendered.
    spread: share of the objects' area that starts are drawn from. max_steps: of DT seconds. history: frames per camera
    that the policy takes. video_every: steps between the frames of a video.
    """

    task_name: str
    cameras: dict[str, str]
    image_size: tuple[int, int] = (320, 240)
    spread: float = 1.0
    max_steps: int = 400
    history: int = 1
    video_every: int = 10


@dataclass(frozen=True)
class Progress:
    """Where a rollout stands: steps made, the highest reward so far, the step that first gave MAX_REWARD, and
    how the rollout ended ("success", "time", "physics diverged"; "" while it goes on).

    observation: as `Qwen2VLAPolicy.predict` takes it; None when the rollout has ended. qpos: (14,) now.
    """

    step: int
    highest_reward: int
    steps_to_success: int | None
    ended: str
    qpos: np.ndarray
    observation: dict | None


class SimulatedRobot:
    """Carries rollouts out, one after another."""

    def __init__(self, simulation: Simulation):
        self.simulation = simulation
        self.env = AlohaSimulation(simulation.task_name)
        self.views: deque[dict[str, np.ndarray]] = deque(maxlen=simulation.history)  # the last frames, newest last

    def start(self, seed: int, video: str | None = None) -> Progress:
        """Begins the rollout of a seed; `video` is the path of the mp4 to write."""
        self.env.reset(seed, self.simulation.spread)
        self.step, self.highest_reward, self.steps_to_success, self.diverged = 0, 0, None, False
        self.rendered = (-1, {})
        text = instruction(self.simulation.task_name, seed)
        rate = Fraction(FPS, self.simulation.video_every)
        self.video = RolloutVideo(video, rate, text) if video else None
        self.views.extend([self._render()] * self.simulation.history)  # as training repeats an episode's first frame
        return self._progress()

    def advance(self, actions: np.ndarray, reasoning: str) -> Progress:
        """Executes actions (n, 14), fewer if the rollout ends before, and looks again."""
        for to_come, action in zip(reversed(range(len(actions))), actions):
            self._film(reasoning)
            try:
                reward = self.env.step(action)
            except PhysicsError:
                self.diverged, reward = True, 0
            self.step += 1
            self.highest_reward = max(self.highest_reward, int(reward))
            if reward == MAX_REWARD and self.steps_to_success is None:
                self.steps_to_success = self.step
            if self._ended():
                break
            if to_come < self.simulation.history:  # the policy is asked about these frames next
                self.views.append(self._render())
        if self._ended() and self.video:
            self._film(reasoning, last=True)
            self.video.close()
        return self._progress()

    def _ended(self) -> str:
        if self.diverged:
            return "physics diverged"
        if self.steps_to_success is not None:
            done = self.step >= min(self.steps_to_success + STEPS_AFTER_SUCCESS, self.simulation.max_steps)
            return "success" if done else ""
        return "time" if self.step >= self.simulation.max_steps else ""

    def _progress(self) -> Progress:
        ended, qpos = self._ended(), self.env.qpos()
        observation = None if ended else {"images": self._images(), "qpos": qpos.astype(np.float32)}
        return Progress(self.step, self.highest_reward, self.steps_to_success, ended, qpos, observation)

    def _images(self) -> dict[str, np.ndarray]:
        """{the policy's camera: (H, W, 3), or (F, H, W, 3) with history}"""
        stacked = {
            name: np.stack([view[camera] for view in self.views]) for name, camera in self.simulation.cameras.items()
        }
        return stacked if self.simulation.history > 1 else {name: frames[0] for name, frames in stacked.items()}

    def _render(self) -> dict[str, np.ndarray]:
        """{the simulator's camera: (H, W, 3)}, rendered once a step at most."""
        if self.rendered[0] != self.step:
            cameras = dict.fromkeys(self.simulation.cameras.values())
            images = self.env.render(cameras, self.simulation.image_size)
            self.rendered = (self.step, {camera: image.copy() for camera, image in images.items()})  # MuJoCo's buffers
        return self.rendered[1]

    def _film(self, reasoning: str, last: bool = False):
        if not self.video or (self.step % self.simulation.video_every and not last):
            return
        success = True if self.steps_to_success is not None else False if last else None
        reached = ("", *REWARDS[self.simulation.task_name])[self.highest_reward]
        outcome = {None: "", True: "   SUCCESS", False: "   FAILED"}[success]
        status = f"{self.step * DT:.1f} s   reward {self.highest_reward} of {MAX_REWARD} {reached and f'({reached})'}"
        self.video.add(list(self._render().values()), reasoning, status + outcome, success)


def serve_robot(connection: Connection, simulation: Simulation):
    """A process's work: answers ("start", seed, video) and ("advance", actions, reasoning) with a `Progress`, or with
    a string that says what went wrong, until the other process closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    robot = SimulatedRobot(simulation)
    try:
        while True:
            method, *arguments = connection.recv()
            try:
                answer = getattr(robot, method)(*arguments)
            except (RenderingError, OSError) as error:  # OSError: a video that cannot be written
                answer = str(error)
            connection.send(answer)
    except (EOFError, ConnectionError):  # the other process has gone
        pass
