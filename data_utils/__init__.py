import cv2

from .augment import Augmentation, center_crop
from .collator import Qwen2VLADataCollatorForSupervisedDataset
from .dataset import EpisodicDataset, SamplingPlan, get_norm_stats, load_data
from .episodes import Episode, check_episode, check_episodes, find_all_hdf5
from .errors import DatasetError, UserError
from .normalization import (
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
    "Qwen2VLADataCollatorForSupervisedDataset",
    "SamplingPlan",
    "UserError",
    "center_crop",
    "check_episode",
    "check_episodes",
    "find_all_hdf5",
    "get_norm_stats",
    "load_data",
    "load_stats",
    "normalize_action",
    "normalize_state",
    "save_stats",
    "unnormalize_action",
    "unnormalize_state",
]
