"""Past frames as video, and patches made on the device."""

import numpy as np
import pytest
import torch

from data_utils import EpisodicDataset, Qwen2VLADataCollatorForSupervisedDataset, UserError, get_norm_stats, save_stats
from qwen2_vla import Qwen2VLAPolicy, Qwen2VLAProcess
from qwen2_vla.loading import build_config, load_model, load_processor
from qwen2_vla.patches import to_patches

from .helpers import CAMERAS, EPISODES, relative_error

SIZES = {"image_size_stable": (84, 56)}
STATS = get_norm_stats(EPISODES)


def dataset(processor, frames: int, **options) -> EpisodicDataset:
    process = Qwen2VLAProcess(processor, CAMERAS, image_size_wrist=(56, 84))
    return EpisodicDataset(
        EPISODES, CAMERAS, STATS, 8, history_images_length=frames, transform=process, **SIZES, **options
    )


def collate(processor, items: list[dict]) -> dict:
    return Qwen2VLADataCollatorForSupervisedDataset(pad_token_id=processor.tokenizer.pad_token_id)(items)


def test_patches_of_images_as_transformers_makes_them(processor):
    images = [torch.randint(0, 256, (2, 1, h, w, 3), dtype=torch.uint8) for h, w in ((56, 84), (84, 28))]
    flat = [camera[sample, 0].permute(2, 0, 1) for sample in range(2) for camera in images]
    expected = processor.image_processor(images=flat, do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.allclose(to_patches(images), expected, atol=1e-5)


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_patches_of_videos_as_transformers_makes_them(processor, frames):
    videos = [torch.randint(0, 256, (2, frames, 56, 84, 3), dtype=torch.uint8) for _ in range(2)]
    flat = [camera[sample].permute(0, 3, 1, 2) for sample in range(2) for camera in videos]
    expected = processor.video_processor(videos=flat, do_resize=False, do_sample_frames=False, return_tensors="pt")
    assert torch.allclose(to_patches(videos), expected["pixel_values_videos"], atol=1e-5)


@pytest.mark.parametrize("t", [0, 1, 6])
def test_the_frames_up_to_the_current_one(processor, t):
    raw = EpisodicDataset(EPISODES, CAMERAS, STATS, 8, history_images_length=4, **SIZES)[t]["images"]  # (K, F, 3, h, w)
    assert raw.shape == (3, 4, 3, 56, 84)
    singles = EpisodicDataset(EPISODES, CAMERAS, STATS, 8, **SIZES)
    for past in range(4):
        assert torch.equal(raw[:, 3 - past], singles[max(t - past, 0)]["images"])


def test_videos_get_tokens_grids_and_one_augmentation(processor):
    item = dataset(processor, 4, augment=True)[5, (0, 0, 0)]
    assert item["video_grid_thw"].tolist() == [[2, 4, 6], [2, 6, 4], [2, 6, 4]] and "image_grid_thw" not in item
    tokens = item["input_ids"] == processor.video_token_id
    assert tokens.sum() == 3 * 2 * 6 and torch.equal(item["mm_token_type_ids"] == 2, tokens)
    assert item["pixel_values_videos"].shape == (3 * 2 * 24, 1176)
    single = dataset(processor, 1, augment=True)[5, (0, 0, 0)]
    assert all(torch.equal(video[-1:], image) for video, image in zip(item["images"], single["images"]))
    still = dataset(processor, 4, augment=True)[0, (0, 0, 0)]["images"]  # nothing before frame 0: four times the same
    assert all((camera == camera[:1]).all() for camera in still)


def test_a_still_video_is_worth_its_image(processor, model):
    """Two equal frames fill the two that an image stands for, so everything after the patches must agree."""
    losses = []
    for frames in (1, 2):
        torch.manual_seed(0)
        out = model(**collate(processor, [dataset(processor, frames)[i] for i in (0, 13)]))  # first frames of episodes
        losses.append(torch.stack([out.loss, out.llm_loss, out.action_loss]).detach())
    assert relative_error(losses[1], losses[0]) < 1e-5


def test_the_past_matters(processor, model):
    conditions = [model(**collate(processor, [dataset(processor, n)[5]])).condition.detach() for n in (1, 2)]
    assert relative_error(conditions[1], conditions[0]) > 1e-3


def test_batches_of_videos_act_as_single_ones(processor, model):
    data = dataset(processor, 4)
    process = data.transform
    plain = EpisodicDataset(EPISODES, CAMERAS, STATS, 8, history_images_length=4, **SIZES)
    items = [process({key: plain[i][key] for key in ("images", "state", "raw_lang")}) for i in (3, 20)]
    assert len(items[0]["input_ids"]) != len(items[1]["input_ids"])

    def act(chosen):
        batch = {key: value for key, value in collate(processor, chosen).items() if key != "position_ids"}
        torch.manual_seed(0)
        return model.predict_action(**batch, tokenizer=processor.tokenizer, max_new_tokens=4)

    (together, texts), alone = act(items), [act([item]) for item in items]
    assert texts == [alone[0][1][0], alone[1][1][0]] and together.shape == (2, 8, 14)
    assert relative_error(together[0], alone[0][0][0]) < 1e-3


def test_a_policy_wants_its_frames(tiny_base, tmp_path):
    data = {"camera_names": CAMERAS, "image_size_stable": [84, 56], "image_size_wrist": [56, 56], "use_reasoning": True,
            "delta_control": False, "history_images_length": 2}  # fmt: skip
    config = build_config(tiny_base, depth=1, width=64, num_heads=4, chunk_size=8, data_config=data)
    load_model(tiny_base, config).save_pretrained(tmp_path)
    load_processor(tiny_base).save_pretrained(tmp_path)
    save_stats(STATS, tmp_path)
    policy = Qwen2VLAPolicy.from_pretrained(str(tmp_path), device="cpu")
    two, one = np.zeros((2, 48, 64, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)
    actions, _ = policy.predict(
        {"images": dict.fromkeys(CAMERAS, two), "qpos": np.zeros(14)}, "Fold.", max_new_tokens=2
    )
    assert actions.shape == (8, 14)
    with pytest.raises(UserError, match=r"images\['cam_high'\]: expected 2 frames .*found \(48, 64, 3\)"):
        policy.predict({"images": dict.fromkeys(CAMERAS, one), "qpos": np.zeros(14)}, "Fold.")
