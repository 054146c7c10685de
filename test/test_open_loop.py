"""Judging a checkpoint by recorded episodes: the measures, the verdicts, the page."""

import base64
import re
import sys
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import pytest

from aloha_scripts.constants import TASK_CONFIGS
from aloha_scripts.scripted_policy import ScriptedPolicy
from aloha_scripts.simulation import MAX_REWARD, SIM_TASKS
from data_utils import EpisodicDataset, UserError, find_episodes, get_norm_stats, open_episode, save_stats
from data_utils.normalization import Moments, make_norm_stats, unnormalize_action
from evaluate import open_loop
from evaluate.judge import Latency, is_go, judge, judge_latency, judge_recordings
from evaluate.measures import Replay, joint_names, measure
from evaluate.report import write_report
from qwen2_vla import Qwen2VLAPolicy
from qwen2_vla.loading import build_config, load_model, load_processor

from .helpers import CAMERAS, GOLDEN, write_episode

T = 8


def replay(recorded, chunks, every, reasonings=None):
    """Of chunks (Q, T, A) that begin at every `every`-th row of `recorded` (N, A)."""
    starts = np.arange(len(chunks)) * every
    hold = recorded[np.maximum(starts - 1, 0)]
    return Replay("episode.hdf5", every, recorded, starts, chunks, hold, reasonings or [(None, "")] * len(chunks))


def test_measures_by_hand():
    recorded = np.array([[0, 0], [1, 10], [2, 20], [3, 30]], np.float32)
    chunks = np.array([[[1, 0], [1, 10]], [[2, 20], [5, 30]]], np.float32)
    texts = [("a b", "a b"), ("a b", "a c")]
    m = measure([replay(recorded, chunks, 2, texts)], {"action_min": np.zeros(2), "action_max": np.array([5, 30])})
    assert m.queries == 2 and m.finite == 1 and m.joints == ["action 0", "action 1"]
    for values, expected in (
        (m.error, [(1 + 0 + 0 + 2) / 4, 0]),
        (m.error_95, [np.percentile([1, 0, 0, 2], 95), 0]),
        (m.first_error, [0.5, 0]),
        (m.holding, [(0 + 1 + 1 + 2) / 4, 10]),
        (m.constant, [1, 10]),
        (m.span, [3, 30]),
        (m.jump, [1, 1]),  # from 1 to 2, as much as a recorded step; from 10 to 20 likewise
        (m.jerk, [1 / (0.002 * 3), 0]),  # 1 1 2 5 has the third difference 1; the straight recording has none
        (m.movement, [np.std([1, 1, 2, 5]) / np.std([0, 1, 2, 3]), 1]),
        (m.limit, [0.25, 0.5]),
        (m.stuck, [0.25, 0]),  # the second joint is where it should be
        (m.by_step, [0.5 / 3 / 2, 1 / 3 / 2]),
        (m.holding_by_step, [(0.5 / 3 + 5 / 30) / 2, (1.5 / 3 + 15 / 30) / 2]),
        (m.followed, (2 * 1 + 5 * 3 + 1 * 1 + 3 * 3) / (2 * (1 + 9))),
        (m.exact, 0.5),
        (m.similarity, (1 + 4 / 6) / 2),
        (m.share(m.error), 0.75 / 3 / 2),
    ):
        assert np.allclose(values, expected, rtol=1e-5)
    assert dict(m.mistakes) == {("a b", "a c"): 1}


def test_chunks_that_overlap():
    recorded = np.arange(5, dtype=np.float32)[:, None]
    chunks = np.full((3, 4, 1), 100, np.float32)  # a query every 2 frames, chunks of 4
    chunks[:, :2, 0] = [[0, 1], [2, 3], [4, 100]]  # the last row is beyond the end
    one = replay(recorded, chunks, 2)
    m = measure([one], {"action_min": np.zeros(1), "action_max": np.full(1, 200)})
    assert m.error == pytest.approx((98 + 97 + 96) / 8) and m.first_error == 0  # 8 of 12 rows were recorded
    assert m.jump == 1 and m.jerk == 0  # between what is executed: 0 .. 4
    assert np.allclose(m.by_step, [0, 0, 97 / 4, 97 / 4])
    assert np.array_equal(one.executed(), recorded) and np.array_equal(one.predicted(), recorded)


