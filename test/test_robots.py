"""Several robots in one training: each is normalised and acts with statistics of its own."""

import json
import pickle
from contextlib import contextmanager

import h5py
import numpy as np
import pytest
import torch

import train_vla
from aloha_scripts.constants import TASK_CONFIGS
from data_utils import (
    DatasetError,
    UserError,
    find_episodes,
    get_norm_stats,
    load_data,
    load_robot_stats,
    load_stats,
    normalize_action,
    normalize_state,
    open_episode,
)
from data_utils.doctor.__main__ import Selection
from data_utils.doctor.__main__ import main as doctor
from evaluate import open_loop
from qwen2_vla import Qwen2VLAPolicy

from .helpers import CAMERAS, relative_error, write_episode
from .lora_cases import small_training

ROBOTS = ("aloha", "franka")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of episodes: two of aloha, one of franka, which moves ten times as far."""
    parent = tmp_path_factory.mktemp("robots")
    for number, name in enumerate(("aloha/shirts", "aloha/towels", "franka")):
        for i in range(2):
            write_episode(parent / name / f"episode_{i}.hdf5", seed=10 * number + i, size=(56, 56))
    for path in find_episodes(parent / "franka"):
        scale_numbers(path, 10)
    return parent


def scale_numbers(path: str, factor: float):
    with h5py.File(path, "r+") as file:
        for name in ("action", "observations/qpos"):
            file[name][:] = factor * file[name][()]


def data_of(parent, stats_dir, dirs=("aloha/shirts", "aloha/towels", "franka"), **options):
    options = {"image_size_stable": (56, 56), "train_ratio": 0.5} | options
    return load_data([str(parent / name) for name in dirs], None, CAMERAS, 8, stats_dir=stats_dir, **options)


def stats_dirs(parent) -> dict:
    return {"aloha": str(parent / "aloha"), "franka": [parent / "franka"]}


def test_every_episode_has_the_statistics_of_its_robot(folders):
    train, validation, stats, plan = data_of(folders, stats_dirs(folders))
    assert list(stats) == list(ROBOTS) and plan.episode_sources == [0, 1, 1, 2, 2]
    for robot in ROBOTS:
        own = get_norm_stats(find_episodes(folders / robot))
        assert all(np.array_equal(stats[robot][key], own[key]) for key in own)
    assert not np.allclose(stats["aloha"]["action_max"], stats["franka"]["action_max"], rtol=0.5)
    for data in (train, validation, pickle.loads(pickle.dumps(train))):
        for index in range(0, len(data), 6):
            path, t = data.locate(index)
            its_stats = stats["franka" if "franka" in path else "aloha"]
            episode = open_episode(path)
            item = data[index]
            assert np.allclose(item["state"], normalize_state(episode.qpos[t], its_stats), atol=1e-6)
            rows = normalize_action(episode.action[t : t + 8], its_stats)
            assert np.allclose(item["action"][: len(rows)], rows, atol=1e-6)
            assert np.abs(rows).max() < 1.01


def test_one_robot_stays_as_it_was(folders):
    """Named or not, its numbers are the same; the file has its name only if it was given one."""
    plain = data_of(folders, None, dirs=("aloha/shirts",))[2]
    named = data_of(folders, {"aloha": str(folders / "aloha/shirts")}, dirs=("aloha/shirts",))[2]
    assert list(named) == ["aloha"] and all(np.array_equal(named["aloha"][key], plain[key]) for key in plain)


@pytest.mark.parametrize(
    ("robots", "message"),
    [
        ({"aloha": "aloha"}, "dataset_dir .*franka: expected it in the stats_dir of one robot .* of none"),
        ({"aloha": "aloha/shirts", "franka": "franka"}, "dataset_dir .*aloha/towels: expected it .* of none"),
        ({"aloha": "aloha", "ur5": "aloha/towels", "franka": "franka"}, "aloha/towels: .* in those of aloha and ur5"),
        ({"all": "", "ur5": "franka"}, "dataset_dir .*franka: .* found it in those of all and ur5"),
    ],
)
def test_every_folder_is_one_robots(folders, robots, message):
    with pytest.raises(DatasetError, match=message):
        data_of(folders, {robot: str(folders / name) for robot, name in robots.items()})


def test_a_robot_without_data(folders):
    robots = {"aloha": str(folders / "aloha"), "franka": str(folders / "franka")}
    with pytest.raises(DatasetError, match="stats_dir: franka: expected a dataset_dir in its folders, found none"):
        data_of(folders, robots, dirs=("aloha/shirts",))


def test_robots_share_their_dimensions(folders, tmp_path):
    write_episode(tmp_path / "ur5/episode_0.hdf5", dim=7, size=(56, 56))
    robots = {"aloha": str(folders / "aloha"), "ur5": str(tmp_path / "ur5")}
    with pytest.raises(DatasetError, match="ur5/episode_0.hdf5: action: expected .*14.*found .*7"):
        load_data([str(folders / "aloha/shirts"), str(tmp_path / "ur5")], None, CAMERAS, 8, stats_dir=robots)


@pytest.mark.parametrize("stats_dir", [{}, {"aloha": 3}, {3: "folder"}, {"": "folder"}, 7])
def test_a_wrong_stats_dir_is_named(monkeypatch, stats_dir):
    task = {"dataset_dir": "folder", "episode_len": 12, "camera_names": CAMERAS, "stats_dir": stats_dir}
    monkeypatch.setitem(TASK_CONFIGS, "robots", task)
    with pytest.raises(UserError, match="stats_dir: expected folders, or a dict robot -> folders, found"):
        train_vla.main(["--model_name_or_path", "x", "--output_dir", "y", "--task_name", "robots", "--use_cpu", "True"])


@contextmanager
def registered(folders, stats_dir):
    """TASK_CONFIGS["robots"], for a while."""
    dirs = [str(folders / name) for name in ("aloha/shirts", "aloha/towels", "franka")]
    task = {"dataset_dir": dirs, "episode_len": 12, "camera_names": CAMERAS, "stats_dir": stats_dir}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASK_CONFIGS, "robots", task)
        yield


@pytest.fixture(scope="module")
def output(folders, tiny_base, tmp_path_factory):
    """Trained on both robots, with a checkpoint after the first of two steps."""
    out = tmp_path_factory.mktemp("trained") / "out"
    with registered(folders, stats_dirs(folders)):
        train_vla.main(small_training(tiny_base, "robots", out, save_steps=1))
    return out


def test_a_checkpoint_acts_for_every_robot(folders, output):
    stored = json.loads((output / "dataset_stats.json").read_text())
    assert list(stored) == list(ROBOTS) and len(stored["franka"]["action_mean"]) == 14
    pickled = pickle.loads((output / "dataset_stats.pkl").read_bytes())
    stats = load_robot_stats(output)
    for robot in ROBOTS:
        assert all(np.array_equal(stats[robot][key], pickled[robot][key]) for key in pickled[robot])
    with pytest.raises(UserError, match="expected statistics of one robot, found those of aloha, franka"):
        load_stats(output)

    policy = Qwen2VLAPolicy.from_pretrained(str(output), "cpu")
    assert policy.unnorm_keys == policy.metadata()["unnorm_keys"] == list(ROBOTS)
    episode = open_episode(find_episodes(folders / "franka")[0])
    observation = {"images": {name: episode.frame(name, 3) for name in CAMERAS}, "qpos": episode.qpos[3]}
    noise = np.random.default_rng(0).normal(size=(8, 14)).astype(np.float32)
    options = {"max_new_tokens": 2, "noise": noise, "reasoning": "Go."}
    with pytest.raises(UserError, match="unnorm_key: expected one of aloha, franka, found None"):
        policy.predict(observation, "Pick.", **options)
    with pytest.raises(UserError, match="unnorm_key: expected one of aloha, franka"):
        policy.stats["action_min"]
    actions = {robot: policy.predict(observation, "Pick.", unnorm_key=robot, **options)[0] for robot in ROBOTS}
    for robot, rows in actions.items():
        assert (rows >= stats[robot]["action_min"] - 1e-3).all() and (rows <= stats[robot]["action_max"] + 1e-3).all()
    together, _ = policy.predict(
        [observation] * 2, "Pick.", unnorm_key=list(ROBOTS), max_new_tokens=2, noise=np.stack([noise] * 2),
        reasoning="Go.",
    )  # fmt: skip
    for rows, robot in zip(together, ROBOTS):
        assert relative_error(rows, actions[robot]) < 1e-4
    # the model alone un-normalises the same way
    inputs = policy._inputs([observation], ["Pick."], [stats["franka"]])
    rows, _ = policy.model.predict_action(
        **inputs, tokenizer=policy.process.tokenizer, answers=["Go.Next action:"], noise=torch.from_numpy(noise[None]),
        unnorm_key="franka",
    )  # fmt: skip
    assert relative_error(rows[0], actions["franka"]) < 1e-4


def test_commands_are_told_the_robot(folders, output, tmp_path, monkeypatch, capsys):
    episode = find_episodes(folders / "franka")[0]
    command = ["open_loop", "--checkpoint", str(output), "--task_name", "robots", "--episode", episode]
    command += ["--max_new_tokens", "2", "--output", str(tmp_path / "o.png"), "--report", str(tmp_path / "o.html")]
    with registered(folders, stats_dirs(folders)):
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(UserError, match="unnorm_key: expected one of aloha, franka, found None"):
            open_loop.main()
        monkeypatch.setattr("sys.argv", [*command, "--unnorm_key", "franka"])
        open_loop.main()
    assert (tmp_path / "o.html").is_file() and "in robot units" in capsys.readouterr().out


def test_resuming_wants_the_same_robots(folders, output, tiny_base, tmp_path, capsys):
    own = stats_dirs(folders)
    for stats_dir in (None, {"aloha": own["aloha"], "panda": own["franka"]}):
        with registered(folders, stats_dir), pytest.raises(UserError, match="statistics of other episodes"):
            train_vla.main(small_training(tiny_base, "robots", output, max_steps=3, resume_from_checkpoint=True))
    with registered(folders, own):
        train_vla.main(small_training(tiny_base, "robots", output, max_steps=3, resume_from_checkpoint=True))
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 3


def test_the_doctor_compares_a_robot_with_itself(folders, output, capsys):
    with registered(folders, stats_dirs(folders)):
        assert doctor(["--task_name", "robots", "--fast", "--stats", str(output)]) == 0
        groups = Selection.of_task("robots", skip_mirrored_data=False).groups
        assert groups == [find_episodes(folders / robot) for robot in ROBOTS]
    printed = capsys.readouterr().out
    assert "6 episodes" in printed and "[stats]" not in printed
    exchanged = {"aloha": str(folders / "franka"), "franka": str(folders / "aloha")}
    with registered(folders, exchanged):
        doctor(["--task_name", "robots", "--fast", "--stats", str(output)])
    printed = capsys.readouterr().out
    for robot in ROBOTS:
        assert f"dataset_stats.json: {robot}, " in printed
    with registered(folders, {"aloha": str(folders / "aloha"), "ur5": str(folders / "franka")}):
        doctor(["--task_name", "robots", "--fast", "--stats", str(output)])
    assert "expected statistics of ur5, found those of aloha, franka" in capsys.readouterr().out
