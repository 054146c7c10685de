"""The robot's side: connecting, real-time chunking, the loop in the simulator, the load test."""

import concurrent.futures
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from aloha_scripts.simulation import GL_BACKEND, GL_MISSING
from evaluate import client as client_module
from evaluate.client import AsyncChunks, Chunks, PolicyClient, PolicyError, run
from evaluate.serving import Batcher

from .helpers import ROOT
from .serving import CHUNK, DIM, observation, serving

needs_gl = pytest.mark.skipif(GL_BACKEND == "off", reason=GL_MISSING.format(backend=GL_BACKEND))


@pytest.fixture(scope="module")
def url(aloha_policy):
    with serving(aloha_policy, batcher=Batcher(aloha_policy, max_new_tokens=3)) as address:
        yield f"ws://{address}"


@pytest.fixture
def client(url):
    with PolicyClient(url) as client:
        yield client


class Robot:
    """Notes what it is told to do."""

    def __init__(self):
        self.commands = []

    def observe(self) -> dict:
        return observation(len(self.commands))

    def step(self, action: np.ndarray) -> float:
        self.commands.append(action)
        return float(len(self.commands))


class Delayed:
    """A server's answers, held back until the robot has made so many steps: `delays`, one for each query.

    `asked` lists for each query the step it was sent at, what was sent and the chunk that came.
    """

    def __init__(self, infer, delays: list[int]):
        self.infer, self.delays = infer, delays
        self.asked: list[tuple[int, dict, np.ndarray]] = []
        self.step = 0
        self.release = threading.Semaphore(0)

    def __call__(self, message: dict) -> dict:
        reply = self.infer(message)
        self.asked.append((int(message["session"]), message, reply["actions"]))
        if self.delays[len(self.asked) - 1]:
            assert self.release.acquire(timeout=60)
        return reply

    def drive(self, chunks: AsyncChunks, steps: int) -> np.ndarray:
        """The executed actions (steps, A)."""
        executed, due, delays = [], None, iter(self.delays[1:])
        for self.step in range(steps):
            under_way = chunks._answer
            if under_way is not None and self.step == due:
                self.release.release()
                concurrent.futures.wait([under_way])
            executed.append(chunks.next_action(lambda: observation(self.step, session=str(self.step))))
            if chunks._answer is not None and chunks._answer is not under_way:
                due = self.step + next(delays)
        self.release.release()
        chunks.close()
        return np.stack(executed)


def test_chunks_go_over_into_each_other(client):
    """Answers take two steps, as expected."""
    delayed = Delayed(client.infer, [0] + [2] * 10)
    chunks = AsyncChunks(delayed, query_frequency=4, dt=1000.0)
    executed = delayed.drive(chunks, 24)
    assert [step for step, _, _ in delayed.asked] == [0, 4, 8, 12, 16, 20]
    assert chunks.late == chunks.held == 0
    assert "prefix" not in delayed.asked[0][1]
    for (before, _, old), (at, message, new) in zip(delayed.asked, delayed.asked[1:]):
        assert message["frozen"] == 2 and np.array_equal(message["prefix"], old[at - before :])
        assert np.allclose(new[:2], old[at - before :][:2], atol=1e-4)  # what the robot did while the server computed
        assert np.array_equal(executed[at : at + 2], old[at - before :][:2])
        end = min(at + 6, 24)
        assert np.array_equal(executed[at + 2 : end], new[2 : end - at])  # and then the new chunk, from there on
    assert not np.allclose(delayed.asked[0][2][6], delayed.asked[1][2][2], atol=1e-3)  # the rest of it is new


