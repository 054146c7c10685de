"""ALOHA in MuJoCo without a display: the two tasks of gym-aloha, stepped fast and rendered only when asked.

    env = AlohaSimulation("sim_transfer_cube_scripted")
    env.reset(seed=0)
    images = env.render(["top", "left_wrist"], size=(320, 240))    # {camera: (240, 320, 3) uint8, RGB}
    reward = env.step(action)                                      # action (14,), reward 0 .. MAX_REWARD

Models, rewards and start positions are gym-aloha's own; a seed gives the same start as its
`AlohaTransferCube-v0` and `AlohaInsertion-v0` do for `reset(seed=seed)`.
"""

import ctypes
import importlib.util
import os
import sys

GL_MISSING = (
    "MuJoCo cannot render here: no OpenGL library for rendering without a display could be used (MUJOCO_GL={backend}). "
    "On Debian or Ubuntu install `libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0` (MUJOCO_GL=egl) "
    "or `libosmesa6` (MUJOCO_GL=osmesa)."
)


class RenderingError(RuntimeError):
    """This machine cannot render; the message says what to install."""


def _loads(*libraries):
    try:
        for library in libraries:
            ctypes.CDLL(library)
    except OSError:
        return False
    return True


def choose_gl_backend():
    """What to render with: the user's MUJOCO_GL, "auto" where there is a window system, "egl", "osmesa" or "off"."""
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "auto"
    if _loads("libEGL.so.1", "libOpenGL.so.0"):
        return "egl"
    if any(_loads(f"libOSMesa.so.{version}") for version in (8, 6)):
        return "osmesa"
    return "off"  # the physics runs without a renderer; only render() raises


GL_BACKEND = choose_gl_backend()
if GL_BACKEND != "auto":
    os.environ["MUJOCO_GL"] = GL_BACKEND  # dm_control reads it once, when it is imported

# Mesa's software renderer and Triton, a part of PyTorch, both bring an LLVM; loaded after Mesa's, Triton's crashes
if importlib.util.find_spec("triton"):
    import triton  # noqa: F401

import numpy as np  # noqa: E402

try:
    from dm_control import mujoco
    from dm_control.rl import control
except ModuleNotFoundError:
    raise
except (ImportError, AttributeError) as error:  # how PyOpenGL reports a library that is missing or finds no device
    raise RenderingError(GL_MISSING.format(backend=GL_BACKEND)) from error
except RuntimeError as error:  # no such MUJOCO_GL; it says which there are
    raise RenderingError(str(error)) from error

from gym_aloha.constants import ASSETS_DIR  # noqa: E402
from gym_aloha.tasks import sim, sim_end_effector  # noqa: E402
from gym_aloha.utils import sample_box_pose, sample_insertion_pose  # noqa: E402

from aloha_scripts.constants import DT  # noqa: E402

MAX_REWARD = 4  # success, in both tasks
CAMERA_NAMES = ("top", "left_wrist", "right_wrist")


def sample_transfer_cube(seed):
    """(1, 7) position in m and quaternion of the cube."""
    return sample_box_pose(seed)[None]


def sample_insertion(seed):
    """(2, 7) position in m and quaternion of the peg, then of the socket."""
    return np.stack(sample_insertion_pose(seed))


# task name: (name of the model file, joint-space task, end-effector task, seed -> start poses of the objects, the
# middle (objects, 2) of the area that x and y are drawn from, in m)
_TASKS = {
    "sim_transfer_cube_scripted": (
        "transfer_cube",
        sim.TransferCubeTask,
        sim_end_effector.TransferCubeEndEffectorTask,
        sample_transfer_cube,
        [[0.1, 0.5]],
    ),
    "sim_insertion_scripted": (
        "insertion",
        sim.InsertionTask,
        sim_end_effector.InsertionEndEffectorTask,
        sample_insertion,
        [[0.15, 0.5], [-0.15, 0.5]],
    ),
}
SIM_TASKS = tuple(_TASKS)


