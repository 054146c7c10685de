"""The doctor finds each kind of fault where it is, and nothing in sound recordings."""

import cv2
import h5py
import numpy as np
import pytest

from data_utils import summarize_all
from data_utils.doctor.__main__ import main
from data_utils.doctor.examination import Examination
from data_utils.summary import estimated_tokens

from .helpers import CAMERAS, GOLDEN, write_episode

HIGH, LEFT, RIGHT = (f"observations/images/{camera}" for camera in CAMERAS)
LENGTH = 60


@pytest.fixture
def folder(tmp_path):
    """Six sound episodes, two of them with JPEG frames."""
    for i in range(6):
        write_episode(tmp_path / f"episode_{i}.hdf5", LENGTH, seed=i, jpeg=i % 3 == 2)
    return tmp_path


def change(path, name, value):
    """Replaces a dataset by `value(old)`."""
    with h5py.File(path, "r+") as file:
        old = file[name].asstr()[()] if file[name].dtype.kind == "O" else file[name][()]
        del file[name]
        file[name] = value(old)


def poke(path, name, index, value):
    with h5py.File(path, "r+") as file:
        file[name][index] = value


def findings(folder, **options):
    paths = sorted(map(str, folder.glob("*.hdf5")))
    return Examination(paths, 50, **options).findings()


def one(folder, **options):
    """The only finding, as (kind, file, where, is_error)."""
    found = findings(folder, **options)
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0].kind, found[0].path, found[0].where, found[0].is_error


def fault(folder, kind, where, name="episode_1.hdf5", is_error=False):
    return kind, str(folder / name) if name else str(folder), where, is_error


def smooth(seed, length=LENGTH, dim=14):
    steps = np.linspace(0, 6, length)[:, None]
    return np.sin(steps + np.random.default_rng(seed).normal(size=dim)).astype(np.float32)


@pytest.mark.parametrize("length, options", [(50, {}), (60, {"jpeg": True}), (120, {"reasonings": False})])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_sound_episodes_give_no_finding(tmp_path, capsys, count, length, options):
    for i in range(count):
        write_episode(tmp_path / f"{i}.hdf5", length, seed=i, **options)
    assert main([str(tmp_path), "--strict"]) == 0
    assert capsys.readouterr().out == f"{count} episodes, {count * length} frames, 0 errors, 0 warnings\n"


def test_golden_episodes_are_only_short(capsys):
    assert main([str(GOLDEN / "episodes"), "--chunk_size", "6", "--strict"]) == 0
    assert main([str(GOLDEN / "episodes")]) == 0
    assert capsys.readouterr().out.count("warning [short]") == 1


@pytest.mark.parametrize("keep", [0, 3000])
def test_truncated_file(folder, keep):
    path = folder / "episode_1.hdf5"
    path.write_bytes(path.read_bytes()[:keep])
    assert one(folder) == fault(folder, "unreadable", "", is_error=True)


@pytest.mark.parametrize(
    "name, value, kind, where",
    [
        ("observations/qpos", lambda a: a[:-9], "layout", "observations/qpos"),
        ("action", lambda a: a.astype(int), "layout", "action"),
        ("action", lambda a: a[:, :7], "layout", "action"),
        ("observations/qpos", lambda a: a[:, 0], "layout", "observations/qpos"),
        (HIGH, lambda a: a[:-20], "cameras", HIGH),
        (HIGH, lambda a: a.astype(np.float32), "cameras", HIGH),
        (LEFT, lambda a: a[..., 0], "cameras", LEFT),
        ("language_raw", lambda a: np.ones(1), "texts", "language_raw"),
        ("substep_reasonings", lambda a: a[:9].tolist(), "texts", "substep_reasonings"),
    ],
)
def test_wrong_layout(folder, name, value, kind, where):
    change(folder / "episode_1.hdf5", name, value)
    assert one(folder) == fault(folder, kind, where, is_error=True)