def test_late_answers(client):
    """One comes a step late, one after the chunk has ended, one when even the new chunk would have ended."""
    delayed = Delayed(client.infer, [0, 3, 6, 9, 2, 2])
    chunks = AsyncChunks(delayed, query_frequency=4, dt=1000.0)
    executed = delayed.drive(chunks, 30)
    (_, _, first), (_, _, second), (_, _, third), (_, _, fourth), (_, _, fifth) = (
        asked[:3] for asked in delayed.asked[:5]
    )
    assert [step for step, _, _ in delayed.asked[:5]] == [0, 4, 8, 14, 23]
    assert [message.get("frozen") for _, message, _ in delayed.asked[:5]] == [None, 2, 3, 2, None]
    assert np.array_equal(executed[4:7], first[4:7])
    assert np.array_equal(executed[7:12], second[3:8])  # taken up where the robot is
    assert np.array_equal(executed[12:14], second[[7, 7]])  # its last command is held
    assert np.array_equal(executed[14:16], third[6:8])
    assert np.array_equal(executed[16:25], third[[7] * 9])  # the fourth is past altogether, and asked anew
    assert np.array_equal(executed[25:27], fifth[2:4])
    assert np.isfinite(fourth).all()
    assert (chunks.late, chunks.held) == (4, 2 + 9)


def test_differences_are_held_as_zeros(client):
    delayed = Delayed(client.infer, [0, 9, 0])
    executed = delayed.drive(AsyncChunks(delayed, 8, 1000.0, delta_control=True), 12)
    assert np.array_equal(executed[:8], delayed.asked[0][2]) and not executed[8:].any()


def test_a_busy_server_is_asked_again(client):
    answers = [client.infer, 504, 503, client.infer, 400]

    def infer(message: dict) -> dict:
        answer = answers.pop(0)
        if isinstance(answer, int):
            raise PolicyError("in the way", answer)
        return answer(message)

    chunks = AsyncChunks(infer, 4, 1000.0)
    with pytest.raises(PolicyError, match="in the way") as refusal:
        for _ in range(100):
            chunks.next_action(observation)
            if chunks._answer is not None:
                concurrent.futures.wait([chunks._answer])
    assert refusal.value.status == 400 and not answers and chunks.late >= 2
    with pytest.raises(PolicyError, match="too busy to answer the first query"):
        answers[:] = [503]
        AsyncChunks(infer, 4, 1000.0).next_action(observation)
    with pytest.raises(ValueError, match="dt: expected more than 0 s"):
        AsyncChunks(infer, 4, 0.0)


def test_waiting_for_chunks(client):
    robot, asked = Robot(), []
    chunks = Chunks(lambda message: asked.append(message) or client.infer(message), query_frequency=5)
    assert run(robot, chunks, 12, fps=0) == 12.0
    assert len(asked) == len(chunks.latencies) == 3 and np.stack(robot.commands).shape == (12, DIM)
    assert all(np.array_equal(asked[i]["state"], observation(5 * i)["state"]) for i in range(3))


def test_a_history_of_frames(aloha_policy, monkeypatch):
    monkeypatch.setattr(aloha_policy, "history", 3)
    asked = []
    batcher = Batcher(aloha_policy, max_new_tokens=3)
    with serving(aloha_policy, batcher=batcher) as address, PolicyClient(f"ws://{address}") as client:
        chunks = Chunks(lambda message: asked.append(message) or client.infer(message), query_frequency=4)
        run(Robot(), chunks, 9, fps=0, history=client.metadata["history_images_length"])
    for message, steps in zip(asked, ([0, 0, 0], [2, 3, 4], [6, 7, 8]), strict=True):
        seen = [observation(step) for step in steps]
        assert np.array_equal(message["state"], seen[-1]["state"])
        for camera, frames in message["images"].items():
            assert np.array_equal(frames, np.stack([one["images"][camera] for one in seen]))


def test_differences_add_up_to_commands(client):
    robot, said = Robot(), []
    chunks = Chunks(lambda message: said.append(client.infer(message)) or said[-1], CHUNK)
    run(robot, chunks, CHUNK, fps=0, delta_control=True)
    expected = observation(0)["state"] + np.cumsum(said[0]["actions"], axis=0)
    assert np.allclose(np.stack(robot.commands), expected, atol=1e-5)


