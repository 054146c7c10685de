import cv2

from .augment import Augmentation, center_crop
from .collator import Qwen2VLADataCollatorForSupervisedDataset
from .dataset import EpisodicDataset, SamplingPlan, get_norm_stats, load_data
from .episodes import Episode, find_all_hdf5, find_episodes, open_episode, stored_camera
from .errors import DatasetError, Finding, UserError, run_command
from .index import check_episodes, summarize_all
from .normalization import (
    load_robot_stats,
    load_stats,
    normalize_action,
    normalize_state,
    save_stats,
    unnormalize_action,
    unnormalize_state,
)
from .sampler import EpisodeSampler

# Loader workers are the parallelism; a thread pool in each of them would only compete
cv2.setNumThreads(0)

__all__ = [
    "Augmentation",
    "DatasetError",
    "Episode",
    "EpisodeSampler",
    "EpisodicDataset",
    "Finding",
    "Qwen2VLADataCollatorForSupervisedDataset",
    "SamplingPlan",
    "UserError",
    "center_crop",
    "check_episodes",
    "find_all_hdf5",
    "find_episodes",
    "get_norm_stats",
    "load_data",
    "load_robot_stats",
    "load_stats",
    "normalize_action",
    "normalize_state",
    "open_episode",
    "run_command",
    "save_stats",
    "stored_camera",
    "summarize_all",
    "unnormalize_action",
    "unnormalize_state",
]