def test_an_episode_shorter_than_a_chunk():
    recorded = np.array([[0.0], [1.0]], np.float32)
    m = measure([replay(recorded, np.zeros((1, 9, 1)), 9)], {"action_min": np.zeros(1), "action_max": np.ones(1)})
    assert m.jump is None and m.jerk is None and len(m.by_step) == 2
    levels = {check.name: check.level for check in judge(m)}
    assert levels["jumps between chunks"] == levels["jerk"] == "skipped"
    assert levels["movement of each joint"] == "error"


def demonstration(length=400, dims=7):
    """(N, dims) smooth movements, between -1 and 1; the last joint rests."""
    steps = np.linspace(0, 12, length)[:, None]
    actions = np.sin(steps + np.arange(dims))
    actions[:, -1] = 0.5
    return actions.astype(np.float32)


def chunks_of(recorded, every=20):
    rows = np.minimum(np.arange(0, len(recorded), every)[:, None] + np.arange(every), len(recorded) - 1)
    return recorded[rows].astype(np.float64)  # (Q, T, A)


def bad(chunks, how):
    """Chunks (Q, T, A) of a policy with something the matter."""
    noise = np.random.default_rng(0).normal(size=chunks.shape)
    return {
        "finite numbers": np.where(np.arange(len(chunks))[:, None, None] == 3, [np.nan] * 3 + [np.inf] * 4, chunks),
        "error against holding still": chunks + 0.4 * noise[:, :1],
        "error against a constant action": chunks[::-1],
        "movement that is followed": np.broadcast_to(chunks[:, :1], chunks.shape),
        "movement of each joint": np.where(np.arange(chunks.shape[2]) == 2, 0.1, chunks),
        "jumps between chunks": chunks + 0.2 * noise[:, :1],
        "jerk": chunks + 0.02 * noise,
        "values stuck at the limits": np.where(np.arange(chunks.shape[2]) == 1, 1.0, chunks),
    }[how]


def measured(recorded, chunks, texts=None):
    moments = Moments.of(recorded)
    return measure([replay(recorded, chunks, 20, texts)], make_norm_stats(moments, moments, recorded))


def test_what_was_recorded_is_go():
    recorded = demonstration()
    chunks = chunks_of(recorded)
    m = measured(recorded, chunks, [("Fold.", "Fold.")] * len(chunks))
    checks = judge(m)
    assert [check.level for check in checks] == ["pass"] * 9 and is_go(checks)
    assert np.allclose(m.error, 0) and list(m.moving) == [True] * 6 + [False] and m.followed == pytest.approx(1)
    noisy = chunks + np.random.default_rng(0).normal(scale=0.01, size=(len(chunks), 1, 7))
    assert is_go(judge(measured(recorded, noisy)))  # off by half a percent of the range


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "how",
    ["finite numbers", "error against holding still", "error against a constant action", "movement that is followed",
     "movement of each joint", "jumps between chunks", "jerk", "values stuck at the limits"],
)  # fmt: skip
def test_what_is_wrong_is_named(how):
    recorded = demonstration()
    checks = judge(measured(recorded, bad(chunks_of(recorded), how)))
    wrong = {check.name: check for check in checks if check.level == "error"}
    assert how in wrong and wrong[how].advice and not is_go(checks)
    if how in ("jumps between chunks", "jerk"):  # which leave the rest as it should be
        assert set(wrong) <= {"jumps between chunks", "jerk"}
    if how == "movement of each joint":
        assert "action 2" in wrong[how].found