def full_name(task_name):
    """One of SIM_TASKS; `sim_transfer_cube` and `sim_insertion` are understood too.

    Raises:
        ValueError: naming the known tasks.
    """
    for name in (task_name, f"{task_name}_scripted"):
        if name in _TASKS:
            return name
    raise ValueError(f"unknown simulated task {task_name!r}; known: {', '.join(_TASKS)}")


def _seeded_and_blind(task_class):
    """`task_class` with its objects placed by `object_poses`, and without the three renderings at every step."""

    class Task(task_class):
        object_poses = None  # (7 * objects,), the last entries of the model's qpos

        def initialize_episode(self, physics):
            sim.BOX_POSE[0] = self.object_poses  # the joint-space tasks read this global
            super().initialize_episode(physics)
            physics.data.qpos[-len(self.object_poses) :] = self.object_poses  # the end-effector tasks draw their own

        def get_observation(self, physics):
            return {}

    return Task()


class AlohaSimulation:
    """One task of the simulated robot.

    Args:
        task_name: one of SIM_TASKS.
        end_effector: actions are gripper poses, (16,) = per arm position in m (3), quaternion wxyz (4), gripper 0..1,
            instead of the (14,) joint positions in rad with grippers 0..1 that are the robot's own.
        fast_rendering: no shadows and no multi-sampling: about four times as fast on a CPU.
    """

    def __init__(self, task_name, *, end_effector=False, fast_rendering=True):
        model, joint_task, end_effector_task, self._sample, self._middle = _TASKS[full_name(task_name)]
        kind = "end_effector_" if end_effector else ""
        self.physics = mujoco.Physics.from_xml_path(str(ASSETS_DIR / f"bimanual_viperx_{kind}{model}.xml"))
        self._task = _seeded_and_blind(end_effector_task if end_effector else joint_task)
        self._env = control.Environment(self.physics, self._task, control_timestep=DT)
        self._cameras = {}  # (camera, width, height): dm_control camera
        if fast_rendering:
            self.physics.model.light_castshadow[:] = 0
            self.physics.model.vis.quality.offsamples = 0

    def reset(self, seed, spread=1.0):
        """Starts an episode; the seed places the objects, in the middle `spread` (0 .. 1) of their area's sides."""
        poses = self._sample(seed)  # (objects, 7)
        if spread != 1:
            poses[:, :2] = self._middle + spread * (poses[:, :2] - self._middle)
        self._task.object_poses = poses.flatten()
        self._env.reset()

    def step(self, action):
        """Advances by DT seconds; returns the reward, 0 .. MAX_REWARD."""
        return self._env.step(np.asarray(action, dtype=np.float64)).reward

    def qpos(self):
        """(14,) joint positions in rad, grippers 0 (closed) .. 1 (open)."""
        return self._task.get_qpos(self.physics)

    def qvel(self):
        """(14,) joint velocities in rad/s, grippers in ranges/s."""
        return self._task.get_qvel(self.physics)

    def object_poses(self):
        """(objects, 7) current position in m and quaternion wxyz of the cube, or of the peg and the socket."""
        return self.physics.data.qpos[-len(self._task.object_poses) :].reshape(-1, 7).copy()

    def render(self, camera_names=CAMERA_NAMES, size=(640, 480)):
        """{camera: (height, width, 3) uint8, RGB} as seen now, with size = (width, height) in pixels."""
        if GL_BACKEND == "off":
            raise RenderingError(GL_MISSING.format(backend=GL_BACKEND))
        # copied: a camera renders into the same memory every time
        return {name: self._camera(name, *size).render().copy() for name in camera_names}

    def close(self):
        """Frees the renderer."""
        self._cameras.clear()
        self.physics.free()

    def _camera(self, name, width, height):
        key = (name, width, height)
        if key not in self._cameras:  # kept, because making one allocates a whole scene
            limit = self.physics.model.vis.global_
            if width > limit.offwidth or height > limit.offheight:
                raise ValueError(
                    f"size ({width}, {height}) is above the renderer's ({limit.offwidth}, {limit.offheight})"
                )
            self._cameras[key] = mujoco.Camera(self.physics, height=height, width=width, camera_id=name)
        return self._cameras[key]
