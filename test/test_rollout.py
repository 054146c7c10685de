"""Closed loop in simulation: demonstrations succeed when replayed, and results depend on the seeds alone."""

import json
import math
import shutil
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest
from scipy.stats import binomtest

from aloha_scripts.scripted_policy import ScriptedPolicy, instruction
from aloha_scripts.simulation import CAMERA_NAMES, GL_BACKEND, GL_MISSING, AlohaSimulation
from data_utils import UserError, find_all_hdf5, get_norm_stats
from evaluate import rollout_sim
from evaluate.closed_loop import ClosedLoop, Settings, confidence_interval, summarize
from evaluate.simulated_robot import STEPS_AFTER_SUCCESS, Simulation

from .helpers import ROOT, write_checkpoint

TRANSFER, INSERTION = "sim_transfer_cube_scripted", "sim_insertion_scripted"
SIZE = (64, 48)  # width, height
needs_gl = pytest.mark.skipif(GL_BACKEND == "off", reason=GL_MISSING.format(backend=GL_BACKEND))


class Replay:
    """Looks like a policy and answers query q of the b-th rollout with rows q * T .. of its episode's actions.

    All rollouts must begin together. `observations` keeps what it was asked: a list of B for every query.
    """

    action_dim = 14

    def __init__(self, episodes, chunk_size, *, delta_control=False, act=None):
        if delta_control:
            episodes = [np.diff(actions, axis=0, append=actions[-1:]) for actions in episodes]
        self.episodes, self.chunk_size, self.delta_control, self.act = episodes, chunk_size, delta_control, act
        self.observations, self.reasonings, self.instructions = [], [], []

    def predict(self, observation, instruction, max_new_tokens, *, unnorm_key, reasoning, noise):
        assert noise.shape == (len(observation), self.chunk_size, 14)
        query = len(self.observations)
        self.observations.append(observation)
        self.reasonings.append(reasoning)
        self.instructions.append(instruction)
        if self.act:
            self.act(query)
        rows = slice(query * self.chunk_size, (query + 1) * self.chunk_size)
        texts = [f"query {query}" if given is None else given for given in reasoning]
        return np.stack([actions[rows] for actions in self.episodes[: len(observation)]]), texts


def demonstrations(task_name, seeds, spread=1.0):
    scripted = ScriptedPolicy(task_name)
    return [scripted.rollout(seed, spread=spread).astype(np.float32) for seed in seeds]


def simulation(task_name=TRANSFER, cameras=("top",), **options):
    return Simulation(task_name, {name: name for name in cameras}, SIZE, **options)


@needs_gl
@pytest.mark.parametrize("task_name", [TRANSFER, INSERTION])
def test_demonstrations_succeed(task_name):
    policy = Replay(demonstrations(task_name, [7, 8], spread=0.5), 50)
    settings = Settings(num_rollouts=2, seed=7, num_envs=2, reasoning_every=2)
    results = ClosedLoop(policy, simulation(task_name, spread=0.5), settings).run()
    assert [(result["rollout"], result["seed"]) for result in results] == [(0, 7), (1, 8)]
    summary = summarize(task_name, results)
    assert summary["success_rate"] == 1.0 and [phase["share"] for phase in summary["reached"]] == [1, 1, 1, 1]
    for result in results:
        assert result["ended"] == "success" and result["highest_reward"] == 4
        assert 200 < result["steps_to_success"] <= 400
        assert result["steps"] == min(result["steps_to_success"] + STEPS_AFTER_SUCCESS, 400)
        assert result["instruction"] == instruction(task_name, result["seed"])
        # a reasoning is written at every other query and reused in between
        assert [step["step"] for step in result["reasonings"]] == list(range(0, result["steps"], 100))
        assert result["reasonings"][1] == {"step": 100, "text": "query 2"}
    assert policy.instructions[0] == [instruction(task_name, 7), instruction(task_name, 8)]
    assert policy.reasonings[:3] == [[None, None], ["query 0", "query 0"], [None, None]]


@needs_gl
def test_other_actions_fail():
    """The wrong seed's demonstration: the arms miss the cube."""
    policy = Replay(demonstrations(TRANSFER, [1004]), 100)
    settings = Settings(num_rollouts=1, seed=1000, no_reasoning=True)
    [result] = ClosedLoop(policy, simulation(), settings).run()
    assert not result["success"] and result["steps"] == 400 and result["ended"] == "time"
    assert result["steps_to_success"] is None and result["reasonings"] == [{"step": 0, "text": ""}]
    summary = summarize(TRANSFER, [result])
    assert summary["success_rate"] == 0 and summary["mean_steps_to_success"] is None
    assert summary["reached"][3] == {"reward": 4, "meaning": "left gripper has the cube off the table", "share": 0}