def test_reasonings_that_are_wrong():
    recorded = demonstration()
    chunks = chunks_of(recorded)
    right, wrong = ("Fold the shirt.", "Fold the shirt."), ("Fold the shirt.", "Open the gripper.")
    nearly = ("Fold the shirt on the table.", "Fold the shirt on the table")
    level = {}
    for name, texts in {"right": [right], "wrong": [right, wrong, wrong], "nearly": [nearly]}.items():
        checks = judge(measured(recorded, chunks, (texts * 20)[: len(chunks)]))
        level[name] = next(check.level for check in checks if check.name == "reasoning")
    assert level == {"right": "pass", "wrong": "error", "nearly": "warning"}
    assert "reasoning" not in [check.name for check in judge(measured(recorded, chunks))]


def test_latency_against_the_control_period():
    fast, slow, slower = (judge_latency(Latency(900, p50, 120, 9), 5, 50) for p50 in (50, 90, 110))  # 5 steps: 100 ms
    assert judge_latency(Latency(900, 50, 90, 9), 5, 50).level == "pass"
    assert judge_latency(Latency(900, 50, 120, 9), 5, 30).level == "pass"  # 167 ms
    assert fast.level == slow.level == slower.level == "warning" and fast.advice == slow.advice != slower.advice


def make_checkpoint(folder, base, paths, **options):
    data = {"camera_names": CAMERAS, "image_size_stable": [84, 56], "image_size_wrist": [56, 56],
            "use_reasoning": True, "delta_control": False, "task_name": "test_task"} | options  # fmt: skip
    dim = open_episode(paths[0]).action.shape[1]
    config = build_config(
        base, depth=1, width=64, num_heads=4, chunk_size=T, action_dim=dim, state_dim=dim, data_config=data
    )
    load_model(base, config).save_pretrained(folder)
    load_processor(base).save_pretrained(folder)
    save_stats(get_norm_stats(paths), folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tiny_base, task, tmp_path_factory):
    paths = find_episodes(TASK_CONFIGS[task]["dataset_dir"])
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_base, paths)


class Oracle:
    """Stands in for `predict`: answers what training teaches for the recorded frame that it is shown."""

    def __init__(self, policy, paths, camera_names=CAMERAS, camera_map=None):
        self.policy, self.calls = policy, []
        self.data = EpisodicDataset(paths, camera_names, policy.stats, T, image_size_stable=(84, 56),
                                    delta_control=policy.delta_control, camera_map=camera_map)  # fmt: skip
        self.qpos = np.concatenate([open_episode(path).qpos for path in paths])

    def __call__(self, observations, instructions, *, noise, reasoning=None, **options):
        assert noise.shape == (len(observations), T, self.policy.action_dim) and len(instructions) == len(observations)
        for observation in observations:
            self.policy.check(observation)
        self.calls.append(SimpleNamespace(observations=observations, reasoning=reasoning, **options))
        items = [self.data[int(np.abs(self.qpos - o["qpos"]).sum(axis=1).argmin())] for o in observations]
        actions = [unnormalize_action(item["action"].numpy(), self.policy.stats) for item in items]
        return np.stack(actions), [item["reasoning"] if reasoning is None else reasoning for item in items]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["open_loop", *map(str, arguments)])
    return open_loop.main()


def test_a_perfect_policy_is_go(checkpoint, task, tmp_path, monkeypatch, capsys):
    paths = find_episodes(TASK_CONFIGS[task]["dataset_dir"])
    oracles = []

    def perfect(self, *args, **options):
        oracles[:] = oracles or [Oracle(self, paths)]
        return oracles[0](*args, **options)

    monkeypatch.setattr(Qwen2VLAPolicy, "predict", perfect)
    report, output = tmp_path / "new" / "report.html", tmp_path / "actions.png"
    files = ["--report", report, "--output", output]
    assert run(monkeypatch, "--checkpoint", checkpoint, "--task_name", task, "--strict", *files) == 0
    printed = capsys.readouterr().out
    assert (
        "\nGO: 0 errors" in printed and "recorded: Pick up the cube.\n            written: Pick up the cube." in printed
    )
    page = report.read_text()
    assert all(f"<td>{joint}</td>" in page for joint in joint_names(14)) and "http" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2  # error over the chunk, one held-out episode
    for data in [output.read_bytes(), *map(base64.b64decode, pictures)]:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape[1] > 500 and picture.std() > 10
    assert '<b class="pass">GO</b>' in page and ">skipped<" in page  # no simulated task


