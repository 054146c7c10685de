import os
import tempfile
import time
from pathlib import Path

import pytest
import torch

import qwen2_vla.environment  # noqa: F401  before the libraries that it prepares

# isort: split
from transformers import AutoProcessor, logging

from data_utils import get_norm_stats
from qwen2_vla import Qwen2VLAPolicy, Qwen2VLForConditionalGenerationForVLA
from qwen2_vla.tiny import write_tiny_model

from .helpers import EPISODES, GOLDEN, LENGTH, ONE_CAMERA, write_checkpoint, write_episode

SESSION_BEGAN = time.time()
torch.set_num_threads(min(2, os.cpu_count() or 1))
logging.disable_progress_bar()
# Summaries of the tests' episodes are nobody else's
cache = tempfile.TemporaryDirectory(prefix="dexvla_test_cache_")
os.environ["DEXVLA_CACHE_DIR"] = cache.name


def pytest_sessionfinish():
    # On the CPU, DeepSpeed's processes leave 138 MB of shared memory behind with every run
    for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
        if path.stat().st_mtime >= SESSION_BEGAN:
            path.unlink()


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def processor():
    return AutoProcessor.from_pretrained(GOLDEN / "checkpoint")


@pytest.fixture
def model():
    """The oracle's model in fp32, fresh."""
    return Qwen2VLForConditionalGenerationForVLA.from_pretrained(GOLDEN / "checkpoint", dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a tiny plain Qwen2-VL."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def checkpoint(tiny_base, tmp_path_factory):
    """Folder of a tiny policy with the statistics of the golden episodes."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_base, get_norm_stats(EPISODES))


@pytest.fixture(scope="session")
def policy(checkpoint):
    return Qwen2VLAPolicy.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """Name of a registered task with four small episodes, one of them for validation."""
    from aloha_scripts.constants import TASK_CONFIGS

    folder = tmp_path_factory.mktemp("episodes")
    for i in range(4):
        write_episode(folder / f"episode_{i}.hdf5", seed=i, jpeg=i % 2 == 1)
    TASK_CONFIGS["test_task"] = {
        "dataset_dir": str(folder),
        "episode_len": 12,
        "camera_names": ["cam_high", "cam_left_wrist", "cam_right_wrist"],
        "train_ratio": 0.75,
    }
    yield "test_task"
    del TASK_CONFIGS["test_task"]


@pytest.fixture(scope="session")
def aloha_checkpoint(tiny_base, task, tmp_path_factory):
    """Folder of a tiny policy with the simulator's cameras."""
    from . import serving

    return serving.write_checkpoint(tmp_path_factory.mktemp("aloha"), tiny_base, task)


@pytest.fixture(scope="session")
def aloha_policy(aloha_checkpoint):
    return Qwen2VLAPolicy.from_pretrained(aloha_checkpoint, device="cpu")


@pytest.fixture
def dataset(tmp_path):
    """Three episodes of 12 frames without labels, one of them in a folder below and compressed."""
    folder = tmp_path / "dataset"
    write_episode(folder / "episode_0.hdf5", LENGTH, cameras=ONE_CAMERA, reasonings=False)
    write_episode(folder / "episode_1.hdf5", LENGTH, cameras=ONE_CAMERA, reasonings=False, seed=1)
    write_episode(folder / "more" / "fold.hdf5", LENGTH, cameras=ONE_CAMERA, reasonings=False, seed=2, jpeg=True)
    return folder
