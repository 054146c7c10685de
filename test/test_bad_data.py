"""Every broken dataset gives one message that names file, dataset, what was expected and what was found."""

import h5py
import numpy as np
import pytest

from data_utils import (
    DatasetError,
    EpisodicDataset,
    check_episodes,
    get_norm_stats,
    load_data,
    open_episode,
    summarize_all,
)

from .helpers import CAMERAS, write_episode


def delete(name):
    def change(file):
        del file[name]

    return change


def replace(name, value):
    def change(file):
        old = file[name][()]
        del file[name]
        file[name] = value(old)

    return change


def poke(name, index, value):
    def change(file):
        file[name][index] = value

    return change


def attribute(name, value):
    def change(file):
        file.attrs[name] = value

    return change


IMAGE = "observations/images/cam_high"


@pytest.mark.parametrize(
    "change, expected",
    [
        (delete("action"), ["action: expected a dataset, found none", "observations"]),
        (delete("observations/qpos"), ["observations/qpos: expected a dataset"]),
        (delete("language_raw"), ["language_raw: expected a dataset"]),
        (replace("language_raw", lambda _: np.ones(1)), ["language_raw: expected text", "float64"]),
        (replace("language_raw", lambda _: np.bytes_(b"\xff\xfe")), ["language_raw: expected UTF-8 text"]),
        (delete("substep_reasonings"), ["substep_reasonings: expected one text per frame", "--use_reasoning False"]),
        (delete(IMAGE), [IMAGE, "found only cam_left_wrist, cam_right_wrist"]),
        (delete("observations/images"), [IMAGE, "found only no cameras"]),
        (replace("action", lambda a: a[:, 0]), ["action", "shape (N, D)", "(12,)"]),
        (replace("action", lambda a: a.astype(int)), ["action", "float32 or float64", "int64"]),
        (replace("action", lambda a: a[:0]), ["action", "(0, 14)"]),
        (replace("observations/qpos", lambda a: a[:-1]), ["observations/qpos", "expected 12 frames", "found 11"]),
        (replace("substep_reasonings", lambda a: a[:5]), ["substep_reasonings", "expected 12 texts", "found 5"]),
        (replace(IMAGE, lambda a: a[:-2]), [IMAGE, "expected 12 frames", "found 10"]),
        (replace(IMAGE, lambda a: a.astype(np.float32)), [IMAGE, "expected uint8, found float32"]),
        (replace(IMAGE, lambda a: a[..., 0]), [IMAGE, "shape (N, height, width, 3)", "(12, 48, 64)"]),
        (replace(IMAGE, lambda a: a.reshape(12, -1)), [IMAGE, "the attribute `compress`", "no such attribute"]),
        (attribute("compress", True), [IMAGE, "shape (N, bytes)", "(12, 48, 64, 3)"]),
        (poke("action", (7, 3), np.nan), ["action, frame 7, dimension 3", "a finite number", "nan"]),
        (poke("observations/qpos", (2, 0), np.inf), ["observations/qpos, frame 2, dimension 0", "inf"]),
    ],
)
def test_broken_episode(tmp_path, change, expected):
    good, bad = write_episode(tmp_path / "a.hdf5"), write_episode(tmp_path / "b.hdf5")
    with h5py.File(bad, "r+") as file:
        change(file)
    with pytest.raises(DatasetError) as error:
        load_data(str(tmp_path), None, CAMERAS, 4)
    assert str(bad) in str(error.value) and str(good) not in str(error.value)
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_file(tmp_path, keep):
    path = write_episode(tmp_path / "a.hdf5")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else keep])
    with pytest.raises(DatasetError, match=r"a\.hdf5: expected a readable HDF5 file"):
        load_data(str(tmp_path), None, CAMERAS, 4)


def test_all_broken_episodes_are_reported_at_once(tmp_path):
    paths = [str(write_episode(tmp_path / f"{i}.hdf5")) for i in range(4)]
    for path in paths[1:3]:
        with h5py.File(path, "r+") as file:
            del file["action"]
    with pytest.raises(DatasetError) as error:
        check_episodes(summarize_all(paths), CAMERAS)
    assert str(error.value).count("\n") == 1 and all(path in str(error.value) for path in paths[1:3])


