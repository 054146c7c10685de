"""Scripted demonstrations: gripper keyframes of both tasks, and the joint trajectories that follow them.

The idea of scripting the two tasks by end-effector keyframes, rolling them out with mocap bodies welded to the
grippers, and replaying the joint positions is ACT's (Zhao et al., "Learning Fine-Grained Bimanual Manipulation with
Low-Cost Hardware", 2023). The keyframes, the interpolation and the weld settings here are our own: ACT's do not
succeed with MuJoCo 3, where the weld tracks differently.

Positions are in metres in the world frame (x to the robot's right, z up, the table at 0); they are those of the point
between the finger tips. A rotation is relative to the gripper pointing level at the other arm.
"""

from itertools import pairwise
from typing import NamedTuple

import mujoco
import numpy as np

from aloha_scripts.simulation import AlohaSimulation

EPISODE_LEN = 400  # steps of DT seconds
GRASP_HEIGHT = 0.02  # m above the table
CLOSED, OPEN = 0.0, 1.0
X, Y = 0, 1  # rotation axes
MEETING_POINT = np.array([0.0, 0.5, 0.25])  # where the cube changes hands
INSERTION_POINT = np.array([0.0, 0.5, 0.15])  # where the peg meets the socket


class Keyframe(NamedTuple):
    """Where a gripper has to be at a step."""

    step: int
    position: np.ndarray  # (3,) m
    rotation: np.ndarray  # (4,) quaternion wxyz
    gripper: float  # 0 closed .. 1 open


def rotation(axis, degrees):
    """(4,) quaternion wxyz of a turn about one axis of the world."""
    half = np.radians(degrees) / 2
    quaternion = np.array([np.cos(half), 0.0, 0.0, 0.0])
    quaternion[1 + axis] = np.sin(half)
    return quaternion


LEVEL = rotation(X, 0)


def transfer_cube_keyframes(cube, home_left, home_right):
    """Keyframes (left, right) that hand the cube, to be grasped near (3,) `cube`, from right to left."""
    down = rotation(Y, -60)
    grasp = cube + [-0.01, 0, 0.005]
    right = [
        home_right,
        Keyframe(70, grasp + [0, 0, 0.10], down, OPEN),
        Keyframe(110, grasp, down, OPEN),
        Keyframe(125, grasp, down, OPEN),
        Keyframe(155, grasp, down, CLOSED),
        Keyframe(195, grasp + [0, 0, 0.14], down, CLOSED),
        Keyframe(250, MEETING_POINT, LEVEL, CLOSED),
        Keyframe(330, MEETING_POINT, LEVEL, CLOSED),
        Keyframe(355, MEETING_POINT, LEVEL, OPEN),
        Keyframe(395, MEETING_POINT + [0.14, 0, 0], LEVEL, OPEN),
    ]
    upright = rotation(X, 90)  # the left fingers close from above and below, between the right ones
    wait, take = MEETING_POINT + [-0.12, 0, -0.02], MEETING_POINT + [0.02, 0, -0.02]
    left = [
        home_left,
        Keyframe(150, wait, upright, OPEN),
        Keyframe(255, wait, upright, OPEN),
        Keyframe(295, take, upright, OPEN),
        Keyframe(330, take, upright, CLOSED),
        Keyframe(355, take, upright, CLOSED),
        Keyframe(395, take - [0.10, 0, 0], upright, CLOSED),
    ]
    return left, right


def insertion_keyframes(peg, socket, home_left, home_right):
    """Keyframes (left, right) that push the peg into the socket, to be grasped at (3,) `peg` and `socket`."""

    def one_arm(home, grasp, side, height):
        """side: +1 right, -1 left. The arm comes down from its own side and keeps the object level ever after."""
        down = rotation(Y, -60 * side)
        facing = INSERTION_POINT + [0.12 * side, 0, height]
        pushed = INSERTION_POINT + [0.046 * side, 0, height]
        return [
            home,
            Keyframe(80, grasp + [0, 0, 0.10], down, OPEN),
            Keyframe(120, grasp, down, OPEN),
            Keyframe(135, grasp, down, OPEN),
            Keyframe(165, grasp, down, CLOSED),
            Keyframe(200, grasp + [0, 0, 0.12], down, CLOSED),
            Keyframe(260, facing, down, CLOSED),
            Keyframe(370, pushed, down, CLOSED),
        ]

    # The socket is taller, so its middle lies higher in the gripper than the peg's: the peg arm makes up for it.
    return one_arm(home_left, socket, -1, 0.0), one_arm(home_right, peg, +1, 0.012)


