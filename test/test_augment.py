"""Augmentation draws what it should, and does to an image what it says."""

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tvf

from data_utils import Augmentation, EpisodicDataset, center_crop, get_norm_stats
from qwen2_vla import Qwen2VLAProcess

from .helpers import CAMERAS, EPISODES, write_episode

NEUTRAL = {"top": 0.5, "left": 0.5, "angle": 0.0, "brightness": 1, "contrast": 1, "saturation": 1, "order": (0, 1, 2)}


def smooth_image() -> np.ndarray:
    y, x = np.mgrid[0:240, 0:320]
    return np.stack([x * 255 / 320, y * 255 / 240, 255 - (x + y) * 255 / 560], axis=-1).astype(np.uint8)


def test_draws_cover_their_ranges():
    rng = np.random.default_rng(0)
    many = [Augmentation.draw(rng) for _ in range(3000)]
    for name, low, high in (
        ("top", 0, 1), ("left", 0, 1), ("angle", -5, 5), ("brightness", 0.7, 1.3), ("contrast", 0.6, 1.4),
        ("saturation", 0.5, 1.5),
    ):  # fmt: skip
        values = np.array([getattr(draw, name) for draw in many])
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 4 * values.std() / len(values) ** 0.5
    orders = [draw.order for draw in many]
    assert len(set(orders)) == 6 and all(400 < orders.count(order) < 600 for order in set(orders))


@pytest.mark.parametrize(
    "change, reference",
    [
        ({"brightness": 1.2}, lambda image: tvf.adjust_brightness(image, 1.2)),
        ({"contrast": 0.7}, lambda image: tvf.adjust_contrast(image, 0.7)),
        ({"saturation": 1.4}, lambda image: tvf.adjust_saturation(image, 1.4)),
    ],
)
def test_colours_as_torchvision(change, reference):
    augmentation = Augmentation(**NEUTRAL | change)
    image = smooth_image()
    step = getattr(augmentation, f"_adjust_{next(iter(change))}")
    expected = reference(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert np.abs(step(image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("top, left, angle", [(0, 0, 0), (0.999, 0.999, 0), (0.3, 0.8, 4.0), (0.5, 0.5, -5.0)])
def test_warp_as_crop_resize_rotate(top, left, angle):
    image = smooth_image()
    warped = Augmentation(**NEUTRAL | {"top": top, "left": left, "angle": angle})._warp(image, (320, 240))
    crop = tvf.crop(torch.from_numpy(image).permute(2, 0, 1), int(top * 13), int(left * 17), 228, 304)
    expected = tvf.rotate(tvf.resize(crop, [240, 320], antialias=True), angle).permute(1, 2, 0).numpy()
    difference = np.abs(warped.astype(int) - expected)
    assert difference.mean() < 1.5
    if angle:  # what rotation brings in is black
        assert (warped[0, 0] == 0).all() or (warped[0, -1] == 0).all()


@pytest.mark.parametrize("size", [(308, 252), (160, 120)])
def test_the_resize_to_the_grid_is_part_of_the_warp(size):
    rng = np.random.default_rng(0)
    image = smooth_image()
    for _ in range(20):
        augmentation = Augmentation.draw(rng)
        expected = cv2.resize(augmentation(image), size)
        assert np.abs(augmentation(image, size).astype(int) - expected).mean() < 1.5


def test_items_on_the_grid_are_the_raw_items_resized(processor):
    stats, draw = get_norm_stats(EPISODES), (0, 0, 7)
    raw = EpisodicDataset(EPISODES, CAMERAS, stats, 4, augment=True)
    on_grid = EpisodicDataset(EPISODES, CAMERAS, stats, 4, augment=True, transform=Qwen2VLAProcess(processor, CAMERAS))
    small = Qwen2VLAProcess(processor, CAMERAS, image_size_wrist=(56, 56))
    assert EpisodicDataset(EPISODES, CAMERAS, stats, 4, augment=True, transform=small).augmented_sizes == [
        (308, 252), (320, 240), (320, 240),  # 56 x 56 is resized in two steps, so that no pixel is skipped
    ]  # fmt: skip
    for image, expected in zip(on_grid[5, draw]["images"], raw[5, draw]["images"]):
        expected = cv2.resize(expected.permute(1, 2, 0).numpy(), (308, 252))
        assert np.abs(image[0].numpy().astype(int) - expected).mean() < 2.5


def test_center_crop_keeps_size_and_centre():
    image = smooth_image()
    cropped = center_crop(image)
    assert cropped.shape == image.shape
    assert np.abs(cropped[120, 160].astype(int) - image[120, 160]).max() <= 1
    assert cropped[0, 0, 0] > image[0, 0, 0]


def test_cameras_share_a_draw_and_items_do_not(tmp_path):
    path = str(write_episode(tmp_path / "e.hdf5"))
    import h5py

    with h5py.File(path, "r+") as file:
        for camera in CAMERAS[1:]:
            file[f"observations/images/{camera}"][...] = file[f"observations/images/{CAMERAS[0]}"][()]
    stats = get_norm_stats([path])
    data = EpisodicDataset([path], CAMERAS, stats, 4, image_size_stable=(64, 48), augment=True)
    torch.manual_seed(0)
    first, second = data[3]["images"], data[3]["images"]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    assert not torch.equal(first, second)
    # with a draw's numbers an item depends on nothing else
    assert torch.equal(data[3, (0, 1, 2)]["images"], data[3, (0, 1, 2)]["images"])
    assert not torch.equal(data[3, (0, 1, 2)]["images"], data[3, (0, 1, 3)]["images"])


def test_no_augmentation_without_the_flag():
    data = EpisodicDataset(EPISODES[:1], CAMERAS, get_norm_stats(EPISODES), 4)
    assert torch.equal(data[0]["images"], data[0]["images"])