def test_dimensions_must_agree(tmp_path):
    write_episode(tmp_path / "a.hdf5", dim=14)
    with pytest.raises(DatasetError, match=r"expected 7 columns \(--action_dim\), found 14"):
        load_data(str(tmp_path), None, CAMERAS, 4, action_dim=7)
    with pytest.raises(DatasetError, match=r"expected 7 columns \(--state_dim\), found 14"):
        load_data(str(tmp_path), None, CAMERAS, 4, state_dim=7)
    write_episode(tmp_path / "b.hdf5", dim=7)
    with pytest.raises(DatasetError, match=r"b\.hdf5: action: expected 14 columns"):
        load_data(str(tmp_path), None, CAMERAS, 4)


def test_missing_empty_and_filtered_folders(tmp_path):
    with pytest.raises(DatasetError, match="nowhere: expected a folder"):
        load_data(str(tmp_path / "nowhere"), None, CAMERAS, 4)
    with pytest.raises(DatasetError, match="expected .*episodes or a LeRobot dataset .*, found none"):
        load_data(str(tmp_path), None, CAMERAS, 4)
    write_episode(tmp_path / "a.hdf5")
    with pytest.raises(DatasetError, match="name_filter leaves none of its 1 episodes"):
        load_data(str(tmp_path), lambda path: False, CAMERAS, 4)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, 2, 3]])
def test_sample_weights_must_fit(tmp_path, weights):
    for name in ("a", "b"):
        write_episode(tmp_path / name / "e.hdf5")
    with pytest.raises(DatasetError, match="sample_weights: expected 2 non-negative numbers"):
        load_data([str(tmp_path / "a"), str(tmp_path / "b")], None, CAMERAS, 4, sample_weights=weights)


def test_undecodable_jpeg_names_its_frame(tmp_path):
    path = write_episode(tmp_path / "a.hdf5", jpeg=True)
    with h5py.File(path, "r+") as file:
        file[IMAGE][3] = 0
    data = EpisodicDataset([str(path)], CAMERAS, get_norm_stats([str(path)]), 4, image_size_stable=(64, 48))
    assert data[2]["images"].any()
    with pytest.raises(DatasetError, match=r"a\.hdf5: observations/images/cam_high, frame 3: expected JPEG"):
        data[3]


def test_first_and_last_frame_must_be_jpeg(tmp_path):
    path = write_episode(tmp_path / "a.hdf5", jpeg=True)
    with h5py.File(path, "r+") as file:
        file[IMAGE][-1] = 0
    with pytest.raises(
        DatasetError, match=r"cam_high, frame 11: expected JPEG bytes, found bytes that start with \[0, 0\]"
    ):
        load_data(str(tmp_path), None, CAMERAS, 4)


def test_stats_dir_must_have_the_same_dimensions(tmp_path):
    write_episode(tmp_path / "a/e.hdf5")
    write_episode(tmp_path / "b/e.hdf5", dim=7)
    with pytest.raises(DatasetError, match="b/e.hdf5: action: expected 14 columns"):
        load_data(str(tmp_path / "a"), None, CAMERAS, 4, stats_dir=str(tmp_path / "b"))


def test_a_scalar_instruction_is_fine(tmp_path):
    path = write_episode(tmp_path / "a.hdf5")
    with h5py.File(path, "r+") as file:
        del file["language_raw"]
        file["language_raw"] = "Fold the shirt."
    load_data(str(tmp_path), None, CAMERAS, 4)
    assert open_episode(path).instruction(0) == "Fold the shirt."


def test_float64_and_one_reasoning_are_fine(tmp_path):
    path = write_episode(tmp_path / "a.hdf5", reasonings=False)
    with h5py.File(path, "r+") as file:
        file["reasoning"] = ["Pick up the cube."]
        action = file["action"][()].astype(np.float64)
        del file["action"], file.attrs["sim"]
        file["action"] = action
    train, *_ = load_data(str(tmp_path), None, CAMERAS, 4, image_size_stable=(64, 48))
    assert train[0]["reasoning"] == "Pick up the cube." and open_episode(path).sim is False