def test_missing_camera_with_and_without_a_task(folder):
    with h5py.File(folder / "episode_1.hdf5", "r+") as file:
        del file[HIGH]
    assert one(folder) == one(folder, camera_names=CAMERAS) == fault(folder, "cameras", HIGH, is_error=True)
    assert {finding.path for finding in findings(folder, camera_names=["nose"])} == {
        str(folder / f"episode_{i}.hdf5") for i in range(6)
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_number_that_is_not_finite(folder, value):
    poke(folder / "episode_1.hdf5", "action", (7, 3), value)
    assert one(folder) == fault(folder, "numbers", "action, frame 7, dimension 3", is_error=True)


def test_every_fault_of_a_file_is_found(folder):
    path = folder / "episode_1.hdf5"
    poke(path, "action", (7, 3), np.nan)
    poke(path, "observations/qpos", (8, 4), np.inf)
    with h5py.File(path, "r+") as file:
        del file[HIGH]
        file[LEFT][5] = 0
    places = {(finding.kind, finding.where) for finding in findings(folder)}
    assert places == {
        ("numbers", "action, frame 7, dimension 3"),
        ("numbers", "observations/qpos, frame 8, dimension 4"),
        ("cameras", HIGH),
        ("black", f"{LEFT}, frame 5"),
    }


@pytest.mark.parametrize("noise, found", [(0, "none"), (1e-4, "at the most")])
def test_dimensions_that_hardly_move(folder, noise, found):
    def still(action):
        action[:, [3, 5]] = 0.7 + noise * np.random.default_rng(0).normal(size=(len(action), 2)).clip(-2, 2)
        return action

    for path in folder.glob("*.hdf5"):
        change(path, "action", still)
    assert one(folder) == fault(folder, "range", "action, dimensions 3, 5", None)
    assert found in findings(folder)[0].found


@pytest.mark.parametrize("name", ["action", "observations/qpos"])
@pytest.mark.parametrize("value", [40, -1e4])
def test_outlier(folder, name, value):
    poke(folder / "episode_1.hdf5", name, (17, 4), value)
    assert one(folder) == fault(folder, "outlier", f"{name}, frame 17, dimension 4")


def test_episode_in_other_units(tmp_path):
    for i in range(6):
        path = write_episode(tmp_path / f"episode_{i}.hdf5", LENGTH, cameras=[])
        motion = smooth(i) * (180 / np.pi if i == 1 else 1)
        poke(path, "action", (), motion)
        poke(path, "observations/qpos", (), motion + 1e-3)
    found = findings(tmp_path)
    assert [(finding.kind, finding.path) for finding in found] == [("outlier", str(tmp_path / "episode_1.hdf5"))] * 2
    assert [finding.where.split(",")[0] for finding in found] == ["action", "observations/qpos"]


def test_jump(folder):
    for i, path in enumerate(sorted(folder.glob("*.hdf5"))):
        change(path, "action", lambda _, i=i: 0.3 * smooth(i, 300)[:LENGTH])
        change(path, "observations/qpos", lambda old, path=path: h5py.File(path)["action"][()] + 0.01)
    change(folder / "episode_1.hdf5", "action", lambda old: old + np.where(np.arange(LENGTH) > 29, 0.7, 0)[:, None])
    found = findings(folder)
    assert [(finding.kind, finding.path) for finding in found] == [("jump", str(folder / "episode_1.hdf5"))]
    assert "action, frame 30, dimension" in found[0].where and "13 more dimensions" in found[0].found


def test_a_gripper_that_opens_and_closes_is_no_jump(folder):
    for i, path in enumerate(sorted(folder.glob("*.hdf5"))):
        gripper = np.where((np.arange(LENGTH) > 20 + i) & (np.arange(LENGTH) < 40) & (i < 2), 1.0, 0.0)
        for name in ("action", "observations/qpos"):
            poke(path, name, (slice(None), 6), gripper)
    assert not findings(folder)


def recording(tmp_path, shift, sim, noise=1e-4):
    """Episodes whose states follow the actions by `shift` frames."""
    for i in range(4):
        path = write_episode(tmp_path / f"episode_{i}.hdf5", LENGTH, cameras=[], sim=sim)
        motion = smooth(i, LENGTH + 40) + noise * np.random.default_rng(i).normal(size=(LENGTH + 40, 14))
        change(path, "action", lambda old, motion=motion: motion[20 : 20 + LENGTH])
        change(path, "observations/qpos", lambda old, motion=motion: motion[20 - shift : 20 - shift + LENGTH] + 0.05)
    return tmp_path


@pytest.mark.parametrize("shift, sim", [(1, True), (3, True), (2, False), (5, False), (0, True)])
def test_states_that_follow_as_they_should(tmp_path, shift, sim):
    assert not findings(recording(tmp_path, shift, sim))
    assert {s.lag for s in summarize_all([str(tmp_path / "episode_0.hdf5")]).values()} == {shift}


@pytest.mark.parametrize("shift, sim", [(-2, True), (1, False), (0, False)])
def test_lag_that_contradicts_sim(tmp_path, shift, sim):
    assert one(recording(tmp_path, shift, sim)) == fault(tmp_path, "lag", "action", None)
    assert f"{shift} frames in 4 of 4 episodes" in findings(tmp_path)[0].found


def test_the_one_recording_without_sim_is_found(tmp_path):
    recording(tmp_path, 1, True)
    with h5py.File(tmp_path / "episode_1.hdf5", "r+") as file:
        del file.attrs["sim"]
    assert one(tmp_path) == fault(tmp_path, "lag", "action")
    assert main([str(tmp_path), "--strict", "--fix", "--set_sim", "true"]) == 0


def test_actions_that_copy_the_states(folder):
    for path in folder.glob("*.hdf5"):
        change(path, "action", lambda old, path=path: h5py.File(path)["observations/qpos"][()])
    assert one(folder) == fault(folder, "lag", "action", None)


@pytest.mark.parametrize("name, frames", [("episode_1.hdf5", range(10, 30)), ("episode_2.hdf5", range(10, 30))])
def test_repeated_frames(folder, name, frames):
    with h5py.File(folder / name, "r+") as file:
        for t in frames:
            file[LEFT][t] = file[LEFT][9]
    assert one(folder) == fault(folder, "duplicates", f"{LEFT}, frame 10", name)
    assert f"{len(frames)} of 59 times, at most 20 in a row" in findings(folder)[0].found


def test_repeated_frames_of_a_resting_robot_are_fine(folder):
    with h5py.File(folder / "episode_1.hdf5", "r+") as file:
        for name in ("action", "observations/qpos"):
            motion = file[name][()]
            file[name][()] = np.concatenate([motion[:10], np.repeat(motion[9:10], 20, axis=0), motion[10:40]])
        file[LEFT][10:30] = file[LEFT][9]
    assert not findings(folder)


def test_black_frames(folder):
    with h5py.File(folder / "episode_1.hdf5", "r+") as file:
        file[RIGHT][7] = file[RIGHT][9] = 2
    assert one(folder) == fault(folder, "black", f"{RIGHT}, frame 7")
    assert findings(folder)[0].found == "a black one (2 of 60 frames)"


@pytest.mark.parametrize("frame", [0, 31, 59])
def test_frame_that_is_no_jpeg(folder, frame):
    poke(folder / "episode_2.hdf5", HIGH, frame, 7)
    assert one(folder) == fault(folder, "frames", f"{HIGH}, frame {frame}", "episode_2.hdf5", is_error=True)


def test_truncated_jpeg(folder):
    with h5py.File(folder / "episode_2.hdf5", "r+") as file:
        end = int(0.8 * file["compress_len"][0, 31])
        file[HIGH][31, end:] = 0
    assert one(folder) == fault(folder, "frames", f"{HIGH}, frame 31", "episode_2.hdf5")


def test_jpeg_of_another_size(folder):
    with h5py.File(folder / "episode_2.hdf5", "r+") as file:
        data = cv2.imencode(".jpg", np.full((24, 32, 3), 99, np.uint8))[1].reshape(-1)[: file[HIGH].shape[1]]
        file[HIGH][31] = np.pad(data, (0, file[HIGH].shape[1] - len(data)))
    assert one(folder) == fault(folder, "frames", f"{HIGH}, frame 31", "episode_2.hdf5")
    assert "32 x 24 pixels unlike the 64 x 48 before" in findings(folder)[0].found


def test_of_many_raw_frames_some_are_looked_at(folder, monkeypatch):
    monkeypatch.setattr("data_utils.doctor.images.ALL_RAW_FRAMES", 0)
    monkeypatch.setattr("data_utils.doctor.images.RAW_PAIRS", 10)
    assert not findings(folder)
    with h5py.File(folder / "episode_1.hdf5", "r+") as file:
        file[LEFT][20:40] = file[LEFT][20]
        file[RIGHT][20:40] = 0
    found = findings(folder)
    assert [(finding.kind, finding.where.split(",")[0]) for finding in found] == [
        ("black", RIGHT),
        ("duplicates", LEFT),
    ]
    assert "frames looked at" in found[0].found


@pytest.mark.parametrize("swapped", ["episode_0.hdf5", "episode_2.hdf5", "episode_4.hdf5"])
def test_exchanged_cameras(folder, swapped):
    views = {CAMERAS[1]: (200, 60), CAMERAS[2]: (60, 200)}  # brightness of the halves
    for path in folder.glob("*.hdf5"):
        names = dict(zip(views, reversed(views))) if path.name == swapped else dict(zip(views, views))
        with h5py.File(path, "r+") as file:
            for camera, (left, right) in ((camera, views[names[camera]]) for camera in views):
                images = np.random.default_rng(1).integers(0, 40, (LENGTH, 48, 64, 3), dtype=np.uint8)
                images[:, :, :32] += left
                images[:, :, 32:] += right
                del file[f"observations/images/{camera}"]
                if file.attrs.get("compress"):
                    encoded = [cv2.imencode(".jpg", image)[1].reshape(-1) for image in images]
                    images = np.zeros((LENGTH, max(map(len, encoded))), np.uint8)
                    for row, data in zip(images, encoded):
                        row[: len(data)] = data
                file[f"observations/images/{camera}"] = images
    assert one(folder) == fault(folder, "camera order", "cam_left_wrist and cam_right_wrist", swapped)


def test_short_episodes(folder):
    write_episode(folder / "episode_1.hdf5", 49, seed=1)
    assert one(folder) == fault(folder, "short", "")
    for i in range(4):
        write_episode(folder / f"episode_{i}.hdf5", 49, seed=i)
    assert one(folder) == fault(folder, "short", "", None)


def test_other_image_shape(folder):
    write_episode(folder / "episode_1.hdf5", LENGTH, seed=1, size=(64, 36))
    found = findings(folder)
    assert {finding.where for finding in found} == {HIGH, LEFT, RIGHT}
    assert {(finding.kind, finding.path) for finding in found} == {("mixed", str(folder / "episode_1.hdf5"))}
    write_episode(folder / "episode_1.hdf5", LENGTH, seed=1, size=(128, 96))  # only larger
    assert not findings(folder)


def test_texts(folder):
    path = folder / "episode_1.hdf5"
    change(path, "language_raw", lambda old: ["  "])
    assert one(folder) == fault(folder, "texts", "instruction")
    write_episode(path, LENGTH, seed=1)
    change(path, "substep_reasonings", lambda old: [*old[:9], "", *old[10:]])
    assert one(folder) == fault(folder, "texts", "reasoning, frame 9")
    assert not findings(folder, use_reasoning=False)
    change(path, "substep_reasonings", lambda old: [*old[:9], "Go on. " * 200, *old[10:]])
    assert one(folder) == fault(folder, "texts", "reasoning, frame 9")
    write_episode(path, LENGTH, seed=1, reasonings=False)
    assert one(folder) == fault(folder, "texts", "substep_reasonings", is_error=True)


def test_tokens_are_estimated():
    assert 15 <= estimated_tokens("Lift the red cube with the right arm and hand it over to the left arm.") <= 22
    assert estimated_tokens("把红色的方块放进盒子") == 7
