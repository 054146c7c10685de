"""`python -m data_utils.convert`: what goes in comes out, in another format, also after an interruption."""

import json
import os
import re
import shutil

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils import DatasetError, UserError, find_episodes, open_episode
from data_utils.convert import (
    compress_hdf5,
    convert_lerobot,
    convert_to_lerobot,
    lerobot_files,
    lerobot_writer,
    truncate_hdf5,
)
from data_utils.convert.__main__ import main
from data_utils.convert.lerobot_stats import ImageStats, joined_stats, number_stats
from data_utils.convert.lerobot_video import choose_encoder, write_video
from data_utils.index import summarize

from .helpers import GOLDEN, write_episode

V30 = GOLDEN / "lerobot" / "lerobot_v30"
CAMERAS = ["cam_high", "cam_left_wrist"]


def colour(episode: int, t: int) -> np.ndarray:
    """A frame that tells which one it is."""
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:] = (60 + 12 * t, 60 + 50 * episode, 220 - 12 * t)
    return frame


def write_coloured(folder, count=3, length=12, **options) -> list:
    """Episodes of 12, 11, 10 … frames whose colours tell episode and frame."""
    paths = []
    for i in range(count):
        path = write_episode(folder / f"episode_{i}.hdf5", length - i, cameras=CAMERAS, seed=i, **options)
        with h5py.File(path, "r+") as file:
            for camera in CAMERAS:
                file[f"observations/images/{camera}"][:] = [colour(i, t) for t in range(length - i)]
        paths.append(path)
    return paths


def check_coloured(source: list, converted: list[str], cameras: list[str] = CAMERAS):
    assert len(source) == len(converted)
    for i, (path, other) in enumerate(zip(source, converted)):
        a, b = open_episode(path), open_episode(other)
        assert np.array_equal(a.action, b.action) and np.array_equal(a.qpos, b.qpos) and a.sim == b.sim
        assert sorted(b.camera_names) == sorted(cameras)
        for t in range(len(a)):
            assert (a.instruction(t), a.reasoning(t)) == (b.instruction(t), b.reasoning(t))
            for camera in cameras:  # neighbours differ by 12
                assert np.abs(b.frame(camera, t).astype(int) - colour(i, t)).max() <= 5
        assert not summarize(other).findings
        a.close(), b.close()


def episodes_in(folder) -> list:
    return list(folder.rglob("*.hdf5"))


def leftovers(folder) -> list:
    return [path for path in folder.rglob("*") if "partial" in path.name or ".staging" in path.parts]


# ---- LeRobot ----


def types(value):
    """The skeleton of JSON: keys, and the types of what they hold."""
    if isinstance(value, dict):
        return {key: types(item) for key, item in value.items()}
    return [types(item) for item in value] if isinstance(value, list) else type(value)


def test_to_lerobot_is_what_lerobot_writes(tmp_path):
    """The fixture, read and written again: the same keys, types and numbers. (Image statistics are of lossy frames.)"""
    convert_to_lerobot(V30, tmp_path)
    ours, theirs = (json.loads((folder / "meta" / "info.json").read_text()) for folder in (tmp_path, V30))
    assert ours == theirs and list(ours) == list(theirs) and list(ours["features"]) == list(theirs["features"])
    for name in ("data/chunk-000/file-000.parquet", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        ours, theirs = pq.ParquetFile(tmp_path / name), pq.ParquetFile(V30 / name)
        assert ours.schema_arrow.equals(theirs.schema_arrow) and ours.num_row_groups == theirs.num_row_groups
        a, b = (file.read().replace_schema_metadata(None) for file in (ours, theirs))
        exact = [column for column in a.column_names if "stats/" not in column and "_timestamp" not in column]
        assert a.select(exact).equals(b.select(exact))
    keys = ("index_columns", "attributes")
    pandas = [
        json.loads(pq.read_schema(folder / "meta/tasks.parquet").metadata[b"pandas"]) for folder in (tmp_path, V30)
    ]
    assert types(pandas[0]) == types(pandas[1]) and [pandas[0][k] for k in keys] == [pandas[1][k] for k in keys]
    ours, theirs = (json.loads((folder / "meta" / "stats.json").read_text()) for folder in (tmp_path, V30))
    assert types(ours) == types(theirs)
    for feature, stats in theirs.items():
        for name in stats.keys() - ({"std", "min", "max"} if "images" in feature else set()):
            assert np.allclose(ours[feature][name], stats[name], atol=0.05 if "images" in feature else 2e-3)


@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_hdf5_to_lerobot_and_back(tmp_path, codec):
    source = write_coloured(tmp_path / "hdf5", sim=False)
    main(["to-lerobot", str(tmp_path / "hdf5"), str(tmp_path / "lerobot"), "--fps", "25", "--codec", codec])
    info = json.loads((tmp_path / "lerobot" / "meta" / "info.json").read_text())
    assert (info["dexvla"], info["fps"], info["total_frames"]) == ({"sim": False}, 25, 33)
    assert len(list(tmp_path.rglob("*.mp4"))) == 2  # all episodes of a camera in one file
    check_coloured(source, find_episodes(tmp_path / "lerobot"))
    convert_lerobot(tmp_path / "lerobot", tmp_path / "back")
    check_coloured(source, find_episodes(tmp_path / "back"))
    main(
        ["lerobot", str(tmp_path / "lerobot"), str(tmp_path / "jpeg"), "--jpeg", "95", "--camera", "cam_high=cam_high"]
    )
    check_coloured(source, find_episodes(tmp_path / "jpeg"), ["cam_high"])
    assert not leftovers(tmp_path)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="needs Linux")
