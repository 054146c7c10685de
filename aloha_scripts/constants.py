"""The table of tasks and the constants of the ALOHA robot. Imports nothing heavy, so every part may read it."""

import os
from pathlib import Path

# Datasets live here unless an entry of TASK_CONFIGS names another folder.
DATA_DIR = os.environ.get("DEXVLA_DATA_DIR") or str(Path(__file__).resolve().parents[1] / "data")

# To train on your own data, add one entry; its key is what `--task_name` takes.
#
#   dataset_dir     str, or list of str: folders searched recursively for *.hdf5 episodes and LeRobot datasets.
#   episode_len     int: number of steps of one episode (of the longest one, if they differ).
#   camera_names    list of str: which observations/images/<name> the model sees, in this order.
#   camera_map      optional, dict: name in camera_names -> name in the files, or list of them, where they differ.
#   stats_dir       optional, str or list of str: folders whose episodes give the normalisation statistics. Default:
#                   dataset_dir. Name one folder here to train on several datasets with the statistics of the first.
#                   Or a dict, robot -> folder or list of them, to train on several robots: each has statistics of its
#                   own, and every dataset_dir must be one of the folders of one robot, or lie in one.
#   sample_weights  optional, list of float, one per dataset_dir: how often each folder is drawn. Default: by its size.
#   train_ratio     optional, float in (0, 1]: share of the first folder's episodes used for training; the others, if
#                   any, are for validation. All other folders are training data. Default: 0.999.
#   name_filter     optional, function path -> bool: keep only the episode files for which it is true.
TASK_CONFIGS = {
    # A real robot, as an example of an entry: put your own recordings there.
    "example_tasks": {
        "dataset_dir": [os.path.join(DATA_DIR, "example_tasks")],
        "episode_len": 1000,
        "camera_names": ["cam_high", "cam_left_wrist", "cam_right_wrist"],
    },
    # Recorded in simulation by aloha_scripts/record_sim_episodes.py.
    "sim_transfer_cube_scripted": {
        "dataset_dir": os.path.join(DATA_DIR, "sim_transfer_cube_scripted"),
        "episode_len": 400,
        "camera_names": ["top", "left_wrist", "right_wrist"],
        "train_ratio": 0.9,
    },
    "sim_insertion_scripted": {
        "dataset_dir": os.path.join(DATA_DIR, "sim_insertion_scripted"),
        "episode_len": 400,
        "camera_names": ["top", "left_wrist", "right_wrist"],
        "train_ratio": 0.9,
    },
}

# ---- ALOHA: two ViperX arms (puppets) led by two WidowX arms (masters); names as in ACT (Zhao et al., 2023) ----

DT = 0.02  # s per control step
FPS = 50  # control steps, and frames, per second

# One arm. A 14-D state or action is [left joints (6), left gripper, right joints (6), right gripper];
# joints in rad, grippers normalised to 0 (closed) .. 1 (open).
JOINT_NAMES = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate"]

# (16,) both arms: six joints in rad, then the two fingers' slide positions in m.
START_ARM_POSE = [0, -0.96, 1.16, 0, -0.3, 0, 0.02239, -0.02239] * 2

# Slide position of the left finger in m; the right finger's is its negative.
MASTER_GRIPPER_POSITION_OPEN = 0.02417
MASTER_GRIPPER_POSITION_CLOSE = 0.01244
PUPPET_GRIPPER_POSITION_OPEN = 0.05800
PUPPET_GRIPPER_POSITION_CLOSE = 0.01844

# Angle of the gripper motor in rad.
MASTER_GRIPPER_JOINT_OPEN = 0.3083
MASTER_GRIPPER_JOINT_CLOSE = -0.6842
MASTER_GRIPPER_JOINT_MID = (MASTER_GRIPPER_JOINT_OPEN + MASTER_GRIPPER_JOINT_CLOSE) / 2
PUPPET_GRIPPER_JOINT_OPEN = 1.4910
PUPPET_GRIPPER_JOINT_CLOSE = -0.6213


def _linear_map(from_close, from_open, to_close, to_open):
    """The linear function that takes from_close to to_close and from_open to to_open."""
    scale = (to_open - to_close) / (from_open - from_close)
    return lambda x: (x - from_close) * scale + to_close


_UNIT = (0.0, 1.0)  # normalised: 0 closed, 1 open
_MASTER_POSITION = (MASTER_GRIPPER_POSITION_CLOSE, MASTER_GRIPPER_POSITION_OPEN)
_PUPPET_POSITION = (PUPPET_GRIPPER_POSITION_CLOSE, PUPPET_GRIPPER_POSITION_OPEN)
_MASTER_JOINT = (MASTER_GRIPPER_JOINT_CLOSE, MASTER_GRIPPER_JOINT_OPEN)
_PUPPET_JOINT = (PUPPET_GRIPPER_JOINT_CLOSE, PUPPET_GRIPPER_JOINT_OPEN)

MASTER_GRIPPER_POSITION_NORMALIZE_FN = _linear_map(*_MASTER_POSITION, *_UNIT)
MASTER_GRIPPER_POSITION_UNNORMALIZE_FN = _linear_map(*_UNIT, *_MASTER_POSITION)
PUPPET_GRIPPER_POSITION_NORMALIZE_FN = _linear_map(*_PUPPET_POSITION, *_UNIT)
PUPPET_GRIPPER_POSITION_UNNORMALIZE_FN = _linear_map(*_UNIT, *_PUPPET_POSITION)
MASTER2PUPPET_POSITION_FN = _linear_map(*_MASTER_POSITION, *_PUPPET_POSITION)

MASTER_GRIPPER_JOINT_NORMALIZE_FN = _linear_map(*_MASTER_JOINT, *_UNIT)
MASTER_GRIPPER_JOINT_UNNORMALIZE_FN = _linear_map(*_UNIT, *_MASTER_JOINT)
PUPPET_GRIPPER_JOINT_NORMALIZE_FN = _linear_map(*_PUPPET_JOINT, *_UNIT)
PUPPET_GRIPPER_JOINT_UNNORMALIZE_FN = _linear_map(*_UNIT, *_PUPPET_JOINT)
MASTER2PUPPET_JOINT_FN = _linear_map(*_MASTER_JOINT, *_PUPPET_JOINT)

# A velocity has no offset: only the width of the range counts.
MASTER_GRIPPER_VELOCITY_NORMALIZE_FN = _linear_map(
    0.0, MASTER_GRIPPER_POSITION_OPEN - MASTER_GRIPPER_POSITION_CLOSE, *_UNIT
)
PUPPET_GRIPPER_VELOCITY_NORMALIZE_FN = _linear_map(
    0.0, PUPPET_GRIPPER_POSITION_OPEN - PUPPET_GRIPPER_POSITION_CLOSE, *_UNIT
)

MASTER_POS2JOINT = _linear_map(*_MASTER_POSITION, *_MASTER_JOINT)
MASTER_JOINT2POS = _linear_map(*_MASTER_JOINT, *_MASTER_POSITION)
PUPPET_POS2JOINT = _linear_map(*_PUPPET_POSITION, *_PUPPET_JOINT)
PUPPET_JOINT2POS = _linear_map(*_PUPPET_JOINT, *_PUPPET_POSITION)
