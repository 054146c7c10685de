"""Sub-step reasoning labels: from label files into episodes and back."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils import UserError, open_episode
from data_utils import labels as labels_module
from data_utils.index import summarize_all
from data_utils.labels import EpisodeNames, apply, export, segments_of, texts_per_frame

from .helpers import LENGTH, ONE_CAMERA, label_file, write_episode


def contents(path: Path) -> dict:
    found = {}
    with h5py.File(path) as file:
        found |= {f"@{name}": value for name, value in file.attrs.items()}
        file.visititems(lambda name, item: found.update({name: item[()].tolist()} if hasattr(item, "dtype") else {}))
    return found


def reasonings(path: Path) -> list[str]:
    episode = open_episode(path)
    texts = [episode.reasoning(t) for t in range(len(episode))]
    episode.close()
    return texts


def all_bytes(dataset: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in dataset.rglob("*") if path.is_file()}


def lerobot_dataset(folder: Path):
    """The metadata alone of a LeRobot dataset with one episode."""
    features = {name: {"dtype": "float32", "shape": [14]} for name in ("action", "observation.state")}
    info = {"codebase_version": "v2.1", "chunks_size": 1000, "features": features, "data_path": "data.parquet"}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "Fold."}))
    (folder / "meta" / "episodes.jsonl").write_text(json.dumps({"episode_index": 0, "length": LENGTH}))


# ---- apply ----


@pytest.mark.parametrize("name", ["more/fold.hdf5", "more/fold", "fold.hdf5", "fold", "./more/fold"])
def test_apply_writes_one_text_per_frame_and_nothing_else(dataset, name):
    path = dataset / "more" / "fold.hdf5"
    before = contents(path)
    done = apply(label_file(dataset, f'{name},0,5,"Grip, then „lift“."', f"{name},5,,Fold."), str(dataset))
    assert done.written == [str(path)] and done.unnamed == ["episode_0.hdf5", "episode_1.hdf5"]
    assert reasonings(path) == ["Grip, then „lift“."] * 5 + ["Fold."] * 7
    after = contents(path)
    del after["substep_reasonings"]
    assert after == before
    with h5py.File(path) as file:
        assert h5py.check_string_dtype(file["substep_reasonings"].dtype) == ("utf-8", None)
    assert not list(dataset.rglob("*.partial"))


def test_json_labels_and_numbers_as_names(dataset):
    path = dataset.parent / "labels.json"
    rows = [
        {"episode": 1, "start": 4, "end": None, "text": "Hand over."},
        {"episode": "1", "start": 0, "end": 4, "text": "Pick up."},
        {"episode": "episode_000", "start": 0, "text": "Wait."},
    ]
    path.write_text(json.dumps(rows))
    apply(str(path), str(dataset))
    assert reasonings(dataset / "episode_1.hdf5") == ["Pick up."] * 4 + ["Hand over."] * 8
    assert reasonings(dataset / "episode_0.hdf5") == ["Wait."] * LENGTH


def test_everything_wrong_is_named_with_its_line_and_nothing_is_written(dataset):
    write_episode(dataset / "more" / "episode_1.hdf5", LENGTH, cameras=ONE_CAMERA)  # labelled
    rows = [
        "episode_0,1,4,Starts late.",
        "episode_0,3,6,Overlaps.",
        "episode_0,8,13,Too long and after a gap.",
        "nowhere,0,,Unknown.",
        "1,0,12,Ambiguous: a number.",
        "fold,0,6,   ",
        "fold,six,,No number.",
        "fold,6,3,Backwards.",
        "fold,6,12,Commas, without quotes",
        "more/episode_1,0,,Replaces others.",
        ",,,",
    ]
    before = all_bytes(dataset)
    with pytest.raises(UserError) as raised:
        apply(label_file(dataset, *rows), str(dataset))
    lines = str(raised.value).splitlines()
    assert all_bytes(dataset) == before

    def one(*parts: str):
        assert sum(all(part in line for part in parts) for line in lines) == 1, (parts, lines)

    one("line 2,", "episode_0.hdf5", "none for frames 0 to 0")
    one("line 3,", "that line 2 has a text for", "frames 3 to 3 in both")
    one("line 4,", "none for frames 6 to 7", "--fill previous")
    one("line 4,", "end <= 12", "start 8 and end 13")
    one("line 5:", "'nowhere'")
    one("line 6:", "2 of that name", "more/episode_1.hdf5", "path within the dataset")
    one("line 7:", "a text", "' '")
    one("line 8:", "frame numbers", "'six'")
    one("line 9,", "start 6 and end 3")
    one("line 10:", "too many columns", "double quotes")
    one("more/episode_1.hdf5: substep_reasonings:", "--overwrite")
    assert not any("line 12" in line for line in lines)  # an empty row is none


def test_gaps_are_filled_on_request_but_not_before_the_first_text(dataset):
    labels = label_file(dataset, "0,0,3,First.", "0,6,10,Second.")
    done = apply(labels, str(dataset), fill="previous")
    assert reasonings(dataset / "episode_0.hdf5") == ["First."] * 6 + ["Second."] * 6
    assert done.filled_frames == 5
    with pytest.raises(UserError, match="none for frames 0 to 1"):
        apply(label_file(dataset, "1,2,12,Late."), str(dataset), fill="previous")


def test_random_segments_cover_an_episode_exactly():
    rng = np.random.default_rng(0)
    for _ in range(50):
        length = int(rng.integers(1, 40))
        texts = [f"Step {number}." for number in rng.integers(0, 3, length)]
        rows = segments_of(range(length), texts, length)
        segments = [labels_module.Segment("0", *row, f"line {i}") for i, row in enumerate(rows)]
        shuffled = [segments[i] for i in rng.permutation(len(segments))]
        assert texts_per_frame(shuffled, length, fill_gaps=False) == (texts, [])
        assert all(before[1] == after[0] and before[2] != after[2] for before, after in zip(rows, rows[1:]))
        if len(segments) > 1:
            _, wrong = texts_per_frame(segments[:-1], length, fill_gaps=False)
            assert [where for where, *_ in wrong] == [segments[-2].where]


def test_other_labels_are_replaced_only_on_request(dataset):
    path = dataset / "episode_0.hdf5"
    labels = label_file(dataset, "0,0,,Wait.")
    assert apply(labels, str(dataset)).written == [str(path)]
    written = path.stat().st_mtime_ns
    again = apply(labels, str(dataset))
    assert again.unchanged == [str(path)] and not again.written and path.stat().st_mtime_ns == written
    other = label_file(dataset, "0,0,,Go on.")
    with pytest.raises(UserError, match="--overwrite"):
        apply(other, str(dataset))
    assert reasonings(path) == ["Wait."] * LENGTH
    apply(other, str(dataset), overwrite=True)
    assert reasonings(path) == ["Go on."] * LENGTH


def test_labels_of_the_wrong_length_can_be_replaced(dataset):
    path = dataset / "episode_0.hdf5"
    with h5py.File(path, "r+") as file:
        file["substep_reasonings"] = ["Only", "two"]
    apply(label_file(dataset, "0,0,,Wait."), str(dataset), overwrite=True)
    assert reasonings(path) == ["Wait."] * LENGTH
    assert not summarize_all([str(path)])[str(path)].reasoning_findings


def test_a_failed_write_leaves_the_episode_as_it_was(dataset, monkeypatch):
    before = all_bytes(dataset)

    def no_room(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(labels_module.os, "replace", no_room)
        with pytest.raises(UserError, match=r"episode_0\.hdf5.*No space left.*as it was"):
            apply(label_file(dataset, "0,0,,Wait."), str(dataset))
    assert all_bytes(dataset) == before


def test_a_killed_run_leaves_whole_episodes_and_can_be_repeated(dataset):
    labels = label_file(dataset, "0,0,,Wait.", "1,0,,Go on.")
    before = contents(dataset / "episode_1.hdf5")

    def killed_in_the_second_episode():
        calls = iter([lambda _: None, lambda _: os.kill(os.getpid(), signal.SIGKILL)])
        labels_module.os.fsync = lambda file: next(calls)(file)
        apply(labels, str(dataset))

    process = multiprocessing.get_context("fork").Process(target=killed_in_the_second_episode)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert reasonings(dataset / "episode_0.hdf5") == ["Wait."] * LENGTH
    assert contents(dataset / "episode_1.hdf5") == before
    assert len(list(dataset.rglob(".*.partial"))) == 1 and len(EpisodeNames(str(dataset)).paths) == 3
    done = apply(labels, str(dataset))
    assert done.unchanged == [str(dataset / "episode_0.hdf5")] and done.written == [str(dataset / "episode_1.hdf5")]
    assert reasonings(dataset / "episode_1.hdf5") == ["Go on."] * LENGTH and not list(dataset.rglob("*.partial"))


def test_a_linked_episode_stays_a_link(dataset, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    os.symlink(dataset / "episode_0.hdf5", linked / "episode_7.hdf5")
    apply(label_file(dataset, "7,0,,Wait."), str(linked))
    assert (linked / "episode_7.hdf5").is_symlink() and reasonings(dataset / "episode_0.hdf5") == ["Wait."] * LENGTH


def test_broken_episodes_are_named_before_anything_is_written(dataset):
    (dataset / "episode_1.hdf5").write_bytes(b"no HDF5")
    before = all_bytes(dataset)
    with pytest.raises(UserError, match=r"episode_1\.hdf5: expected a readable HDF5 file"):
        apply(label_file(dataset, "0,0,,Wait.", "1,0,,Wait."), str(dataset))
    assert all_bytes(dataset) == before


def test_lerobot_datasets_are_to_be_converted_first(tmp_path):
    lerobot_dataset(tmp_path / "dataset")
    with pytest.raises(UserError, match=r"LeRobot.*python -m data_utils\.convert lerobot"):
        apply(label_file(tmp_path / "dataset", "0,0,,Wait."), str(tmp_path / "dataset"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.csv", b"episode;start;end;text\n0;0;;Wait.\n", "separated by commas, found episode;start;end;text"),
        ("labels.csv", b"", "found none"),
        ("labels.csv", b"episode,start,end,text\n", "expected labels, found none"),
        ("labels.csv", b'episode,start,end,text\n0,0,,"Wait.\n', "line 2: expected CSV"),
        ("labels.csv", "episode,start,end,text\n0,0,,Fähre.\n".encode("latin-1"), "UTF-8"),
        ("labels.json", b'{"episode": 0}', "expected a list of objects"),
        ("labels.json", b"[{]", "expected a CSV or JSON file"),
        ("labels.json", b'[{"episode": 0, "start": 0, "text": "\\ud800"}]', "entry 1: expected a text"),
        ("labels.json", b'[{"episode": 0, "start": 1.5, "text": "Wait."}]', "entry 1: expected frame numbers"),
        ("labels.json", b'[{"episode": 0, "start": 0, "end": 12, "txt": "Wait."}]', "entry 1: .*found txt"),
    ],
)
def test_label_files_of_another_form(dataset, name, content, message):
    path = dataset.parent / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        apply(str(path), str(dataset))
    with pytest.raises(UserError, match="missing.csv: expected a CSV or JSON file"):
        apply(str(dataset / "missing.csv"), str(dataset))


def test_csv_as_excel_writes_it(dataset):
    path = dataset.parent / "labels.csv"
    path.write_bytes("\ufeffepisode,start,end,text\r\nepisode_0.hdf5,0,,Déplacer.\r\n,,,\r\n".encode())
    apply(str(path), str(dataset))
    assert reasonings(dataset / "episode_0.hdf5") == ["Déplacer."] * LENGTH


# ---- export ----


def test_export_and_apply_are_inverse(dataset, tmp_path):
    texts = ['Say "hi", wait.', "拿起红色方块", "Two\nlines", "Zwei\r\nZeilen", " spaces ", 'Say "hi", wait.']
    wanted = {}
    for i, path in enumerate([dataset / "episode_0.hdf5", dataset / "more" / "fold.hdf5"]):
        wanted[path] = [texts[(t // 2 + i) % len(texts)] for t in range(LENGTH)]
        labels_module.write_reasonings(str(path), wanted[path])
    count, without = export(str(dataset), str(tmp_path / "out.csv"))
    assert (count, without) == (2, ["episode_1.hdf5"])
    with pytest.raises(UserError, match="somebody's edits"):
        export(str(dataset), str(tmp_path / "out.csv"))
    for path in wanted:
        with h5py.File(path, "r+") as file:
            del file["substep_reasonings"]
    apply(str(tmp_path / "out.csv"), str(dataset))
    assert {path: reasonings(path) for path in wanted} == wanted


def test_export_of_one_reasoning_for_the_whole_episode(dataset, tmp_path):
    with h5py.File(dataset / "episode_1.hdf5", "r+") as file:
        file["reasoning"] = ["Fold the shirt."]
    export(str(dataset), str(tmp_path / "out.csv"))
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == [f"episode_1.hdf5,0,{LENGTH},Fold the shirt."]
    with h5py.File(dataset / "episode_0.hdf5", "r+") as file:
        file["substep_reasonings"] = ["Only", "two"]
    with pytest.raises(UserError, match=r"episode_0\.hdf5.*12 texts"):
        export(str(dataset), str(tmp_path / "other.csv"))