# Task name: (keyframe function of the objects' positions and the two homes, [(first step, sub-step)], instructions)
TASKS = {
    "sim_transfer_cube_scripted": (
        transfer_cube_keyframes,
        [
            (0, "Move the right gripper above the red cube."),
            (70, "Lower the right gripper around the red cube."),
            (125, "Close the right gripper on the red cube."),
            (155, "Lift the red cube off the table."),
            (195, "Carry the red cube to the meeting point in front of the left gripper."),
            (255, "Move the open left gripper around the red cube."),
            (295, "Close the left gripper on the red cube."),
            (330, "Open the right gripper to release the red cube."),
            (355, "Move both arms apart, with the red cube in the left gripper."),
        ],
        [
            "Pick up the red cube with the right arm and hand it over to the left arm.",
            "Pass the red cube from the right gripper to the left gripper.",
            "Transfer the cube from the right hand to the left hand.",
        ],
    ),
    "sim_insertion_scripted": (
        insertion_keyframes,
        [
            (0, "Move the right gripper above the red peg and the left gripper above the blue socket."),
            (80, "Lower both grippers around the peg and the socket."),
            (135, "Close both grippers on the peg and the socket."),
            (165, "Lift the peg and the socket off the table."),
            (200, "Bring the peg and the socket face to face in the air."),
            (260, "Push the peg straight into the socket."),
            (370, "Hold the peg inside the socket."),
        ],
        [
            "Insert the red peg into the blue socket.",
            "Pick up the peg and the socket and put the peg into the socket in the air.",
            "Take the socket with the left arm and the peg with the right arm, then plug them together.",
        ],
    ),
}


def instruction(task_name, seed):
    """One of the task's instructions, chosen by the episode's seed."""
    texts = TASKS[task_name][2]
    return texts[seed % len(texts)]


def substep_reasonings(task_name, steps=EPISODE_LEN):
    """[steps] the sub-step that the demonstration is in at each step."""
    phases = TASKS[task_name][1]
    starts = [start for start, _ in phases]
    return [phases[np.searchsorted(starts, step, side="right") - 1][1] for step in range(steps)]


def slerp(start, end, share):
    """(4,) the unit quaternion that lies `share` (0..1) of the shorter way from start to end."""
    cosine = float(np.dot(start, end))
    if cosine < 0:  # q and -q are the same rotation
        end, cosine = -end, -cosine
    angle = np.arccos(min(cosine, 1.0))
    if angle < 1e-6:
        return start
    return (np.sin((1 - share) * angle) * start + np.sin(share * angle) * end) / np.sin(angle)


def gripper_target(keyframes, step):
    """(8,) position, quaternion and gripper at a step: eased between keyframes, still after the last one."""
    for start, end in pairwise(keyframes):
        if step < end.step:
            share = (step - start.step) / (end.step - start.step)
            eased = share * share * (3 - 2 * share)  # speed 0 at both ends
            position = start.position + eased * (end.position - start.position)
            gripper = start.gripper + share * (end.gripper - start.gripper)
            return np.concatenate([position, slerp(start.rotation, end.rotation, eased), [gripper]])
    return np.concatenate([keyframes[-1].position, keyframes[-1].rotation, [keyframes[-1].gripper]])


def _home(env, weld, gripper):
    """Keyframe 0 of an arm: the target that the weld (0 left, 1 right) asks nothing of at the start pose."""
    model, data = env.physics.model, env.physics.data
    body = model.eq_obj2id[weld]
    offset, turn = model.eq_data[weld, 3:6], model.eq_data[weld, 6:10]  # the gripper as seen from its target
    target, matrix, back = np.empty(4), np.empty(9), np.empty(4)
    mujoco.mju_negQuat(back, turn)
    mujoco.mju_mulQuat(target, data.xquat[body], back)
    mujoco.mju_quat2Mat(matrix, target)
    return Keyframe(0, data.xpos[body] - matrix.reshape(3, 3) @ offset, target, gripper)


class ScriptedPolicy:
    """Turns keyframes into joint trajectories of one task; the simulation is built once and reused."""

    def __init__(self, task_name):
        self.keyframes = TASKS[task_name][0]
        self.env = AlohaSimulation(task_name, end_effector=True)
        # The weld of the model is too soft, and the arms too stiff, for the grippers to follow their targets. This is
        # only a way to solve for joint positions: the episode itself is recorded in the unmodified joint-space task.
        model = self.env.physics.model
        model.eq_solimp[:, :2] = 0.9
        for first_dof in (0, 8):
            model.dof_frictionloss[first_dof : first_dof + 6] = 1

    def rollout(self, seed, steps=EPISODE_LEN, spread=1.0):
        """(steps, 14) f64 actions for the joint-space task: joint positions in rad, commanded grippers 0..1."""
        env = self.env
        env.reset(seed, spread)
        start = env.qpos()
        homes = _home(env, 0, start[6]), _home(env, 1, start[13])
        for weld, home in enumerate(homes):  # the reset leaves the targets elsewhere, which would jerk the arms
            env.physics.data.mocap_pos[weld], env.physics.data.mocap_quat[weld] = home.position, home.rotation
        env.physics.forward()
        grasps = env.object_poses()[:, :3]  # (objects, 3)
        grasps[:, 2] = GRASP_HEIGHT  # the objects start in the air and fall onto the table
        left, right = self.keyframes(*grasps, *homes)
        actions = np.empty((steps, 14))
        for step in range(steps):
            targets = [gripper_target(arm, step) for arm in (left, right)]
            env.step(np.concatenate(targets))
            actions[step] = env.qpos()  # where the joints got to is what to command
            actions[step, [6, 13]] = [target[7] for target in targets]
        return actions
