"""Items, text, statistics and batches against the oracle's numbers."""

import pickle

import h5py
import numpy as np
import pytest
import torch

from data_utils import (
    EpisodicDataset,
    Qwen2VLADataCollatorForSupervisedDataset,
    find_all_hdf5,
    get_norm_stats,
    load_data,
    load_stats,
    normalize_action,
    normalize_state,
    save_stats,
    unnormalize_action,
    unnormalize_state,
)
from qwen2_vla import Qwen2VLAProcess
from qwen2_vla.patches import to_patches

from .helpers import CAMERAS, EPISODES, GOLDEN, golden, write_episode

EXPECTED = golden("expected_items.safetensors")
STATS = get_norm_stats(EPISODES)


def dataset(processor=None, *, paths=EPISODES, wrist=(320, 240), reasoning=True, chunk=8, **options) -> EpisodicDataset:
    transform = None
    if processor is not None:
        transform = Qwen2VLAProcess(processor, CAMERAS, image_size_wrist=wrist, use_reasoning=reasoning)
    return EpisodicDataset(paths, CAMERAS, STATS, chunk, use_reasoning=reasoning, transform=transform, **options)


def test_statistics():
    for key in ("action_mean", "action_std", "action_min", "action_max", "qpos_mean", "qpos_std", "example_qpos"):
        assert np.allclose(STATS[key], EXPECTED[f"stats.{key}"].numpy(), rtol=1e-6, atol=1e-6), key


@pytest.mark.parametrize("index", [0, 1, 5, 12, 13, 14, 22, 23, 24, 31])
def test_items(processor, index):
    item = dataset(processor)[index]
    for key in ("input_ids", "labels"):
        assert torch.equal(item[key], EXPECTED[f"item{index}.{key}"][0]), key
    assert torch.equal(item["image_grid_thw"], EXPECTED[f"item{index}.image_grid_thw"])
    assert torch.equal(item["is_pad"], EXPECTED[f"item{index}.is_pad"])
    for key in ("state", "action"):
        assert torch.allclose(item[key], EXPECTED[f"item{index}.{key}"], atol=1e-6), key
    expected = EXPECTED[f"item{index}.pixel_values_sum"]
    assert abs(item["pixel_values"].double().sum() - expected) <= 5e-4 * abs(expected) + 50


def test_pixel_values(processor):
    difference = dataset(processor)[5]["pixel_values"] - EXPECTED["item5.pixel_values"]
    assert difference.abs().mean() <= 0.02


@pytest.mark.parametrize("index", [3, 12, 22])
def test_delta_control(processor, index):
    item = dataset(processor, delta_control=True)[index]
    assert torch.allclose(item["action"], EXPECTED[f"delta{index}.action"], atol=1e-6)
    assert torch.equal(item["is_pad"], EXPECTED[f"delta{index}.is_pad"])


def test_without_reasoning_and_with_small_wrist_images(processor):
    item = dataset(processor, reasoning=False)[5]
    for key in ("input_ids", "labels"):
        assert torch.equal(item[key], EXPECTED[f"noreason5.{key}"][0])
    item = dataset(processor, wrist=(160, 112))[5]
    assert torch.equal(item["input_ids"], EXPECTED["wrist5.input_ids"][0])
    assert torch.equal(item["image_grid_thw"], EXPECTED["wrist5.image_grid_thw"])
    expected = EXPECTED["wrist5.pixel_values_sum"]
    assert abs(item["pixel_values"].double().sum() - expected) <= 2e-3 * abs(expected) + 50


@pytest.mark.parametrize("t", [0, 4])
def test_compressed_episode(t):
    item = dataset(paths=[str(GOLDEN / "episodes/compressed_3.hdf5")])[t]
    difference = item["images"].permute(0, 2, 3, 1).float() - EXPECTED[f"compressed.images{t}"].float()
    assert difference.abs().mean() <= 1.0