def test_encoding_leaves_priorities_as_they_are(tmp_path):
    """SVT-AV1, run by root, makes real-time threads of its own and of its caller's."""
    for name in choose_encoder("av1"), choose_encoder("h264"):
        write_video(tmp_path / f"{name}.mp4", np.zeros((4, 48, 64, 3), np.uint8), 25, name, "here")
        policies = {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}
        assert policies == {os.SCHED_OTHER}


def test_lerobot_files_of_limited_size(tmp_path, monkeypatch):
    source = write_coloured(tmp_path / "hdf5")
    monkeypatch.setattr(lerobot_files, "CHUNK_SIZE", 2)
    convert_to_lerobot(tmp_path / "hdf5", tmp_path / "out", data_megabytes=0, video_megabytes=0)
    names = sorted(str(path.relative_to(tmp_path / "out/data")) for path in (tmp_path / "out/data").rglob("*.parquet"))
    assert names == ["chunk-000/file-000.parquet", "chunk-000/file-001.parquet", "chunk-001/file-000.parquet"]
    assert len(list(tmp_path.rglob("*.mp4"))) == 6
    check_coloured(source, find_episodes(tmp_path / "out"))


def test_image_statistics_are_those_of_the_pixels():
    frames = np.random.default_rng(0).integers(10, 200, (7, 48, 64, 3), np.uint8)
    images = ImageStats(7)
    assert len(list(images.watch(frames))) == 7
    expected = number_stats(frames.reshape(-1, 3) / 255)
    for name, values in images.result().items():
        assert values == [7] if name == "count" else np.allclose(np.ravel(values), expected[name])


def test_joined_statistics_are_those_of_all_rows():
    rows = np.random.default_rng(0).normal(size=(50, 4))
    joined, whole = joined_stats([number_stats(rows[:13]), number_stats(rows[13:])]), number_stats(rows)
    for name in ("min", "max", "mean", "std", "count"):
        assert np.allclose(joined[name], whole[name])


def test_task_that_changes_is_an_error(tmp_path):
    shutil.copytree(V30, tmp_path / "lerobot")
    path = tmp_path / "lerobot" / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    tasks = table["task_index"].to_numpy().copy()
    tasks[25] = 0
    at = table.column_names.index("task_index")
    pq.write_table(table.set_column(at, "task_index", pa.array(tasks)), path)
    with pytest.raises(
        DatasetError, match=r'episode_000001: expected one task .*"Insert the peg." at frame 0 .*frame 3'
    ):
        convert_lerobot(tmp_path / "lerobot", tmp_path / "out")
    assert [path.name for path in episodes_in(tmp_path)] == ["episode_000000.hdf5"] and not leftovers(tmp_path)


@pytest.mark.parametrize("moment", ["episode", "metadata"])
def test_to_lerobot_killed_and_taken_up(tmp_path, monkeypatch, moment):
    source, out = write_coloured(tmp_path / "hdf5"), tmp_path / "out"

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "episode":
            frames = lerobot_writer.camera_frames
            patch.setattr(
                lerobot_writer, "camera_frames", lambda e, c: (killed if e.path.endswith("_2.hdf5") else frames)(e, c)
            )
        else:
            write = lerobot_files.write_json
            patch.setattr(lerobot_files, "write_json", lambda v, p: (killed if "info" in p.name else write)(v, p))
        convert_to_lerobot(tmp_path / "hdf5", out)
    assert not (out / "meta" / "info.json").exists()
    report = convert_to_lerobot(tmp_path / "hdf5", out)
    assert report.converted == (1 if moment == "episode" else 0) and report.skipped == 3 - report.converted
    check_coloured(source, find_episodes(out))
    convert_to_lerobot(tmp_path / "hdf5", tmp_path / "at_once")
    for name in ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"):
        assert pq.read_table(out / name).equals(pq.read_table(tmp_path / "at_once" / name))
    assert (out / "meta/stats.json").read_text() == (tmp_path / "at_once/meta/stats.json").read_text()
    assert not leftovers(tmp_path)


