"""ALOHA constants and task table, and scripted demonstrations in simulation.

Only the light part is exported here; `simulation`, `scripted_policy` and `record_sim_episodes` need MuJoCo and are
imported by name.
"""

from aloha_scripts.constants import DATA_DIR, DT, FPS, JOINT_NAMES, START_ARM_POSE, TASK_CONFIGS

__all__ = ["DATA_DIR", "DT", "FPS", "JOINT_NAMES", "START_ARM_POSE", "TASK_CONFIGS"]