def test_raw_item_and_negative_index():
    data = dataset()
    item = data[-1]
    assert item["images"].shape == (3, 3, 240, 320) and item["images"].dtype == torch.uint8
    assert item["raw_lang"] == "Insert the peg into the socket."
    assert item["reasoning"] == "Move to the cube. Lift it. Done."  # one `reasoning` serves every frame
    assert torch.equal(item["state"], data[len(data) - 1]["state"])
    with pytest.raises(IndexError):
        data[len(data)]


@pytest.mark.parametrize("sim, first", [(True, 5), (False, 4)])
def test_chunk_start_padding_and_normalisation(tmp_path, sim, first):
    path = str(write_episode(tmp_path / "e.hdf5", 12, sim=sim))
    stats = get_norm_stats([path])
    item = EpisodicDataset([path], CAMERAS, stats, 20, image_size_stable=(64, 48))[5]
    with h5py.File(path) as file:
        recorded = file["action"][first:]
    assert item["is_pad"].tolist() == [False] * len(recorded) + [True] * (20 - len(recorded))
    actions = unnormalize_action(item["action"].numpy(), stats)
    assert np.allclose(actions[: len(recorded)], recorded, atol=1e-5)
    assert np.allclose(actions[len(recorded) :], 0, atol=1e-5)  # padding is zero before it is normalised


def test_normalisation_round_trips(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, (5, 14)).astype(np.float32)
    assert np.allclose(unnormalize_action(normalize_action(rows, STATS), STATS), rows, atol=1e-5)
    assert np.allclose(unnormalize_state(normalize_state(rows, STATS), STATS), rows, atol=1e-5)
    save_stats(STATS, tmp_path)
    loaded = load_stats(tmp_path)
    pickled = pickle.loads((tmp_path / "dataset_stats.pkl").read_bytes())  # as the reference's evaluation reads it
    for key, value in STATS.items():
        assert np.array_equal(loaded[key], value) and np.array_equal(pickled[key], value)


def test_a_still_joint_does_not_blow_up(tmp_path):
    path = write_episode(tmp_path / "e.hdf5")
    with h5py.File(path, "r+") as file:
        file["action"][:, 3] = 0.5
        file["observations/qpos"][:, 3] = 0.5
    stats = get_norm_stats([str(path)])
    assert stats["qpos_std"][3] == np.float32(0.01)
    item = EpisodicDataset([str(path)], CAMERAS, stats, 4, image_size_stable=(64, 48))[0]
    assert abs(item["action"][:, 3]).max() < 1.01 and item["state"].isfinite().all()


def test_collator_pads_left_and_the_model_takes_the_batch(processor, model):
    data = dataset(processor, image_size_stable=(112, 84), wrist=(84, 112))
    items = [data[2], data[15], data[25]]
    pad = processor.tokenizer.pad_token_id
    batch = Qwen2VLADataCollatorForSupervisedDataset(pad_token_id=pad)(items)
    expected = golden("batch.safetensors")
    for key in ("input_ids", "labels", "image_grid_thw"):
        assert torch.equal(batch[key], expected[key]), key
    for key in ("attention_mask", "is_pad"):
        assert torch.equal(batch[key].bool(), expected[key].bool()), key
    assert torch.allclose(batch["states"], expected["states"], atol=1e-6)
    assert torch.allclose(batch["actions"], expected["actions"], atol=1e-6)
    assert (to_patches(batch["images"]) - expected["pixel_values"]).abs().mean() <= 0.02
    out = model(**batch)
    assert out.loss.isfinite() and out.logits.shape[1] == batch["logits_to_keep"] - 1


def test_acting_needs_no_action(processor):
    raw = dataset()[5]
    process = Qwen2VLAProcess(processor, CAMERAS)
    inputs = process({key: raw[key] for key in ("images", "state", "raw_lang")})
    trained_on = process(raw)
    prompt = len(inputs["input_ids"])
    assert "labels" not in inputs and torch.equal(inputs["input_ids"], trained_on["input_ids"][:prompt])
    assert (trained_on["labels"][:prompt] == -100).all() and (trained_on["labels"][prompt:] != -100).all()


