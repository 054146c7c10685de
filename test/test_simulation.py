"""Recording scripted demonstrations: the files are what the data loader expects, and what they hold really happened."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from aloha_scripts import constants
from aloha_scripts.constants import TASK_CONFIGS
from aloha_scripts.record_sim_episodes import main
from aloha_scripts.scripted_policy import EPISODE_LEN, TASKS, ScriptedPolicy, substep_reasonings
from aloha_scripts.simulation import CAMERA_NAMES, GL_BACKEND, GL_MISSING, MAX_REWARD, SIM_TASKS, AlohaSimulation

CLONE = Path(__file__).resolve().parents[1]
TRANSFER, INSERTION = SIM_TASKS
SIZE = (64, 48)  # width, height
needs_gl = pytest.mark.skipif(GL_BACKEND == "off", reason=GL_MISSING.format(backend=GL_BACKEND))


def arguments(task, folder, *more):
    return ["--task_name", task, "--dataset_dir", str(folder), "--num_episodes", "1", "--image_size", "(64,48)", *more]


def command_line(*args, module=False):
    """Runs the recorder as a user does, from the clone and without PYTHONPATH."""
    script = ["-m", "aloha_scripts.record_sim_episodes"] if module else ["aloha_scripts/record_sim_episodes.py"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *script, *args]
    return subprocess.run(command, check=False, cwd=CLONE, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """{(task, jpeg): path of one episode}, the transfer ones through the command line."""
    folder = tmp_path_factory.mktemp("episodes")
    run = command_line(*arguments(TRANSFER, folder / "jpeg"))
    assert run.returncode == 0, run.stderr
    assert "kept 1 of 1 attempts" in run.stdout
    main(arguments(TRANSFER, folder / "raw", "--jpeg", "False"))
    main(arguments(INSERTION, folder / "insertion"))
    return {
        (TRANSFER, True): folder / "jpeg/episode_0.hdf5",
        (TRANSFER, False): folder / "raw/episode_0.hdf5",
        (INSERTION, True): folder / "insertion/episode_0.hdf5",
    }


def decode(row):
    return cv2.imdecode(row, 1)


@needs_gl
@pytest.mark.parametrize("key", [(TRANSFER, True), (TRANSFER, False), (INSERTION, True)])
def test_layout(episodes, key):
    task, jpeg = key
    steps = TASK_CONFIGS[task]["episode_len"]
    with h5py.File(episodes[key]) as root:
        for name in ("action", "observations/qpos", "observations/qvel"):
            assert root[name].shape == (steps, 14) and root[name].dtype == np.float32
        assert bool(root.attrs["sim"]) and bool(root.attrs["compress"]) == jpeg
        assert set(root["observations/images"]) == set(TASK_CONFIGS[task]["camera_names"])
        for number, camera in enumerate(CAMERA_NAMES):
            images = root["observations/images"][camera]
            assert images.dtype == np.uint8 and len(images) == steps
            if jpeg:
                row, length = images[-1], root["compress_len"][number, -1]
                assert root["compress_len"].shape == (len(CAMERA_NAMES), steps)
                assert row[length - 2 : length].tolist() == [0xFF, 0xD9] and not row[length:].any()  # end of JPEG
                assert decode(row).shape == (SIZE[1], SIZE[0], 3)
            else:
                assert images.shape == (steps, SIZE[1], SIZE[0], 3) and images.chunks == (1, *images.shape[1:])
        assert root["language_raw"].shape == (1,)
        assert root["language_raw"][0].decode() in TASKS[task][2]
        assert [text.decode() for text in root["substep_reasonings"]] == substep_reasonings(task)


@needs_gl
@pytest.mark.parametrize("task", SIM_TASKS)
def test_recorded_actions_succeed_again(episodes, task):
    with h5py.File(episodes[task, True]) as root:
        actions, qpos, seed = root["action"][()], root["observations/qpos"][()], int(root.attrs["seed"])
    env = AlohaSimulation(task)
    env.reset(seed)
    seen, rewards = [], []
    for action in actions:
        seen.append(env.qpos())
        rewards.append(env.step(action))
    assert max(rewards) == MAX_REWARD
    np.testing.assert_allclose(seen, qpos, atol=1e-5)
    arms = [joint for joint in range(14) if joint not in (6, 13)]  # a gripper stops at what it holds
    error = np.abs(actions[:-1] - qpos[1:])[:, arms]
    assert error.max() < 0.1 and error.mean() < 0.02  # rad


@needs_gl
def test_jpeg_and_raw_frames_agree(episodes):
    with h5py.File(episodes[TRANSFER, True]) as packed, h5py.File(episodes[TRANSFER, False]) as raw:
        np.testing.assert_array_equal(packed["action"], raw["action"])
        for camera in CAMERA_NAMES:
            for step in (0, 200, 399):
                image = raw["observations/images"][camera][step]
                again = decode(packed["observations/images"][camera][step])
                assert np.abs(image.astype(int) - again).mean() < 6
        # The red cube in the right gripper is the one coloured thing: red comes first, raw or decoded.
        for image in (
            raw["observations/images/right_wrist"][200],
            decode(packed["observations/images/right_wrist"][200]),
        ):
            redness = image[..., 0].astype(int) - image[..., 2]
            assert redness.max() > 150 and redness.min() > -50


@needs_gl
def test_second_run_keeps_the_files(episodes, capsys):
    path = episodes[TRANSFER, True]
    before = path.stat().st_mtime_ns
    main(arguments(TRANSFER, path.parent))
    assert "nothing to record" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    assert os.listdir(path.parent) == [path.name]


@needs_gl
def test_render_sizes_and_fast_mode():
    env = AlohaSimulation(INSERTION, fast_rendering=False)
    env.reset(0)
    images = env.render(["top", "right_wrist"], size=SIZE)
    assert list(images) == ["top", "right_wrist"]
    assert all(image.shape == (SIZE[1], SIZE[0], 3) and image.dtype == np.uint8 for image in images.values())
    fast = AlohaSimulation(INSERTION)
    fast.reset(0)
    assert np.abs(fast.render(["top"], SIZE)["top"].astype(int) - images["top"]).mean() < 10
    with pytest.raises(ValueError, match="4000"):
        env.render(["top"], size=(4000, 3000))
    env.close()
    fast.close()


def test_unknown_task_and_bad_size_are_named(capsys, tmp_path):
    run = command_line("--task_name", "sim_fold_shirt", module=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "sim_fold_shirt" in run.stderr and all(task in run.stderr for task in SIM_TASKS)
    with pytest.raises(SystemExit):
        main(["--task_name", TRANSFER, "--dataset_dir", str(tmp_path), "--spread", "1.5"])
    assert "expected a number from 0 to 1, found '1.5'" in capsys.readouterr().err
    for size in ("big", "(0,48)", "(4000,3000)", "(64,48,3)"):
        with pytest.raises(SystemExit):
            main(["--task_name", TRANSFER, "--dataset_dir", str(tmp_path), "--image_size", size])
        assert size in capsys.readouterr().err
    with pytest.raises(ValueError, match=TRANSFER):
        AlohaSimulation("sim_fold_shirt")


@pytest.mark.parametrize("task", SIM_TASKS)
def test_phases_cover_all_frames(task):
    texts = substep_reasonings(task)
    phases = TASKS[task][1]
    assert len(texts) == EPISODE_LEN == TASK_CONFIGS[task]["episode_len"]
    assert list(dict.fromkeys(texts)) == [text for _, text in phases]
    assert phases[0][0] == 0 and [start for start, _ in phases] == sorted(start for start, _ in phases)


def test_rollout_starts_smoothly_and_depends_on_the_seed():
    policy = ScriptedPolicy(TRANSFER)
    first, again, other = (policy.rollout(seed, steps=80) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.05
    start = np.delete(constants.START_ARM_POSE, [6, 7, 14, 15])
    assert np.abs(np.delete(first[0], [6, 13]) - start).max() < 0.02
    assert np.abs(np.diff(first, axis=0)).max() < 0.1


@pytest.mark.parametrize("task", SIM_TASKS)
def test_spread_draws_objects_towards_the_middle(task):
    env = AlohaSimulation(task.removesuffix("_scripted"))  # the short name is understood too

    def places(seed, **spread):
        env.reset(seed, **spread)
        return env.object_poses()[:, :2]  # (objects, 2)

    starts = np.stack([places(seed) for seed in range(30)])  # (30, objects, 2)
    middle = places(0, spread=0.0)
    np.testing.assert_allclose(places(7, spread=0.0), middle)
    np.testing.assert_allclose(starts.mean(axis=0), middle, atol=0.04)
    np.testing.assert_allclose(places(3, spread=0.5), (starts[3] + middle) / 2, atol=1e-9)
    env.close()


@needs_gl
def test_spread_is_recorded(tmp_path):
    main(arguments(TRANSFER, tmp_path, "--spread", "0.25", "--seed", "3"))
    with h5py.File(tmp_path / "episode_0.hdf5") as file:
        assert (file.attrs["seed"], file.attrs["spread"]) == (3, 0.25)
        actions = file["action"][()]
    env = AlohaSimulation(TRANSFER)
    env.reset(3, spread=0.25)
    assert max(env.step(action) for action in actions) == MAX_REWARD
    env.close()


@needs_gl
def test_frames_stay_as_they_were():
    env = AlohaSimulation(TRANSFER)
    env.reset(seed=0)
    first = env.render(["top"], SIZE)["top"]
    kept = first.copy()
    env.reset(seed=5)
    assert not np.array_equal(env.render(["top"], SIZE)["top"], kept)
    np.testing.assert_array_equal(first, kept)
    env.close()


@pytest.mark.parametrize("kind", ["POSITION", "JOINT"])
@pytest.mark.parametrize("arm", ["MASTER", "PUPPET"])
def test_gripper_normalisation_round_trip(arm, kind):
    normalize = getattr(constants, f"{arm}_GRIPPER_{kind}_NORMALIZE_FN")
    unnormalize = getattr(constants, f"{arm}_GRIPPER_{kind}_UNNORMALIZE_FN")
    closed, opened = (getattr(constants, f"{arm}_GRIPPER_{kind}_{end}") for end in ("CLOSE", "OPEN"))
    np.testing.assert_allclose([normalize(closed), normalize(opened)], [0, 1])
    np.testing.assert_allclose(unnormalize(normalize(0.3)), 0.3)
    to_puppet = getattr(constants, f"MASTER2PUPPET_{kind}_FN")
    np.testing.assert_allclose(
        to_puppet(getattr(constants, f"MASTER_GRIPPER_{kind}_OPEN")), getattr(constants, f"PUPPET_GRIPPER_{kind}_OPEN")
    )
