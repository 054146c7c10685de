"""The model server for the harness vla-eval: the harness's own client, runner and configuration against it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import vla_eval
import yaml
from vla_eval.connection import Connection
from vla_eval.specs import IMAGE_RGB, LANGUAGE, STATE_EEF_POS_AA_GRIP, DimSpec, check_specs

from data_utils import UserError
from evaluate.vla_eval_server import DexVLAModelServer

from .helpers import ROOT
from .vla_eval_cases import LIBERO, LiberoWithoutAssets, observation, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory):
    return write_checkpoint(tiny_base, tmp_path_factory.mktemp("libero"))


def make_server(checkpoint: str, **arguments) -> DexVLAModelServer:
    return DexVLAModelServer(checkpoint, "cpu", **({"max_new_tokens": 3} | arguments))


def queries_of(server: DexVLAModelServer) -> list[list[dict]]:
    """The observations of every query of the policy from now on."""
    seen, predict = [], server.policy.predict

    def watched(observations, *arguments, **options):
        seen.append(observations)
        return predict(observations, *arguments, **options)

    server.policy.predict = watched
    return seen


@contextmanager
def served(server: DexVLAModelServer):
    with vla_eval.serve_background(server) as handle:
        yield handle.url


async def play(url: str, steps: int, task: str = "open the drawer", make=observation) -> np.ndarray:
    """One episode -> actions (steps, A)."""
    async with Connection(url, timeout=60) as connection:
        await connection.start_episode({"task": {"name": task, "episode_idx": 0}})
        replies = [await connection.act(make(step)) for step in range(steps)]
        await connection.end_episode({"metrics": {"success": False}, "steps": steps})
    return np.stack([reply["actions"] for reply in replies])


async def forgotten(server: DexVLAModelServer):
    while server.sessions:
        await asyncio.sleep(0.01)


def test_the_client_gets_the_policys_chunks(checkpoint):
    server = make_server(checkpoint)
    queries = queries_of(server)
    with served(server) as url:
        actions = asyncio.run(play(url, 10))
        asyncio.run(asyncio.wait_for(forgotten(server), 30))
        again = asyncio.run(play(url, 10))
        other = asyncio.run(play(url, 10, task="close the drawer"))
    assert actions.shape == (10, 7) and actions.dtype == np.float32
    assert len(queries) == 6  # at steps 0 and 8 of three episodes
    sent = observation(8)
    asked = queries[1][0]
    assert np.array_equal(asked["qpos"], sent["states"].astype(np.float32))
    assert all(np.array_equal(asked["images"][camera], sent["images"][camera]) for camera in sent["images"])
    episode = zlib.crc32(b'{"episode_idx": 0, "name": "open the drawer"}')  # the noise is the episode's
    noise = np.random.default_rng([0, episode]).standard_normal((8, 7), np.float32)
    chunk, _ = server.policy.predict(queries[0][0], "open the drawer", 3, noise=noise)
    assert np.allclose(actions[:8], chunk, atol=1e-5)
    assert np.allclose(actions, again, atol=1e-5) and not np.allclose(actions, other, atol=1e-2)


def test_query_frequency_and_ensemble(checkpoint):
    for arguments, expected in (({"query_frequency": 3}, 4), ({"ensemble": True}, 10)):
        server = make_server(checkpoint, **arguments)
        queries = queries_of(server)
        with served(server) as url:
            asyncio.run(play(url, 10))
        assert len(queries) == expected
    server = make_server(checkpoint, ensemble=True, no_reasoning=True)
    chunks, predict = [], server.policy.predict
    server.policy.predict = lambda *a, **b: chunks.append(predict(*a, **b)) or chunks[-1]
    with served(server) as url:
        actions = asyncio.run(play(url, 2))
    (first,), (second,) = chunks[0][0], chunks[1][0]
    weights = np.exp([0, -0.01])
    assert np.allclose(actions[1], (weights[0] * first[1] + weights[1] * second[0]) / weights.sum(), atol=1e-5)
    assert chunks[0][1] == [""]  # no reasoning


def test_two_sessions_share_a_batch_and_do_not_mix(checkpoint):
    async def both(url):
        return await asyncio.gather(play(url, 9), play(url, 9, "close it", lambda step: observation(step + 50)))

    with served(make_server(checkpoint)) as url:
        alone = [asyncio.run(play(url, 9)), asyncio.run(play(url, 9, "close it", lambda s: observation(s + 50)))]
    server = make_server(checkpoint, max_batch_size=2, max_wait_time=0.5)
    queries = queries_of(server)
    with served(server) as url:
        together = asyncio.run(both(url))
    assert max(map(len, queries)) == 2 and sum(map(len, queries)) == 4
    for one, other in zip(alone, together):
        assert np.allclose(one, other, atol=1e-4)


def test_a_wrong_observation_fails_alone(checkpoint):
    """Its batch is answered, and the session goes on."""

    async def mixed(url):
        async with Connection(url, timeout=60) as connection:
            await connection.start_episode({"task": {"name": "x"}})
            good = asyncio.create_task(play(url, 1))
            with pytest.raises(RuntimeError, match="states: the checkpoint expects a state of 8 numbers.*sends 7"):
                await connection.act(observation(states=np.zeros(7)))
            assert (await connection.act(observation()))["actions"].shape == (7,)
            return await good

    with served(make_server(checkpoint, max_batch_size=2, max_wait_time=0.2)) as url:
        assert asyncio.run(mixed(url)).shape == (1, 7)


def test_wrong_observations_are_named(checkpoint):
    cases = [
        (observation(cameras=("agentview",)), r"images: .* expects agentview, wrist, the benchmark sends agentview;"),
        (observation(cameras=("a", "b", "c")), "expects agentview, wrist, the benchmark sends a, b, c; camera_map"),
        (observation(images=None), "the benchmark sends none"),
        (observation(states=None), "states: the checkpoint expects a state of 8 .* sends images, task_description"),
        (observation(states=np.full(8, np.nan)), r"qpos\[0\]: expected finite numbers"),
        (observation(task_description=None), "task_description: expected the instruction, found None"),
        (observation(task_description=""), "task_description: expected the instruction"),
        (observation(images={c: np.zeros((48, 48), np.uint8) for c in ("agentview", "wrist")}), "images.*agentview"),
    ]

    async def ask(url):
        async with Connection(url, timeout=60) as connection:
            with pytest.raises(RuntimeError, match="expected EPISODE_START first"):
                await connection.act(observation())
            await connection.start_episode({})
            for sent, message in cases:
                with pytest.raises(RuntimeError, match=message):
                    await connection.act(sent)

    server = make_server(checkpoint)
    queries = queries_of(server)
    with served(server) as url:
        asyncio.run(ask(url))
    assert not queries  # none of them would have spoilt a batch


def test_names_of_benchmarks(checkpoint, caplog):
    """Cameras and states that are called otherwise."""
    state = np.arange(8.0)
    cases = [
        ({}, observation(cameras=("front", "hand"), states=None, joint_state=state), ("front", "hand")),
        ({}, observation(cameras=("wrist", "front"), states=state), ("front", "wrist")),  # one of them is known
        ({"camera_map": {"agentview": "c", "wrist": "a"}}, observation(cameras="abc", states=state), ("c", "a")),
        ({"state_keys": ["arm", "hand"]}, observation(arm=state[:7], hand=state[7]), ("agentview", "wrist")),
        ({}, observation(states=None, state={"arm": state[:3], "rest": state[3:]}), ("agentview", "wrist")),
        ({"zero_state": True}, observation(states=None), ("agentview", "wrist")),
    ]
    for arguments, sent, (first, second) in cases:
        server = make_server(checkpoint, **arguments)
        queries = queries_of(server)
        with served(server) as url:
            asyncio.run(play(url, 1, make=lambda _, sent=sent: sent))
        asked = queries[0][0]
        assert np.array_equal(asked["qpos"], np.zeros(8) if "zero_state" in arguments else state)
        assert np.array_equal(asked["images"]["agentview"], sent["images"][first])
        assert np.array_equal(asked["images"]["wrist"], sent["images"][second])
    guesses = [record.message for record in caplog.records if "in order" in record.message]
    assert len(guesses) == 2 and "agentview = front, wrist = hand" in guesses[0]  # of six cases


def test_past_frames_and_restarts(tiny_base, tmp_path):
    """CALVIN goes on to the next instruction within an episode, and some steps come without images."""
    server = make_server(write_checkpoint(tiny_base, tmp_path, history=2), query_frequency=4)
    queries = queries_of(server)

    def make(step):
        return observation(step, episode_restart=True if step == 6 else None)

    with served(server) as url:
        asyncio.run(play(url, 7, make=make))
    frames = [[query[0]["images"]["wrist"][i] for i in (0, 1)] for query in queries]
    expected = [(0, 0), (3, 4), (6, 6)]  # the first frame stands for those before it
    assert len(frames) == len(expected)
    for pair, steps in zip(frames, expected):
        for frame, step in zip(pair, steps):
            assert np.array_equal(frame, observation(step)["images"]["wrist"])


def test_steps_that_are_not_rendered(checkpoint):
    """RoboTwin may leave images out as long as the chunk lasts."""
    with served(make_server(checkpoint)) as url:
        actions = asyncio.run(play(url, 8, make=lambda step: observation(step) if step == 0 else {}))
    assert actions.shape == (8, 7)


def test_differences_add_up_to_joint_positions(tiny_base, tmp_path, caplog):
    server = make_server(write_checkpoint(tiny_base, tmp_path / "joints", actions=8, delta=True))
    chunks, predict = [], server.policy.predict
    server.policy.predict = lambda *a, **b: chunks.append(predict(*a, **b)) or chunks[-1]
    with served(server) as url:
        actions = asyncio.run(play(url, 10))
    differences = np.concatenate([chunk[0][0] for chunk in chunks])[:10]
    assert len(chunks) == 2 and np.allclose(actions, observation(0)["states"] + differences.cumsum(0), atol=1e-4)
    assert "the benchmark gets differences" not in caplog.text
    make_server(write_checkpoint(tiny_base, tmp_path / "poses", delta=True))
    assert "the benchmark gets differences" in caplog.text


def test_what_the_harness_is_told(checkpoint):
    server = make_server(checkpoint, action_spec=LIBERO, observation_params={"quat_no_antipodal": True})
    assert server.get_observation_params() == {
        "send_state": True, "send_wrist_image": True, "quat_no_antipodal": True
    }  # fmt: skip
    bench = {"agentview": IMAGE_RGB, "wrist": IMAGE_RGB, "language": LANGUAGE, "state": STATE_EEF_POS_AA_GRIP}
    wanted = LiberoWithoutAssets(send_wrist_image=True, send_state=True)
    assert wanted.get_observation_spec() == bench
    assert not check_specs(server.get_action_spec(), wanted.get_action_spec(), server.get_observation_spec(), bench)
    small = bench | {"state": DimSpec("state", 7, "joints7")}
    warnings = check_specs(server.get_action_spec(), wanted.get_action_spec(), server.get_observation_spec(), small)
    assert len(warnings) == 1 and "joints7" in warnings[0]
    assert make_server(checkpoint).get_action_spec()["actions"].dims == 7
    assert "state" not in make_server(checkpoint, zero_state=True).get_observation_spec()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"camera_map": {"top": "agentview"}},
            "camera_map: expected the checkpoint's cameras agentview, wrist, found top",
        ),
        ({"query_frequency": 9}, r"query_frequency: expected 1 .. 8 \(the chunk\), found 9"),
        ({"smoothing": 1.0}, "smoothing: expected a number in"),
        ({"unnorm_key": "franka"}, "unnorm_key: expected one of .*, found franka"),
        ({"action_spec": {"position": "delta_xyz"}}, r"checkpoint's 7 numbers, found 3 of position \(3\)"),
        ({"action_spec": {"position": "up"}}, "position: expected one of delta_xyz, absolute_xyz, found up"),
        ({"action_spec": {"leg": "up"}}, "leg: expected no component leg, found up"),
    ],
)
def test_arguments_that_do_not_fit_the_checkpoint(checkpoint, arguments, message):
    with pytest.raises(UserError, match=message):
        make_server(checkpoint, **arguments)


def test_the_harness_runs_libero(checkpoint, tmp_path, caplog):
    """Orchestrator, runner, recording and LIBERO's benchmark as they are, but for the simulator under them."""
    config = {
        "server": {"timeout": 60},
        "benchmarks": [
            {"benchmark": f"{LiberoWithoutAssets.__module__}:LiberoWithoutAssets", "episodes_per_task": 2,
             "params": {"seed": 0}}
        ],
    }  # fmt: skip
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
    server = make_server(checkpoint, action_spec=LIBERO, observation_params={"quat_no_antipodal": True})
    queries = queries_of(server)
    LiberoWithoutAssets.episodes.clear()
    with caplog.at_level("WARNING"):
        (result,) = vla_eval.evaluate(server, str(tmp_path / "eval.yaml"), output_dir=tmp_path / "out", docker=False)
    assert not [record for record in caplog.records if record.name.startswith(("vla_eval", "evaluate"))]
    assert result["mean_success"] == 1 and sum(len(task["episodes"]) for task in result["tasks"]) == 4
    assert len(LiberoWithoutAssets.episodes) == 4 and len(queries) == 4 * 2
    for episode, (asked,) in zip(LiberoWithoutAssets.episodes, queries[1::2]):
        upright = asked["images"]["agentview"]  # at step 8
        assert (upright[-8:, -8:] == 9).all() and upright[:-8].max() == 0
        assert (asked["images"]["wrist"] == np.where(upright == 9, 109, 100)).all()
        assert abs(episode.position).min() > 0 and set(episode.grippers) <= {-1.0, 1.0}
        assert np.allclose(asked["qpos"][3:], [0, 0, 0, 0.04, -0.04])
    assert list((tmp_path / "out").glob("recording-*.sqlite"))


