"""Frames come out of every layout an HDF5 file may have, and JPEG is decoded no further than needed."""

import os

import cv2
import h5py
import numpy as np
import pytest

from data_utils import DatasetError, EpisodicDataset, get_norm_stats, load_data, open_episode
from data_utils.hdf5 import jpeg_size

from .helpers import CAMERAS, write_episode

IMAGE = "observations/images/cam_high"


@pytest.mark.parametrize(
    "layout, in_one_piece",
    [
        ({}, True),  # contiguous, as h5py writes without more words
        ({"chunks": (1, 48, 64, 3)}, True),  # as ACT records
        ({"chunks": (1, 24, 64, 3)}, False),
        ({"chunks": (4, 48, 64, 3)}, False),
        ({"chunks": (1, 48, 64, 3), "compression": "gzip"}, False),
        ({"chunks": (1, 48, 64, 3), "shuffle": True}, False),
        ({"chunks": (1, 48, 64, 3), "fletcher32": True}, False),
    ],
)
@pytest.mark.parametrize("userblock", [0, 512])
def test_every_layout(tmp_path, layout, in_one_piece, userblock):
    path = write_episode(tmp_path / "e.hdf5")
    with h5py.File(path) as old, h5py.File(tmp_path / "f.hdf5", "w", userblock_size=userblock) as new:
        images = old[IMAGE][()]
        for name in ("action", "observations", "language_raw"):
            old.copy(name, new)
        del new[IMAGE]
        new.create_dataset(IMAGE, data=images, **layout)
    episode = open_episode(tmp_path / "f.hdf5")
    for t in (0, 11, 5):
        assert np.array_equal(episode.frame("cam_high", t), images[t])
    assert episode._in_one_piece["cam_high"] == (in_one_piece and not userblock)


def test_frames_never_written_are_black(tmp_path):
    path = write_episode(tmp_path / "e.hdf5")
    with h5py.File(path, "r+") as file:
        del file[IMAGE]
        file.create_dataset(IMAGE, (12, 48, 64, 3), np.uint8, chunks=(1, 48, 64, 3))[3] = 9
    episode = open_episode(path)
    assert (episode.frame("cam_high", 3) == 9).all() and (episode.frame("cam_high", 4) == 0).all()


def test_a_file_that_shrank_is_named(tmp_path):
    path = write_episode(tmp_path / "e.hdf5")
    episode = open_episode(path)
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match=r"e\.hdf5: .*/cam_right_wrist, frame 11: expected 9216 bytes"):
        episode.frame("cam_right_wrist", 11)


@pytest.mark.parametrize("sampling", [cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444])
@pytest.mark.parametrize("progressive", [0, 1])
def test_jpeg_size(sampling, progressive):
    flags = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
    data = cv2.imencode(".jpg", np.zeros((123, 456, 3), np.uint8), flags)[1].reshape(-1)
    assert jpeg_size(data) == (456, 123)
    assert jpeg_size(data[:10]) == jpeg_size(np.zeros(100, np.uint8)) == (0, 0)


def test_jpeg_is_decoded_no_further_than_needed(tmp_path):
    path = str(write_episode(tmp_path / "e.hdf5", size=(640, 480), jpeg=True))
    episode = open_episode(path)
    full = episode.frame("cam_high", 2)
    shapes = {size: episode.frame("cam_high", 2, size).shape[1::-1] for size in ((320, 240), (321, 240), (80, 60))}
    assert full.shape == (480, 640, 3)
    assert shapes == {(320, 240): (320, 240), (321, 240): (640, 480), (80, 60): (80, 60)}
    item = EpisodicDataset([path], CAMERAS, get_norm_stats([path]), 4)[2]["images"][0].permute(1, 2, 0).numpy()
    assert np.abs(item.astype(int) - cv2.resize(full, (320, 240))).mean() < 1


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("action", None, "action: expected a dataset, found none"),
        ("observations/qpos", None, "observations/qpos: expected a dataset, found none"),
        ("observations/qpos", h5py.Empty("f"), "observations/qpos: expected a dataset, found none"),
        ("language_raw", None, "language_raw: expected a dataset, found none"),
        ("language_raw", np.zeros(0, "S3"), "language_raw: expected text, found"),
        ("language_raw", [b"\xff"], "language_raw: expected UTF-8 text, found"),
        ("action", ["up"] * 12, "action: expected shape"),
    ],
)
def test_opening_a_file_of_another_layout(tmp_path, name, value, expected):
    path = write_episode(tmp_path / "e.hdf5")
    with h5py.File(path, "r+") as file:
        del file[name]
        if value is not None:
            file[name] = value
    with pytest.raises(DatasetError, match=f"e.hdf5: {expected}"):
        open_episode(path)
    with pytest.raises(DatasetError, match="nothing.hdf5: expected an episode, found no such file"):
        open_episode(tmp_path / "nothing.hdf5")


def test_a_camera_that_is_a_link_to_nowhere(tmp_path):
    path = write_episode(tmp_path / "e.hdf5")
    with h5py.File(path, "r+") as file:
        file["observations/images/cam_low"] = h5py.ExternalLink("gone.hdf5", "/images")
    assert open_episode(path).camera_names == CAMERAS
    assert len(load_data(str(tmp_path), None, CAMERAS, 8)[0]) == 12
    with pytest.raises(DatasetError, match="cam_low: expected a dataset, found a link that leads nowhere"):
        load_data(str(tmp_path), None, ["cam_low"], 8)


@pytest.mark.parametrize("count", [1, 12, 5])
def test_as_many_reasonings_as_frames_or_one(tmp_path, count):
    path = write_episode(tmp_path / "e.hdf5", reasonings=False)
    with h5py.File(path, "r+") as file:
        file["reasoning"] = [f"step {t}" for t in range(count)]
    if count == 5:
        with pytest.raises(DatasetError, match="reasoning: expected 12 texts, one per frame, or one, found 5"):
            load_data(str(tmp_path), None, CAMERAS, 8)
    else:
        assert load_data(str(tmp_path), None, CAMERAS, 8)[0][11]["reasoning"] == f"step {count - 1}"