@pytest.mark.parametrize(
    ("sim", "options"),
    [(False, {}), (True, {"delta_control": True}), (False, {"delta_control": True}),
     (True, {"history_images_length": 3}), (True, {"use_reasoning": False})],
)  # fmt: skip
def test_replays_agree_with_training(tiny_base, tmp_path, sim, options):
    path = str(write_episode(tmp_path / "data" / "episode_0.hdf5", length=21, sim=sim))
    policy = Qwen2VLAPolicy.from_pretrained(make_checkpoint(tmp_path, tiny_base, [path], **options), device="cpu")
    policy.predict = oracle = Oracle(policy, [path])
    replayer = open_loop.Replayer(policy, every=5)
    one = replayer.replay(open_episode(path))
    m = measure([one], policy.stats)
    assert len(one.chunks) == 5 and np.allclose(m.error, 0, atol=1e-5)
    assert np.allclose(one.predicted()[:20], one.recorded[:20], atol=1e-5)
    if policy.delta_control:
        assert not one.hold.any() and np.allclose(one.recorded[:-1], np.diff(open_episode(path).action, axis=0))
    assert m.exact == (1 if policy.use_reasoning else None)
    if policy.history > 1:
        assert oracle.calls[0].observations[0]["images"][CAMERAS[0]].shape == (3, 48, 64, 3)
    silent = open_loop.Replayer(policy, reasoning="").replay(open_episode(path))
    assert oracle.calls[-1].reasoning == "" and measure([silent], policy.stats).exact is None