def test_the_command_with_the_documented_configuration(checkpoint, tmp_path):
    settings = {
        "checkpoint": checkpoint,
        "device": "cpu",
        "camera_map": {"agentview": "agentview", "wrist": "wrist"},
        "query_frequency": 5,
        "max_batch_size": 16,
        "action_spec": LIBERO,
        "observation_params": {"quat_no_antipodal": True},
    }
    (tmp_path / "libero.yaml").write_text(yaml.safe_dump({"args": settings}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "evaluate.vla_eval_server", "--config", str(tmp_path / "libero.yaml")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--args.max_new_tokens", "3"],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.2)

            async def ask():
                async with Connection(f"ws://127.0.0.1:{port}", timeout=60) as connection:
                    await connection.start_episode({"task": {"name": "x"}})
                    reply = await connection.act(observation())
                    return connection.server_info, reply

            info, reply = asyncio.run(ask())
            second = subprocess.run(
                [*command, "--port", str(port)], cwd=ROOT, capture_output=True, text=True, timeout=200
            )
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    assert second.returncode == 1 and second.stderr.endswith("error: --port: expected a free port, found one in use\n")
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert f"ws://127.0.0.1:{port}" in (tmp_path / "log").read_text()  # not on every interface
    assert reply["actions"].shape == (7,) and isinstance(reply["reasoning"], str)
    assert info["model_server"] == "DexVLAModelServer" and set(info["action_spec"]) == set(LIBERO)
    assert info["observation_params"]["quat_no_antipodal"] is True
    wrong = subprocess.run(
        [*command, "--args.query_frequency", "99"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert wrong.returncode == 1 and wrong.stderr.strip().splitlines()[-1].startswith(
        "error: query_frequency: expected"
    )
