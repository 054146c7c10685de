"""A checkpoint folder acts."""

import numpy as np
import pytest
import torch

from data_utils import (
    EpisodicDataset,
    UserError,
    find_all_hdf5,
    get_norm_stats,
    open_episode,
    save_stats,
    unnormalize_action,
)
from qwen2_vla import Qwen2VLAPolicy
from qwen2_vla.loading import build_config, load_model, load_processor

from .helpers import CAMERAS


@pytest.fixture(scope="module")
def checkpoint(tiny_base, task, tmp_path_factory):
    from aloha_scripts.constants import TASK_CONFIGS

    folder = tmp_path_factory.mktemp("checkpoint")
    data = {"camera_names": CAMERAS, "image_size_stable": [84, 56], "image_size_wrist": [56, 56],
            "use_reasoning": True, "delta_control": False, "task_name": task}  # fmt: skip
    config = build_config(tiny_base, depth=1, width=64, num_heads=4, chunk_size=8, data_config=data)
    load_model(tiny_base, config).save_pretrained(folder)
    load_processor(tiny_base).save_pretrained(folder)
    paths = find_all_hdf5(TASK_CONFIGS[task]["dataset_dir"])
    save_stats(get_norm_stats(paths), folder)
    return str(folder), paths


def test_predicts_robot_units(checkpoint):
    folder, paths = checkpoint
    policy = Qwen2VLAPolicy.from_pretrained(folder, device="cpu")
    episode = open_episode(paths[0])
    observation = {"images": {camera: episode.frame(camera, 3) for camera in CAMERAS}, "qpos": episode.qpos[3]}
    seen = []
    predict = policy.model.predict_action
    policy.model.predict_action = lambda **inputs: seen.append((inputs, predict(**inputs))) or seen[-1][1]
    actions, text = policy.predict(observation, episode.instruction(0), max_new_tokens=3)
    assert actions.shape == (8, 14) and actions.dtype == np.float32 and isinstance(text, str)
    inputs, (normalised, _) = seen[0]
    assert np.allclose(actions, unnormalize_action(normalised[0].numpy(), policy.stats))
    assert (actions >= policy.stats["action_min"] - 1e-3).all() and (actions <= policy.stats["action_max"] + 1e-3).all()
    # the same state, prompt and image grid as in training
    item = EpisodicDataset(paths, CAMERAS, policy.stats, 8, image_size_stable=(84, 56), transform=policy.process)[3]
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][0], item["input_ids"][:prompt])
    assert torch.equal(inputs["states"][0], item["state"])
    assert torch.equal(inputs["image_grid_thw"], item["image_grid_thw"])


def test_bad_observations_are_named(checkpoint):
    folder, _ = checkpoint
    policy = Qwen2VLAPolicy.from_pretrained(folder, device="cpu")
    images = {camera: np.zeros((48, 64, 3), np.uint8) for camera in CAMERAS}
    with pytest.raises(UserError, match=r"qpos: expected shape \(14,\), found \(7,\)"):
        policy.predict({"images": images, "qpos": np.zeros(7)}, "Fold.")
    del images["cam_left_wrist"]
    with pytest.raises(UserError, match="missing cam_left_wrist"):
        policy.predict({"images": images, "qpos": np.zeros(14)}, "Fold.")


def test_folders_that_cannot_act(tiny_base, tmp_path):
    with pytest.raises(UserError, match="expected dataset_stats.json"):
        Qwen2VLAPolicy.from_pretrained(tiny_base)