def test_lerobot_episodes(tiny_base, tmp_path):
    paths = find_episodes(str(GOLDEN / "lerobot" / "lerobot_v30"))
    names = {"cam_high": "top", "cam_left_wrist": "left_wrist", "cam_right_wrist": "right_wrist"}
    policy = Qwen2VLAPolicy.from_pretrained(make_checkpoint(tmp_path, tiny_base, paths), device="cpu")
    policy.predict = Oracle(policy, paths, camera_map=names)
    replays = [open_loop.Replayer(policy, names).replay(open_episode(path)) for path in paths]
    m = measure(replays, policy.stats)
    assert np.allclose(m.error, 0, atol=1e-4) and m.queries == sum(-(-len(open_episode(p)) // T) for p in paths)
    assert open_loop.recorded_rewards(SIM_TASKS[0], paths) == {}


def test_an_untrained_policy_is_no_go(checkpoint, task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(open_loop, "LATENCY_QUERIES", 2)
    arguments = ["--checkpoint", checkpoint, "--task_name", task, "--no_reasoning", "--report", tmp_path / "a.html",
                 "--output", tmp_path / "a.png"]  # fmt: skip
    assert run(monkeypatch, *arguments) == 0
    assert run(monkeypatch, *arguments, "--strict", "--query_every", 3) == 1
    printed = capsys.readouterr().out
    assert printed.count("NO-GO: ") == 2 and "below 60 ms, 3 × 20 ms" in printed


def test_noise_depends_on_seed_and_frame_only(checkpoint, task):
    policy = Qwen2VLAPolicy.from_pretrained(checkpoint, device="cpu")
    episode = open_episode(find_episodes(TASK_CONFIGS[task]["dataset_dir"])[0])
    replayer = open_loop.Replayer(policy, reasoning="")
    cameras = {name: name for name in CAMERAS}
    together, _ = replayer.ask(episode, cameras, [2, 7])
    alone, _ = replayer.ask(episode, cameras, [7])
    other, _ = open_loop.Replayer(policy, reasoning="", seed=1).ask(episode, cameras, [7])
    assert np.allclose(together[1], alone[0], atol=1e-3)
    assert all(not np.allclose(chunk, alone[0], atol=1e-2) for chunk in (together[0], other[0]))


def test_bad_input_is_named(checkpoint, task, tmp_path, monkeypatch):
    def fails(*more):
        with pytest.raises(UserError) as caught:
            run(monkeypatch, "--checkpoint", checkpoint, "--task_name", task, *more)
        return str(caught.value)

    assert "--query_every: expected 1 .. 8" in fails("--query_every", 9)
    assert "--episodes: expected an integer >= 1, found 0" in fails("--episodes", 0)
    assert "--simulate: expected none or one of sim_transfer" in fails("--simulate", "sim_fold")
    assert "--task_name: expected one of" in fails("--task_name", "unknown")
    assert "expected a file that can be written, found Is a directory" in fails("--report", tmp_path)
    other = write_episode(tmp_path / "other.hdf5", cameras=["top"])
    assert "other.hdf5: expected cameras cam_high, cam_left_wrist" in fails("--episode", other)
    other = write_episode(tmp_path / "other.hdf5", dim=7)
    assert "other.hdf5: action: expected 14 dimensions, as the policy has, found 7" in fails("--episode", other)
    for values, message in ((np.nan, "action: expected finite numbers, found others in frame 3"), (None, "that move")):
        other = write_episode(tmp_path / "other.hdf5")
        with h5py.File(other, "a") as file:
            if values is None:
                file["action"][:] = 1
            else:
                file["action"][3, 2] = values
        assert message in fails("--episode", other, "--no_reasoning")
    monkeypatch.setitem(TASK_CONFIGS, task, TASK_CONFIGS[task] | {"train_ratio": 1})
    assert "train_ratio leaves no episode for validation" in fails()


@pytest.mark.filterwarnings("error")
def test_odd_texts_and_numbers_in_a_page(tmp_path):
    recorded = demonstration()
    chunks = chunks_of(recorded)
    chunks[2, 3:, 0], chunks[4, :, 1] = np.nan, np.inf
    one = replay(recorded, chunks, 20, [("a", "<script>")] * len(chunks))
    m = measured(recorded, chunks, one.reasonings)
    write_report(str(tmp_path / "page.html"), "<b>", [one], m, judge(m), Latency(3, 2, 1, 1), {"<i>.hdf5": 4})
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;" in page and "<script>" not in page and "<i>.hdf5" not in page


def test_recorded_actions_in_the_simulator(tmp_path):
    actions = ScriptedPolicy(SIM_TASKS[0]).rollout(3, spread=0.5).astype(np.float32)  # (N, 14)
    folded = actions.copy()
    folded[:, -1] = 1  # the right gripper never closes
    paths = [str(tmp_path / f"{name}.hdf5") for name in ("good", "corrupted", "elsewhere", "real")]
    for path, rows, attributes in zip(paths, (actions, folded, actions, actions), ((3, 0.5), (3, 0.5), (9, 1.0), None)):
        with h5py.File(path, "w") as file:
            file["action"] = rows
            if attributes:
                file.attrs["seed"], file.attrs["spread"] = attributes
    rewards = open_loop.recorded_rewards(SIM_TASKS[0], paths)
    assert list(rewards) == paths[:3] and rewards[paths[0]] == MAX_REWARD > max(rewards[path] for path in paths[1:3])
    assert judge_recordings({paths[0]: 4}, MAX_REWARD).level == "pass"
    assert judge_recordings({paths[0]: 4, paths[1]: 1}, MAX_REWARD).level == "warning"
    bad_data = judge_recordings(rewards, MAX_REWARD)
    assert bad_data.level == "error" and "the data is at fault" in bad_data.advice and paths[1] in bad_data.advice