def test_finished_lerobot_dataset_grows(tmp_path, monkeypatch):
    out, folder = tmp_path / "out", tmp_path / "hdf5"
    write_coloured(folder, count=2)
    convert_to_lerobot(folder, out)
    before = {path: path.read_bytes() for path in out.rglob("file-*")}
    source = write_coloured(folder, count=3)
    monkeypatch.setattr(lerobot_writer, "publish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_to_lerobot(folder, out)
    check_coloured(source[:2], find_episodes(out))  # as it was
    monkeypatch.undo()
    assert convert_to_lerobot(folder, out).skipped == 3
    check_coloured(source, find_episodes(out))
    info = json.loads((out / "meta" / "info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["splits"]) == (3, 33, {"train": "0:3"})
    assert all(path.read_bytes() == data for path, data in before.items())
    stats = json.loads((out / "meta" / "stats.json").read_text())
    assert stats["index"]["max"] == [32] and stats["index"]["count"] == [33]
    assert np.allclose(stats["action"]["mean"], np.concatenate([open_episode(p).action for p in source]).mean(axis=0))


def test_unlike_episodes_do_not_mix(tmp_path):
    write_episode(tmp_path / "in" / "a.hdf5", 3, cameras=CAMERAS)
    write_episode(tmp_path / "in" / "b.hdf5", 3, cameras=CAMERAS, sim=False)
    with pytest.raises(DatasetError, match="b.hdf5: expected sim True as in the dataset's other episodes, found False"):
        convert_to_lerobot(tmp_path / "in", tmp_path / "out")
    write_episode(tmp_path / "in" / "b.hdf5", 3, cameras=CAMERAS)
    write_episode(tmp_path / "in" / "a.hdf5", 3, cameras=CAMERAS, seed=5)
    with pytest.raises(DatasetError, match="a.hdf5: expected the episode that .* holds under this name"):
        convert_to_lerobot(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="found a LeRobot dataset without meta/dexvla_sources.json"):
        convert_to_lerobot(tmp_path / "in", V30)


# ---- HDF5 ----


def add_extras(path):
    """What our layout does not know must survive all the same."""
    with h5py.File(path, "r+") as file:
        file.attrs.update(operator="Ada", seed=7)
        length = len(file["action"])
        force = file.create_dataset("extra/force", data=np.arange(2.0 * length).reshape(length, 2), compression="gzip")
        force.attrs["unit"] = "N"
        file["calibration"] = np.eye(3)
        file["extra/same"] = h5py.SoftLink("/action")


def test_raw_frames_become_jpeg(tmp_path):
    source = write_coloured(tmp_path / "raw" / "day")
    add_extras(source[0])
    main(["jpeg", str(tmp_path / "raw"), str(tmp_path / "out"), "--quality", "95"])
    converted = [str(tmp_path / "out" / "day" / path.name) for path in source]
    check_coloured(source, converted)
    with h5py.File(source[0]) as raw, h5py.File(converted[0]) as jpeg:
        assert dict(jpeg.attrs) == dict(raw.attrs) | {"compress": True}
        assert np.array_equal(jpeg["extra/force"], raw["extra/force"]) and jpeg["extra/force"].compression == "gzip"
        assert jpeg["extra/force"].attrs["unit"] == "N" and np.array_equal(jpeg["calibration"], np.eye(3))
        assert jpeg.get("extra/same", getlink=True).path == "/action" and "observations/qvel" in jpeg
        lengths = jpeg["compress_len"][()]
        assert lengths.shape == (2, 12)
        for row, camera in zip(lengths, CAMERAS):
            images = jpeg[f"observations/images/{camera}"]
            assert images.shape == (12, row.max()) and images.chunks == (1, row.max())
            assert all(tuple(data[n - 2 : n]) == (0xFF, 0xD9) and not data[n:].any() for data, n in zip(images, row))


def test_interrupted_hdf5_conversion_is_taken_up(tmp_path, capsys):
    source, out = write_coloured(tmp_path / "raw"), tmp_path / "out"
    broken = source[1].read_bytes()
    source[1].write_bytes(broken[: len(broken) // 2])
    out.mkdir()
    (out / ".episode_1.hdf5.partial").write_bytes(b"left by a kill")
    with pytest.raises(SystemExit, match=f"error: {source[1]}: expected a readable HDF5 file"):
        main(["jpeg", str(tmp_path / "raw"), str(out)])
    assert [path.name for path in out.iterdir()] == ["episode_0.hdf5"]
    source[1].write_bytes(broken)
    main(["jpeg", str(tmp_path / "raw"), str(out)])
    assert f"converted 2 episodes, skipped 1 (already there): {out}" in capsys.readouterr().out
    check_coloured(source, find_episodes(out))


@pytest.mark.parametrize("jpeg", [False, True])
def test_truncate(tmp_path, jpeg):
    source = write_episode(tmp_path / "in" / "a.hdf5", 9, cameras=CAMERAS, jpeg=jpeg)
    add_extras(source)
    main(["truncate", str(tmp_path / "in"), str(tmp_path / "out"), "--start", "2", "--stop", "6"])
    with h5py.File(source) as a, h5py.File(tmp_path / "out" / "a.hdf5") as b:
        images = [f"observations/images/{camera}" for camera in CAMERAS]
        for name in ["action", "observations/qpos", "observations/qvel", "substep_reasonings", "extra/force", *images]:
            assert np.array_equal(b[name][()], a[name][2:6]) and b[name].dtype == a[name].dtype
        assert b["extra/force"].compression == "gzip" and b["extra/force"].attrs["unit"] == "N"
        assert np.array_equal(b["calibration"], np.eye(3)) and b["language_raw"][0] == a["language_raw"][0]
        assert not jpeg or np.array_equal(b["compress_len"], a["compress_len"][:, 2:6])
        assert dict(a.attrs) == dict(b.attrs)
    assert not summarize(str(tmp_path / "out" / "a.hdf5")).findings


def test_truncate_short_episodes(tmp_path, capsys):
    write_episode(tmp_path / "in" / "a.hdf5", 4, cameras=[])
    truncate_hdf5(tmp_path / "in", tmp_path / "out", stop=9)
    assert "1 episodes end before frame 9" in capsys.readouterr().out
    assert len(open_episode(tmp_path / "out" / "a.hdf5")) == 4
    with pytest.raises(DatasetError, match="a.hdf5: --start: expected one of its 4 frames, found 4"):
        truncate_hdf5(tmp_path / "in", tmp_path / "other", start=4)


@pytest.mark.parametrize(
    "command, message",
    [
        ("jpeg in in", "expected a folder outside SRC"),
        ("truncate in in/b --length 3", "expected a folder outside SRC"),
        ("truncate in out", "expected --length N, or --start S and/or --stop E"),
        ("truncate in out --length 3 --stop 4", "expected either --length or --start/--stop"),
        ("truncate in out --start 4 --stop 4", "expected 0 <= start < stop"),
        ("jpeg in/none out", "expected a file or folder, found none"),
        ("jpeg in in/a.hdf5", "expected a folder, or a name that is free, found a file"),
        ("lerobot in out", "expected a LeRobot dataset"),
        ("rlds in out", "expected one folder with features.json"),
        ("to-lerobot in out --camera top=cam_low", "a.hdf5: --camera: expected a camera cam_low, found cam_high"),
    ],
)
def test_messages(tmp_path, command, message):
    write_episode(tmp_path / "in" / "a.hdf5", 3, cameras=["cam_high"])
    words = [re.sub("^(in|out)", f"{tmp_path}/\\1", word) for word in command.split()]
    with pytest.raises(SystemExit) as error:
        main(words)
    assert str(error.value).startswith("error: ") and message in str(error.value)
    assert len(episodes_in(tmp_path)) == 1


def test_a_link_to_nowhere_is_kept(tmp_path):
    source = write_episode(tmp_path / "in" / "a.hdf5", 3)
    with h5py.File(source, "r+") as file:
        file["observations/images/cam_low"] = h5py.ExternalLink("gone.hdf5", "/images")
    for command in (["jpeg"], ["truncate", "--length", "2"]):
        main([*command, str(source), str(tmp_path / command[0])])
        with h5py.File(tmp_path / command[0] / "a.hdf5") as file:
            assert file.get("observations/images/cam_low", getlink=True).filename == "gone.hdf5"


def test_jpeg_keeps_jpeg(tmp_path, capsys):
    source = write_episode(tmp_path / "in" / "a.hdf5", 3, jpeg=True)
    assert compress_hdf5(source, tmp_path / "out").converted == 1
    assert "1 files hold JPEG frames already" in capsys.readouterr().out
    with h5py.File(source) as a, h5py.File(tmp_path / "out" / "a.hdf5") as b:
        assert np.array_equal(a["observations/images/cam_high"], b["observations/images/cam_high"])