@needs_gl
def test_differences_are_integrated():
    policy = Replay(demonstrations(TRANSFER, [3]), 40, delta_control=True)
    [result] = ClosedLoop(policy, simulation(), Settings(num_rollouts=1, seed=3)).run()
    assert result["success"]


@needs_gl
def test_the_policy_sees_what_is_there():
    """Observations with three frames of history, against a simulation stepped by hand."""
    [actions] = demonstrations(TRANSFER, [5])
    policy = Replay([actions], 2)
    shared = simulation(cameras=("top", "left_wrist"), history=3, max_steps=8)
    ClosedLoop(policy, shared, Settings(num_rollouts=1, seed=5)).run()
    env = AlohaSimulation(TRANSFER)
    env.reset(5)
    frames, qpos = [], []
    for action in actions[:7]:
        frames.append({camera: image.copy() for camera, image in env.render(("top", "left_wrist"), SIZE).items()})
        qpos.append(env.qpos())
        env.step(action)
    assert len(policy.observations) == 4
    for query, [observation] in enumerate(policy.observations):
        assert np.allclose(observation["qpos"], qpos[2 * query], atol=1e-6)
        for camera in ("top", "left_wrist"):
            expected = [frames[max(0, 2 * query - back)][camera] for back in (2, 1, 0)]  # the first frame repeated
            assert observation["images"][camera].dtype == np.uint8
            assert np.abs(observation["images"][camera].astype(int) - np.stack(expected)).max() <= 2


@needs_gl
def test_only_queries_and_videos_render(tmp_path):
    [actions] = demonstrations(TRANSFER, [5])
    [result] = ClosedLoop(
        Replay([actions], 16), simulation(max_steps=24, video_every=5), Settings(num_rollouts=1, seed=5), tmp_path
    ).run()
    assert result["queries"] == 2 and result["video"] == "videos/seed_5.mp4"
    video = cv2.VideoCapture(str(tmp_path / result["video"]))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(10)  # 50 steps a second, every fifth
    frames = []
    while (frame := video.read()[1]) is not None:
        frames.append(frame)
    assert len(frames) == math.ceil(24 / 5) + 1  # steps 0, 5, .. 20, and the last
    env = AlohaSimulation(TRANSFER)
    env.reset(5)
    shown, rendered = frames[0][:180, :240, ::-1], cv2.resize(env.render(["top"], SIZE)["top"], (240, 180))
    assert np.abs(shown.astype(int) - rendered).mean() < 6
    panel = frames[-1][180:]
    assert (panel[..., 2] > 180).sum() > 200 and (panel[..., 2] < 60).sum() > 10_000  # writing on a dark ground
    assert not list(tmp_path.rglob("*.part"))


@needs_gl
def test_diverged_physics_is_a_failure():
    broken = np.full((200, 14), np.nan, np.float32)
    policy = Replay([*demonstrations(TRANSFER, [0]), broken], 100)
    results = ClosedLoop(policy, simulation(max_steps=200), Settings(num_rollouts=2, seed=0, num_envs=2)).run()
    assert results[0]["ended"] == "time" and results[0]["highest_reward"] == 2
    assert results[1]["ended"] == "physics diverged" and not results[1]["success"] and results[1]["steps"] == 1


@needs_gl
def test_a_robot_that_dies_is_named():
    def kill(query):
        if query == 1:
            robots[1].process.kill()

    policy = Replay(demonstrations(TRANSFER, [0, 1]), 10, act=kill)
    loop = ClosedLoop(policy, simulation(), Settings(num_rollouts=2, seed=0, num_envs=2))
    robots, begin = [], loop._begin
    loop._begin = lambda idle, waiting: robots.extend(idle) or begin(idle, waiting)
    with pytest.raises(UserError, match=r"rollout 1 \(seed 1\): expected its simulator process .* exit code -9"):
        loop.run()
    assert not any(robot.process.is_alive() for robot in robots)


def test_a_machine_without_opengl(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "off")  # the robots' processes choose anew
    loop = ClosedLoop(Replay([np.zeros((8, 14))], 8), simulation(), Settings(num_rollouts=1, seed=4))
    with pytest.raises(UserError, match=r"rollout 0 \(seed 4\): MuJoCo cannot render here"):
        loop.run()


def test_confidence_interval():
    # Wilson (1927): 8 of 10
    assert confidence_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    for successes, trials in [(0, 50), (1, 1), (40, 50), (50, 50), (333, 1000)]:
        expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert confidence_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tiny_base, task, tmp_path_factory):
    """A tiny untrained policy with the simulator's cameras."""
    from aloha_scripts.constants import TASK_CONFIGS

    folder = tmp_path_factory.mktemp("checkpoint")
    stats = get_norm_stats(find_all_hdf5(TASK_CONFIGS[task]["dataset_dir"]))
    return write_checkpoint(folder, tiny_base, stats, untrained=True, camera_names=list(CAMERA_NAMES))