def test_failures_are_explained(url, client):
    with pytest.raises(PolicyError, match="ws://127.0.0.1:9: expected a policy server, found none"):
        PolicyClient("ws://127.0.0.1:9")
    with pytest.raises(PolicyError, match="http://nowhere: expected a url such as ws://"):
        PolicyClient("http://nowhere")
    with pytest.raises(PolicyError, match="answers with status 404 instead of a WebSocket"):
        PolicyClient(f"{url}/nowhere")
    with pytest.raises(PolicyError, match=r"state: expected shape \(14,\), found \(3,\)") as refusal:
        client.infer(observation(state=np.zeros(3)))
    assert refusal.value.status == 400
    client.timeout = 1e-9
    with pytest.raises(PolicyError, match="no answer within 1e-09 s"):
        client.infer(observation())
    with pytest.raises(PolicyError, match="has closed the connection"):
        client.infer(observation())  # and never the answer to the query before


def test_a_robot_needs_no_torch():
    command = "import sys, evaluate.client; sys.exit(bool({'torch', 'transformers', 'mujoco'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


@needs_gl
def test_command_drives_the_simulator(url, monkeypatch, capsys):
    def command(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["client", "--url", url, "--steps", "20", *flags])
        client_module.main()
        return capsys.readouterr().out

    plain = command("--fps", "0", "--query_frequency", "7")
    assert re.fullmatch(r"highest reward [0-4] of 4, 20 steps at [\d.]+ a second\n3 queries, latency .*\n", plain), (
        plain
    )
    smooth = command("--asynchronous", "--fps", "20", "--task_name", "sim_insertion")
    assert re.search(r"\n\d late replies, \d+ steps held\n$", smooth), smooth
    for flags, expected in [
        (["--task_name", "juggle"], "--task_name: unknown simulated task 'juggle'"),
        (["--query_frequency", "9"], "--query_frequency: expected 1 to the chunk's 8 actions, found 9"),
        (["--query_frequency", "0"], "--query_frequency: expected 1 to the chunk's 8 actions, found 0"),
        (["--seed", "-1"], r"--seed: expected 0 to 2\^32 - 1, found -1"),
        (["--asynchronous", "--fps", "0"], "--fps: expected the robot's control rate"),
        (["--steps", "0"], "--steps, --fps: expected at least 1 and 0, found 0 and 50"),
    ]:
        with pytest.raises(PolicyError, match=expected):
            command(*flags)


def test_a_renderer_that_does_not_exist(url):
    command = [sys.executable, "-m", "evaluate.client", "--url", url]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MUJOCO_GL": "sorcery"}, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("error: .*MUJOCO_GL.*sorcery.*\n", done.stderr), done.stderr


def test_load(aloha_checkpoint):
    command = [sys.executable, "benchmarks/serve_load.py", "--checkpoint", aloha_checkpoint, "--device", "cpu"]
    flags = [
        "--clients",
        "8",
        "--seconds",
        "3",
        "--image_size",
        "64",
        "48",
        "--max_new_tokens",
        "3",
        "--api_key",
        "key",
    ]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    sent, answered = re.search(
        r"^(\d+) requests of 8 clients in .*: (0 lost, 0 foreign, 0 errors)", done.stdout
    ).groups()
    assert int(sent) >= 8 and answered
    assert re.search(r"latency p50 [\d.]+ ms, p99 [\d.]+ ms", done.stdout)


def test_load_reports_what_fails(url, aloha_checkpoint):
    def load(*flags: str) -> str:
        command = [sys.executable, "benchmarks/serve_load.py", "--clients", "2", "--seconds", "1", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 1
        return done.stderr

    assert "2 x ws://127.0.0.1:9: expected a policy server, found none" in load("--url", "ws://127.0.0.1:9")
    refused = load("--url", url, "--image_size", "2000", "30")
    assert re.search(r"0 lost, 0 foreign, [1-9]\d* errors", refused) and "at most 1920x1080 pixels" in refused