def test_an_instruction_must_not_hold_an_image_token(processor):
    item = dataset()[0] | {"raw_lang": "see <|image_pad|>"}
    with pytest.raises(ValueError, match="4 image placeholders for 3 cameras"):
        Qwen2VLAProcess(processor, CAMERAS)(item)


def test_workers_and_pickling_open_their_own_files(processor):
    data = dataset(processor)
    first = data[0]
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, sampler=[0, 14, 25])
    items = list(loader)
    assert torch.equal(items[0]["pixel_values"], first["pixel_values"])
    assert torch.equal(pickle.loads(pickle.dumps(data))[14]["action"], items[1]["action"])


def test_few_files_stay_open(tmp_path):
    paths = [str(write_episode(tmp_path / f"{i}.hdf5", 2, seed=i)) for i in range(5)]
    data = EpisodicDataset(paths, CAMERAS, get_norm_stats(paths), 2, image_size_stable=(64, 48))
    data.episodes.max_open = 2
    items = [data[i] for i in (0, 2, 4, 6, 8, 0)]
    assert len(data.episodes.files) == 2 and torch.equal(items[0]["images"], items[5]["images"])


# ---- TASK_CONFIGS -> data ----


def folder_of(tmp_path, name: str, count: int, **options) -> str:
    for i in range(count):
        write_episode(tmp_path / name / f"episode_{i}.hdf5", 4, seed=i, **options)
    return str(tmp_path / name)


def test_find_all_hdf5_skips_what_the_reference_skips(tmp_path):
    for name in ("b.hdf5", "sub/a.hdf5", "features_0.hdf5", "pointcloud/c.hdf5", "mirror_d.hdf5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()

    def names(**options):
        return [path.removeprefix(f"{tmp_path}/") for path in find_all_hdf5(tmp_path, **options)]

    assert names() == ["b.hdf5", "mirror_d.hdf5", "sub/a.hdf5"]
    assert names(skip_mirrored_data=True) == ["b.hdf5", "sub/a.hdf5"]


def test_split_is_drawn_on_the_first_folder(tmp_path):
    first, second = folder_of(tmp_path, "first", 4), folder_of(tmp_path, "second", 3)
    options = {"train_ratio": 0.5, "image_size_stable": (64, 48)}
    train, validation, stats, plan = load_data([first, second], None, CAMERAS, 4, **options)
    assert len(validation.episode_paths) == 2 and all(path.startswith(first) for path in validation.episode_paths)
    assert not set(validation.episode_paths) & set(train.episode_paths)
    assert plan.episode_sources == [0, 0, 1, 1, 1] and plan.episode_lengths == [4] * 5
    assert train.augment and not validation.augment and validation.center_crop
    every = find_all_hdf5(first) + find_all_hdf5(second)
    assert np.allclose(stats["action_mean"], get_norm_stats(every)["action_mean"])
    again = load_data([first, second], None, CAMERAS, 4, **options)
    assert again[1].episode_paths == validation.episode_paths


def test_name_filter_stats_dir_and_train_ratio(tmp_path):
    first, other = folder_of(tmp_path, "first", 4), folder_of(tmp_path, "other", 2, instruction="Fold.")
    train, validation, stats, _ = load_data(
        first, lambda path: not path.endswith("_0.hdf5"), CAMERAS, 4, stats_dir=other, train_ratio=1.0
    )
    assert len(train.episode_paths) == 3 and validation is None
    assert np.allclose(stats["action_max"], get_norm_stats(find_all_hdf5(other))["action_max"])
    item = train[0]
    assert item["raw_lang"].startswith("Transfer")  # the filter moves no index


def test_a_link_to_a_folder_above_counts_nothing_twice(tmp_path):
    folder = folder_of(tmp_path, "set", 2)
    (tmp_path / "set" / "latest").symlink_to(tmp_path / "set")
    assert len(find_all_hdf5(folder)) == 2
    (tmp_path / "elsewhere").symlink_to(tmp_path / "set")
    assert len(find_all_hdf5(tmp_path / "elsewhere")) == 2
