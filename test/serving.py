"""Shared pieces of the tests of policy server and client."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np

from aloha_scripts.constants import START_ARM_POSE, TASK_CONFIGS
from data_utils import find_all_hdf5, get_norm_stats
from evaluate.serving import PolicyServer
from evaluate.wire import pack, unpack

from . import helpers

CAMERAS = ["top", "left_wrist", "right_wrist"]  # the simulator's
CHUNK, DIM = 8, 14
PROMPT = "Transfer the red cube to the other arm."
JSON, MSGPACK = {"Content_Type": "application/json"}, {"Content_Type": "application/msgpack"}


def write_checkpoint(folder, tiny_base: str, task: str) -> str:
    """A tiny policy with the simulator's cameras and random weights."""
    stats = get_norm_stats(find_all_hdf5(TASK_CONFIGS[task]["dataset_dir"]))
    pose = np.array(2 * [*START_ARM_POSE[:6], 0.5], np.float32)  # random actions must not break the robot
    stats |= {"action_min": pose - 0.05, "action_max": pose + 0.05}
    return helpers.write_checkpoint(folder, tiny_base, stats, {"chunk_size": CHUNK}, camera_names=CAMERAS)


def observation(seed: int = 0, **changes) -> dict:
    """What a robot sends; `changes` replace entries, None removes one."""
    rng = np.random.default_rng(seed)
    message = {
        "state": rng.normal(size=DIM).astype(np.float32),
        "images": {name: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for name in CAMERAS},
        "prompt": PROMPT,
    } | changes
    return {key: value for key, value in message.items() if value is not None}


@contextmanager
def serving(policy, **settings):
    """A policy server in a thread of this process; yields "127.0.0.1:<port>"."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listening, stopped = threading.Event(), []

    def work():
        async def main():
            stop = asyncio.Event()
            stopped.append((asyncio.get_running_loop(), stop))
            await PolicyServer(policy, **settings).run(listener, stop, listening.set)

        asyncio.run(main())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert listening.wait(60)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loop, stop = stopped[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        assert not thread.is_alive()


def request(address: str, path: str, body: bytes | None = None, method: str | None = None, **headers: str):
    """Status, headers and body of a HTTP request; a JSON body decoded."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    query = urllib.request.Request(f"http://{address}{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(query, timeout=60) as response:
            status, headers, body = response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        status, headers, body = error.code, error.headers, error.read()
    return status, headers, json.loads(body) if headers["Content-Type"].startswith("application/json") else body


def infer(address: str, message: dict, **headers: str):
    status, _, body = request(address, "/infer", pack(message), **MSGPACK, **headers)
    return status, unpack(body) if status == 200 else body["error"]


def assert_answers(reply: dict):
    actions = np.asarray(reply["actions"])
    assert actions.shape == (CHUNK, DIM) and np.isfinite(actions).all() and isinstance(reply["reasoning"], str)
    timing = reply["server_timing"]
    assert 0 < timing["infer_ms"] <= timing["total_ms"] and timing["queue_ms"] >= 0
    assert reply["policy_timing"] == {"infer_ms": timing["infer_ms"]}


def slowed(policy, monkeypatch, seconds: float) -> list[list[dict]]:
    """Makes the policy slow; returns the list that the batches it is asked will be put into."""
    batches, predict = [], policy.predict

    def slow(observations, *args, **kwargs):
        batches.append(observations)
        time.sleep(seconds)
        return predict(observations, *args, **kwargs)

    monkeypatch.setattr(policy, "predict", slow)
    return batches
