"""The doctor on LeRobot datasets: videos, embedded images, tables."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_utils.doctor.examination
from data_utils import find_episodes
from data_utils.doctor.__main__ import main
from data_utils.doctor.examination import Examination

from .helpers import GOLDEN


@pytest.fixture(params=["lerobot_v21", "lerobot_v30"])
def dataset(request, tmp_path):
    """A copy of a dataset of three episodes."""
    return shutil.copytree(GOLDEN / "lerobot" / request.param, tmp_path / request.param)


def change(table_path, column, value):
    """Replaces a column of a parquet file by `value(list of its rows)`."""
    table = pq.read_table(table_path)
    index = table.column_names.index(column)
    rows = pa.array(value(table[column].to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(index, table.schema.field(column), rows), table_path)


def findings(dataset):
    return [
        (finding.kind, finding.path.removeprefix(f"{dataset}/"), finding.where, finding.is_error)
        for finding in Examination(find_episodes(dataset), 15).findings()
    ]


@pytest.mark.parametrize("pooled", [False, True])
def test_sound_datasets_give_no_finding(dataset, capsys, monkeypatch, pooled):
    if pooled:
        monkeypatch.setattr(data_utils.doctor.examination, "WORTH_A_POOL", 0)
        monkeypatch.setattr(data_utils.doctor.examination.os, "cpu_count", lambda: 2)
    report = dataset.parent / "report.html"
    assert main([str(dataset), "--chunk_size", "15", "--strict", "--report", str(report)]) == 0
    assert "3 episodes" in capsys.readouterr().out
    text = report.read_text()
    assert all(f"episode_00000{i}" in text for i in range(3)) and text.count("<img") % 15 == 0 < text.count("<img")
    assert main([str(dataset), "--fix", "--chunk_size", "15", "--strict", "--fast"]) == 0
    assert main([f"{dataset}/episode_000001", "--chunk_size", "15", "--strict"]) == 0


def test_number_that_is_not_finite(dataset):
    table = sorted(dataset.rglob("data/**/*.parquet"))[0]
    change(table, "observation.state", lambda rows: [*rows[:7], [*rows[7][:2], np.nan, *rows[7][3:]], *rows[8:]])
    where = "observation.state, frame 7, dimension 2"
    assert findings(dataset) == [("numbers", "episode_000000", where, True)]


def test_truncated_video(dataset):
    video = sorted(dataset.rglob("*.mp4"))[0]
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    broken = findings(dataset)
    assert broken and {(kind, is_error) for kind, _, _, is_error in broken} <= {("unreadable", True), ("frames", True)}


def test_missing_video(dataset):
    sorted(dataset.rglob("*.mp4"))[0].unlink()
    assert {(kind, is_error) for kind, _, _, is_error in findings(dataset)} == {("unreadable", True)}


def test_damaged_video(dataset):
    video = sorted(dataset.rglob("*.mp4"))[0]
    data = bytearray(video.read_bytes())
    start = data.index(b"mdat") + 4
    end = start + (len(data) - start) // 3
    data[start + 2000 : end] = bytes(end - start - 2000) if end > start + 2000 else b""
    data[start : start + 200] = bytes(200)
    video.write_bytes(bytes(data))
    found = findings(dataset)
    assert ("frames", "episode_000000", "observation.images.top, frame 0", True) in [
        (kind, path, where.replace("left_wrist", "top"), is_error) for kind, path, where, is_error in found
    ]
    assert {kind for kind, *_ in found} == {"frames"}


def test_embedded_image_that_is_none(tmp_path):
    dataset = shutil.copytree(GOLDEN / "lerobot" / "lerobot_v21", tmp_path / "set")
    name = "observation.images.left_wrist"
    table = sorted(dataset.rglob("data/**/*.parquet"))[1]

    def spoil(rows):
        return [row | {"bytes": b"nothing"} if t in (4, 6) else row for t, row in enumerate(rows)]

    change(table, name, spoil)
    assert findings(dataset) == [("frames", "episode_000001", f"{name}, frame 4", True)]


def test_frozen_embedded_camera(tmp_path):
    dataset = shutil.copytree(GOLDEN / "lerobot" / "lerobot_v21", tmp_path / "set")
    name = "observation.images.left_wrist"
    for table in dataset.rglob("data/**/*.parquet"):
        change(table, name, lambda rows: [rows[0]] * len(rows))
    assert findings(dataset) == [("duplicates", f"episode_{i:06d}", f"{name}, frame 1", False) for i in range(3)]
