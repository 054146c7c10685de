"""Shared by the tests of the vla-eval server: a checkpoint, observations of LIBERO's shapes, and LIBERO itself."""

import os
from pathlib import Path
from unittest import mock

import numpy as np

from data_utils import get_norm_stats

from . import helpers
from .helpers import write_episode

with mock.patch.dict(os.environ):  # it sets how OpenGL is found, for all that renders afterwards
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark

LIBERO = {"position": "delta_xyz", "rotation": "axis_angle", "gripper": "binary_close_positive"}


def write_checkpoint(
    base: str, folder: Path, cameras=("agentview", "wrist"), history: int = 1, actions: int = 7, delta: bool = False
) -> str:
    """A random policy with LIBERO's sizes: state 8, action 7; a chunk has 8 steps."""
    paths = [str(write_episode(folder / "episodes/0.hdf5", cameras=list(cameras), dim=8))]
    stats = get_norm_stats(paths)
    stats |= {key: value[:actions] for key, value in stats.items() if key.startswith("action")}
    data = {"camera_names": list(cameras), "delta_control": delta, "history_images_length": history}
    head = {"action_dim": actions, "state_dim": 8}
    return helpers.write_checkpoint(folder, base, stats, head, **data, image_size_stable=[56, 56])


def observation(step: int = 0, cameras=("agentview", "wrist"), **changes) -> dict:
    """As LIBERO's `make_obs` sends it."""
    rng = np.random.default_rng(step)
    images = {camera: rng.integers(0, 255, (48, 48, 3), dtype=np.uint8) for camera in cameras}
    sent = {"images": images, "states": rng.normal(size=8), "task_description": "open the drawer"} | changes
    return {key: value for key, value in sent.items() if value is not None}


class StandIn:
    """What LIBERO's benchmark uses of its simulator: the arm's position moves by the action, images count the steps."""

    def __init__(self):
        self.position, self.grippers, self.steps = np.zeros(3), [], 0
        self.robots = [self]
        self.controller, self.ee_pos, self.ee_ori_mat = self, self.position, np.eye(3)

    def observe(self) -> dict:
        image = np.zeros((64, 64, 3), np.uint8)
        image[:8, :8] = self.steps + 1  # top left as it is rendered, bottom right when upright
        return {
            "agentview_image": image,
            "robot0_eye_in_hand_image": image + 100,
            "robot0_eef_pos": self.position.copy(),
            "robot0_eef_quat": np.array([0, 0, 0, 1.0]),
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }

    def step(self, action: list[float]) -> tuple[dict, float, bool, dict]:
        assert len(action) == 7
        self.position += action[:3]
        self.grippers.append(action[6])
        self.steps += 1
        return self.observe(), 0.0, self.steps == 12, {}

    def close(self):
        self.robots = []


class LiberoWithoutAssets(LIBEROBenchmark):
    """The harness's own LIBERO with its observations and actions; two tasks, done after 12 steps."""

    episodes: list[StandIn] = []

    def get_tasks(self) -> list[dict]:
        return [{"name": "open the drawer"}, {"name": "close the drawer"}]

    def reset(self, task: dict) -> dict:
        self._env = StandIn()
        self.episodes.append(self._env)
        return self._env.observe()
