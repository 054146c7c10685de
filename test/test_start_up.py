"""Episodes are read once: what was found in them is kept, added to, and never trusted after a file has changed."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils import DatasetError, find_episodes, index, load_data, summarize_all
from data_utils.index import cache_folder

from .helpers import CAMERAS, GOLDEN, write_episode


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Paths of the episodes that were really read."""
    monkeypatch.setenv("DEXVLA_CACHE_DIR", str(tmp_path / "cache"))
    paths = []
    summarize = index.summarize
    monkeypatch.setattr(index, "summarize", lambda path: paths.append(path) or summarize(path))
    return paths


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        write_episode(tmp_path / "set" / f"episode_{i}.hdf5", 4 + i, seed=i)
    return str(tmp_path / "set")


def start(folder):
    train, _, stats, _ = load_data(folder, None, CAMERAS, 4, train_ratio=1.0)
    return dict(zip(train.episode_paths, train.episode_lengths.tolist())), stats


def test_a_second_start_reads_nothing_and_finds_the_same(folder, read):
    first = start(folder)
    assert len(read) == 3
    second = start(folder)
    assert len(read) == 3 and second[0] == first[0]
    assert all(np.array_equal(second[1][key], first[1][key]) for key in first[1])


def test_only_new_and_changed_episodes_are_read(folder, read):
    start(folder)
    read.clear()
    new = str(write_episode(Path(folder) / "episode_9.hdf5", 5))
    changed = f"{folder}/episode_1.hdf5"
    with h5py.File(changed, "r+") as file:
        file["action"][0] = 7
    os.utime(changed, ns=(1, 1))
    os.remove(f"{folder}/episode_2.hdf5")
    lengths, stats = start(folder)
    assert sorted(read) == sorted([new, changed]) and len(lengths) == 3
    assert np.allclose(stats["action_max"], 7 + 1e-4)
    read.clear()
    start(folder)
    assert read == []


def test_what_is_wrong_is_kept_too_and_forgotten_when_mended(folder, read):
    broken = f"{folder}/episode_1.hdf5"
    with h5py.File(broken, "r+") as file:
        value = file["action"][2, 3]
        file["action"][2, 3] = np.nan
    messages = []
    for _ in range(2):
        with pytest.raises(DatasetError) as error:
            start(folder)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "action, frame 2, dimension 3" in messages[0] and len(read) == 3
    with h5py.File(broken, "r+") as file:
        file["action"][2, 3] = value
    os.utime(broken, ns=(2, 2))
    start(folder)
    assert read[3:] == [broken]


def test_one_task_does_not_decide_for_another(folder, read):
    start(folder)
    with pytest.raises(DatasetError, match="expected a camera of camera_names"):
        load_data(folder, None, ["cam_low"], 4)
    assert len(read) == 3


def test_a_cut_off_or_foreign_cache_is_done_without(folder, read):
    first = start(folder)
    (cache,) = cache_folder().iterdir()
    cache.write_text(cache.read_text()[:-100])  # as after a kill: the last episode's line is not whole
    read.clear()
    assert start(folder)[0] == first[0] and len(read) == 1
    cache.write_text('{"format": 0}\nnonsense\n')
    read.clear()
    assert start(folder)[0] == first[0] and len(read) == 3
    read.clear()
    assert start(folder)[0] == first[0] and read == []


def test_without_a_place_for_the_cache(folder, read, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEXVLA_CACHE_DIR", str(tmp_path / "file"))
    assert len(start(folder)[0]) == 3 and "summaries of the episodes are not kept" in capsys.readouterr().out


def test_many_episodes_are_read_by_several_processes(folder, monkeypatch):
    paths = find_episodes(folder)
    alone = summarize_all(paths)
    monkeypatch.setattr(index, "WORTH_A_POOL", 2)
    together = summarize_all(paths)
    assert list(together) == paths
    assert [s.to_json() for s in together.values()] == [s.to_json() for s in alone.values()]


def test_lerobot_summaries_survive_being_kept(read):
    folder = str(GOLDEN / "lerobot" / "lerobot_v30")
    paths = find_episodes(folder)
    first, second = (summarize_all(paths, folder) for _ in range(2))
    assert len(read) == 3
    assert [s.to_json() for s in first.values()] == [s.to_json() for s in second.values()]
    assert [s.length for s in second.values()] == [22, 31, 17]
