"""LeRobot datasets read as lerobot itself reads them."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from aloha_scripts.constants import TASK_CONFIGS
from data_utils import (
    DatasetError,
    EpisodeSampler,
    EpisodicDataset,
    find_episodes,
    get_norm_stats,
    load_data,
    open_episode,
    unnormalize_action,
)
from data_utils.lerobot import LeRobotDataset, _dataset, _tables
from qwen2_vla import Qwen2VLAProcess

from .helpers import GOLDEN, golden, write_episode

V21, V30 = (str(GOLDEN / "lerobot" / name) for name in ("lerobot_v21", "lerobot_v30"))
EXPECTED, TEXTS = golden("lerobot/v30_expected.safetensors"), golden("lerobot/v30_expected.json")
CAMERAS = ["top", "left_wrist", "right_wrist"]


@pytest.mark.parametrize("index", TEXTS)
def test_v30_as_lerobot_reads_it(index):
    texts = TEXTS[index]
    episode, t = open_episode(find_episodes(V30)[texts["episode"]]), texts["frame"]
    assert (episode.instruction(t), episode.reasoning(t)) == (texts["task"], texts["reasoning"])
    assert np.array_equal(episode.qpos[t], EXPECTED[f"{index}.state"])
    for camera in CAMERAS:
        expected = EXPECTED[f"{index}.{camera}"].numpy().astype(int)  # every fourth pixel
        assert np.abs(episode.frame(camera, t)[::4, ::4] - expected).mean() < 3


def test_v30_action_chunks():
    paths = find_episodes(V30)
    stats = get_norm_stats(paths)
    data = EpisodicDataset(paths, ["top"], stats, 10)
    assert len(data) == 70
    for index in map(int, TEXTS):
        item = data[index]
        padding = EXPECTED[f"{index}.action_is_pad"]
        assert torch.equal(item["is_pad"], padding)  # lerobot repeats the last action there, ACT writes zeros
        action = unnormalize_action(item["action"].numpy(), stats)
        assert np.allclose(action[~padding], EXPECTED[f"{index}.action"][~padding], atol=1e-5)


def test_frames_do_not_depend_on_what_was_read_before():
    episode = open_episode(find_episodes(V30)[1])
    in_order = [episode.frame("top", t) for t in range(len(episode))]
    for t in np.random.default_rng(0).permutation(len(episode)):
        assert np.array_equal(episode.frame("top", t), in_order[t])
    assert len({frame.tobytes() for frame in in_order}) > len(episode) // 2


def test_v21_video_and_embedded_images():
    paths = find_episodes(V21)
    assert [len(open_episode(path)) for path in paths] == [20, 25, 30]
    episode = open_episode(paths[1])
    assert episode.camera_names == ["top", "left_wrist"] and episode.sim
    assert episode.instruction(0) == "task 1" and episode.reasoning(24) == "step 2"
    table = pq.read_table(f"{V21}/data/chunk-000/episode_000001.parquet")
    assert np.array_equal(episode.action, np.array(table["action"].to_pylist(), np.float32))
    for t in (0, 24, 7):
        from torchvision.io import decode_image

        encoded = table["observation.images.left_wrist"][t].as_py()["bytes"]
        expected = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8)).permute(1, 2, 0)
        assert np.array_equal(episode.frame("left_wrist", t), expected)
        assert episode.frame("top", t).shape == (96, 128, 3)


def test_mixture_of_formats_with_mapped_cameras(tmp_path, processor):
    for i in range(2):
        write_episode(tmp_path / "act" / f"episode_{i}.hdf5", seed=i)
    cameras = ["cam_high", "cam_left_wrist", "cam_right_wrist"]
    camera_map = {
        "cam_high": "observation.images.top",
        "cam_left_wrist": ["left_wrist"],
        "cam_right_wrist": ["right", "right_wrist"],
    }
    process = Qwen2VLAProcess(processor, cameras, image_size_wrist=(56, 56))
    train, _, _, plan = load_data(
        [str(tmp_path / "act"), V30], None, cameras, 8, sample_weights=[1, 3], train_ratio=1.0,
        camera_map=camera_map, image_size_stable=(56, 56), transform=process,
    )  # fmt: skip
    assert plan.episode_lengths == [12, 12, 22, 31, 17] and plan.episode_sources == [0, 0, 1, 1, 1]
    assert torch.allclose(EpisodeSampler(plan).episode_probabilities()[:2].sum(), torch.tensor(0.25).double())
    train[30]  # a decoder that is open here must not keep a forked worker waiting
    loader = torch.utils.data.DataLoader(train, batch_size=None, num_workers=2, sampler=[3, 30, 90])
    items = list(loader)
    assert [item["images"][0].shape for item in items] == [(1, 56, 56, 3)] * 3
    raw = [processor.tokenizer.decode(item["input_ids"]) for item in items]
    assert "Transfer the red cube to the other arm." in raw[0] and "Transfer the red cube." in raw[1]


def test_a_dataset_in_a_subfolder_is_found_and_filtered(tmp_path):
    shutil.copytree(V30, tmp_path / "robot" / "set")
    write_episode(tmp_path / "episode_7.hdf5")
    names = [path.removeprefix(f"{tmp_path}/") for path in find_episodes(tmp_path)]
    assert names == ["episode_7.hdf5", *(f"robot/set/episode_00000{i}" for i in range(3))]
    train, *_ = load_data(str(tmp_path), lambda path: path.endswith("1"), CAMERAS, 8, train_ratio=1.0)
    assert train.episode_lengths.tolist() == [31]


@pytest.fixture
def broken(tmp_path):
    shutil.copytree(V30, tmp_path / "set")
    return tmp_path / "set"


def edit_info(folder, **changes):
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps(info | changes))


def edit_table(**columns):
    """Replaces (list of values), or removes (None), columns of the rows."""

    def change(folder):
        path = folder / "data/chunk-000/file-000.parquet"
        table = pq.read_table(path)
        for name, values in columns.items():
            at = table.column_names.index(name)
            table = table.remove_column(at)
            if values is not None:
                table = table.add_column(at, name, pa.array(values(len(table))))
        pq.write_table(table, path)

    return change


def odd_row(*odd, row):
    return lambda count: [*odd, *[row] * (count - len(odd))]


VIDEO = "videos/observation.images.top/chunk-000/file-000.mp4"


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda folder: (folder / VIDEO).unlink(), ["observation.images.top: expected a readable video"]),
        (lambda folder: (folder / VIDEO).write_bytes((folder / VIDEO).read_bytes()[:999]), ["a readable video"]),
        (lambda folder: shutil.copy(GOLDEN / "lerobot/lerobot_v21/videos/chunk-000/observation.images.top/"
                                    "episode_000000.mp4", folder / VIDEO), ["and a frame, found 0.4"]),
        (lambda folder: (folder / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1"),
         ["file-000.parquet: expected a readable parquet table"]),
        (lambda folder: (folder / "meta/tasks.parquet").unlink(), ["meta: expected the metadata", "tasks.parquet"]),
        (lambda folder: edit_info(folder, codebase_version="v1.6"), ["expected v2.0, v2.1 or v3.0, found v1.6"]),
        (lambda folder: edit_info(folder, features={"state": {"dtype": "float32"}}), ["expected a feature action"]),
        (lambda folder: edit_info(folder, features={"action": {}}), ["meta: expected the metadata", "dtype"]),
        (lambda folder: edit_info(folder, video_path=None), ["meta: expected the metadata"]),
        (lambda folder: (folder / "meta/info.json").write_text("{ no"), ["meta/info.json: expected JSON, found"]),
        (lambda folder: (folder / "meta/info.json").write_text("[]"), ["meta: expected the metadata"]),
        (edit_table(action=None), ["file-000.parquet: expected a column action, found only observation.state"]),
        (edit_table(timestamp=None), ["expected a column timestamp"]),
        (edit_table(episode_index=None), ["expected a column episode_index"]),
        # 14 + 14 numbers in two rows: their sum alone would tell nothing
        (edit_table(action=odd_row([0.0], [0.0] * 27, row=[0.0] * 14)),
         ["action, frame 0: expected 14 numbers, as in most frames, found 1"]),
        (edit_table(action=odd_row([0.0] * 14, None, row=[0.0] * 14)), ["action, frame 1: expected 14 numbers"]),
        (edit_table(action=odd_row(row="up")), ["action: expected numbers, or lists of them, found string"]),
        (edit_table(timestamp=odd_row(0.0, None, row=0.5)), ["timestamp, frame 1: expected seconds, found none"]),
    ],
)  # fmt: skip
def test_broken_datasets_are_named(broken, change, expected):
    change(broken)
    with pytest.raises(DatasetError) as error:
        load_data(str(broken), None, CAMERAS, 8)
    for part in [str(broken), *expected]:
        assert part in str(error.value)


def test_broken_json_lines_are_named(tmp_path):
    shutil.copytree(V21, tmp_path / "set")
    with open(tmp_path / "set/meta/tasks.jsonl", "a") as file:
        file.write('{"task_index": 2, "ta')
    with pytest.raises(DatasetError, match="tasks.jsonl, line 3: expected JSON, found"):
        find_episodes(tmp_path)


def test_mended_metadata_is_read_again(tmp_path):
    shutil.copytree(V21, tmp_path / "set")
    path = tmp_path / "set/meta/episodes.jsonl"
    sound = path.read_text()
    path.write_text(sound.replace('"length": 25', '"length": 24'))
    assert path.read_text() != sound
    with pytest.raises(DatasetError, match="expected 24 rows of the episode, as meta says, found 25"):
        load_data(str(tmp_path), None, ["top"], 8)
    path.write_text(sound)
    _dataset.cache_clear()  # as in the next process
    assert sum(load_data(str(tmp_path), None, ["top"], 8)[3].episode_lengths) > 0


def test_an_embedded_image_that_is_not_there_is_named(tmp_path):
    shutil.copytree(V21, tmp_path / "set")
    path = tmp_path / "set/data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("observation.images.left_wrist")
    kind = table.schema.field(at)
    for value in (None, {"bytes": None, "path": None}, {"bytes": None, "path": "gone.png"}):
        pq.write_table(table.set_column(at, kind, pa.array([value] * len(table), kind.type)), path)
        _tables.files.clear()
        with pytest.raises(DatasetError, match="left_wrist, frame 3: expected an encoded image, found none"):
            open_episode(tmp_path / "set/episode_000000").frame("left_wrist", 3)


def test_missing_cameras_texts_and_episodes_are_named(broken):
    with pytest.raises(DatasetError, match="cam_high: expected a camera of camera_names, found only top, left_wrist"):
        load_data(str(broken), None, ["cam_high"], 8)
    with pytest.raises(DatasetError, match="episode_000009: expected one of the 3 episodes there"):
        open_episode(broken / "episode_000009")
    info = json.loads((broken / "meta/info.json").read_text())
    del info["features"]["reasoning"]
    (broken / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="expected one text per frame .*, found none"):
        load_data(str(broken), None, ["top"], 8, use_reasoning=True)
    train, *_ = load_data(str(broken), None, ["top"], 8, use_reasoning=False)
    assert train[0]["reasoning"] == ""


def test_a_dataset_that_grew_is_read_again(broken):
    assert len(LeRobotDataset.at(broken).episodes) == 3
    assert LeRobotDataset.at(broken) is LeRobotDataset.at(broken)
    episodes = broken / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(episodes).slice(0, 2), episodes)
    edit_info(broken, total_episodes=2)
    assert len(find_episodes(broken)) == 2


def test_training_on_a_lerobot_dataset(tiny_base, tmp_path):
    import train_vla

    TASK_CONFIGS["lerobot_task"] = {"dataset_dir": V30, "episode_len": 40, "camera_names": CAMERAS}
    try:
        train_vla.main(
            f"--model_name_or_path {tiny_base} --task_name lerobot_task --output_dir {tmp_path}/out --max_steps 2 "
            "--policy_head_depth 1 --policy_head_width 64 --policy_head_heads 4 --chunk_size 8 --use_cpu True "
            "--image_size_stable (56,56) --image_size_wrist (56,56) --use_reasoning True --disable_tqdm True "
            "--per_device_train_batch_size 2 --dataloader_num_workers 2 --logging_steps 1 "
            "--history_images_length 2".split()
        )
    finally:
        del TASK_CONFIGS["lerobot_task"]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()