def command(monkeypatch, checkpoint, *options, task_name="sim_transfer_cube"):
    arguments = ["--checkpoint", checkpoint, "--task_name", task_name, "--max_new_tokens", "3", *options]
    monkeypatch.setattr(sys, "argv", ["rollout_sim", "--image_size", "(84,56)", "--max_steps", "24", *arguments])
    rollout_sim.main()


@needs_gl
def test_results_depend_on_the_seeds_alone(checkpoint, tmp_path, monkeypatch, capsys):
    def rollouts(name, *options):
        shared = ["--num_rollouts", "3", "--query_frequency", "6", "--smoothing", "0.5"]
        command(monkeypatch, checkpoint, *shared, "--output", str(tmp_path / name), *options)
        return json.loads((tmp_path / name / "rollouts.json").read_text())

    alone = rollouts("alone")
    printed = capsys.readouterr().out
    assert "success rate 0.0% (0 of 3), 95 % confidence interval 0.0% .. 56.1%" in printed
    assert [line.split()[:4] for line in printed.splitlines()[:3]] == [
        ["rollout", str(i), "seed", str(1000 + i)] for i in range(3)
    ]
    together = rollouts("together", "--num_envs", "2", "--no_video")
    for one, other in zip(alone["rollouts"], together["rollouts"], strict=True):
        assert (tmp_path / "alone" / one.pop("video")).stat().st_size > 1000 and other.pop("video") is None
        # batched, the model's sums are rounded differently
        assert one["final_qpos"] == pytest.approx(other["final_qpos"], abs=2e-3)
        assert one | {"final_qpos": None} == other | {"final_qpos": None} and one["queries"] == 4
    assert alone["settings"]["num_envs"] == 1 and alone["settings"]["query_frequency"] == 6
    assert alone["summary"]["latency"]["calls"] == 12 and alone["summary"]["rollouts"] == 3
    assert not (tmp_path / "together" / "videos").exists()

    other_noise = rollouts("noise", "--noise_seed", "1", "--num_rollouts", "1", "--no_video")
    moved = np.subtract(alone["rollouts"][0]["final_qpos"], other_noise["rollouts"][0]["final_qpos"])
    assert np.abs(moved).max() > 0.01


@needs_gl
def test_ctrl_c_leaves_what_has_ended(checkpoint, tmp_path):
    command = [sys.executable, "-u", "-m", "evaluate.rollout_sim", "--checkpoint", checkpoint, "--max_steps", "8"]
    command += ["--task_name", "sim_transfer_cube", "--num_rollouts", "1000", "--no_video", "--max_new_tokens", "3"]
    command += ["--image_size", "(84,56)", "--device", "cpu", "--output", str(tmp_path)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline().startswith("rollout   0")
    run.send_signal(signal.SIGINT)
    printed, complaints = run.communicate(timeout=60)
    ended = len(json.loads((tmp_path / "rollouts.json").read_text())["rollouts"])
    assert run.returncode == 130 and "Traceback" not in complaints, complaints
    assert f"stopped after {ended} of 1000 rollouts\nsuccess rate" in printed


def test_bad_settings_are_named(checkpoint, tmp_path, monkeypatch, capsys):
    for options, expected in [
        (["--num_envs", "0"], "argument --num_envs: expected an integer >= 1, found '0'"),
        (["--spread", "1.5"], "argument --spread: expected a number from 0 to 1, found '1.5'"),
        (["--image_size", "big"], 'argument --image_size: expected "(width,height)" from (16,16) to (640,480)'),
    ]:
        with pytest.raises(SystemExit):
            command(monkeypatch, checkpoint, "--output", str(tmp_path), *options)
        assert expected in capsys.readouterr().err
    for options, expected in [
        (["--smoothing", "1"], r"^--smoothing: expected a number in \[0, 1\), found 1.0"),
        (["--query_frequency", "9"], "^--query_frequency: expected at most the chunk's 8 actions, found 9"),
    ]:
        with pytest.raises(UserError, match=expected):
            command(monkeypatch, checkpoint, "--output", str(tmp_path), *options)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^--output .*file: expected a folder that can be written, found File"):
        command(monkeypatch, checkpoint, "--output", str(tmp_path / "file"))
    (tmp_path / "file").unlink()
    with pytest.raises(UserError, match="^--task_name: expected one of sim_transfer_cube_scripted, .* 'fold'"):
        command(monkeypatch, checkpoint, task_name="fold")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = other / "config.json"
    config.write_text(config.read_text().replace('"top"', '"cam_high"'))
    with pytest.raises(UserError, match="expected the simulator's cameras top, .* found cam_high, left_wrist"):
        command(monkeypatch, str(other))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
