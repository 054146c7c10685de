"""The policy server under load, when things fail, and when it is stopped."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from data_utils import UserError
from evaluate.client import PolicyClient, PolicyError
from evaluate.serve import bind, is_loopback, main
from evaluate.serving import Batcher, Limits, PolicyServer
from evaluate.wire import pack, unpack

from .helpers import ROOT
from .serving import (
    CHUNK,
    DIM,
    MSGPACK,
    assert_answers,
    infer,
    observation,
    request,
    serving,
    slowed,
)


@pytest.fixture
def policy(aloha_policy, monkeypatch):
    """The policy; what is done to its `predict` lasts for one test. It writes three tokens of reasoning."""
    predict = aloha_policy.predict
    monkeypatch.setattr(aloha_policy, "predict", lambda *args, **kwargs: predict(*args[:2], 3, **kwargs))
    return aloha_policy


def test_a_failure_hits_its_query_only(policy, monkeypatch):
    predict = policy.predict

    def fails(observations, *args, **kwargs):
        if any(one["qpos"][0] > 100 for one in observations):
            raise RuntimeError("out of luck")
        actions, texts = predict(observations, *args, **kwargs)
        broken = [one["qpos"][0] < -100 for one in observations]
        return np.where(np.array(broken)[:, None, None], np.nan, actions), texts

    monkeypatch.setattr(policy, "predict", fails)
    batches = slowed(policy, monkeypatch, 0.3)
    with serving(policy) as address, ThreadPoolExecutor(4) as threads:
        first = [0.0, 1000.0, -1000.0, 0.5]
        states = [np.concatenate([[value], np.zeros(DIM - 1)]) for value in first]
        answers = list(threads.map(lambda state: infer(address, observation(state=state)), states))
        assert [status for status, _ in answers] == [200, 500, 500, 200]
        assert answers[1][1] == "the policy failed (RuntimeError); the server's log says where"
        assert "ArithmeticError" in answers[2][1]
        assert max(map(len, batches)) > 1  # some were asked together, and then again one by one
        assert infer(address, observation())[0] == 200


def test_clients_are_answered_together_and_each_its_own(policy, monkeypatch):
    batches = slowed(policy, monkeypatch, 0.2)
    low, high = policy.stats["action_min"], policy.stats["action_max"]

    def ask(address: str, seed: int):
        prefix = (low + np.random.default_rng(seed).random((3, DIM)) * (high - low)).astype(np.float32)
        with PolicyClient(f"ws://{address}") as client:
            for _ in range(2):
                reply = client.infer(observation(seed, prefix=prefix, frozen=3))
                assert np.allclose(reply["actions"][:3], prefix, atol=1e-4)
                assert not np.allclose(reply["actions"][3], prefix[2], atol=1e-4)
            return reply["server_timing"]["batch_size"]

    with serving(policy, batcher=Batcher(policy, max_batch=4)) as address, ThreadPoolExecutor(7) as threads:
        batches.clear()
        sizes = list(threads.map(lambda seed: ask(address, seed), range(7)))
    assert sum(map(len, batches)) == 14 and max(sizes) > 1
    assert {len(batch) for batch in batches} <= {1, 2, 4}


def test_messages_of_one_connection_are_answered_in_order(policy):
    low, high = policy.stats["action_min"], policy.stats["action_max"]
    prefixes = [(low + share * (high - low))[None] for share in (0.2, 0.4, 0.6, 0.8)]  # (1, A) each
    with serving(policy) as address, connect(f"ws://{address}") as connection:
        connection.recv()
        for prefix in prefixes:
            connection.send(pack(observation(prefix=prefix, frozen=1)))
        for prefix in prefixes:
            assert np.allclose(unpack(connection.recv())["actions"][:1], prefix, atol=1e-4)


def test_timeouts_and_queue(policy, monkeypatch):
    batches = slowed(policy, monkeypatch, 4.0)
    limits, batcher = Limits(timeout=2.0), Batcher(policy, max_batch=1, max_waiting=2)
    with serving(policy, limits=limits, batcher=batcher) as address, ThreadPoolExecutor(5) as threads:
        batches.clear()
        ask = partial(request, address, "/infer", **MSGPACK)
        first = threads.submit(ask, pack(observation(0)))
        while not batches:  # until the model has taken it, it waits like the others
            time.sleep(0.01)
        answers = list(threads.map(lambda seed: ask(pack(observation(seed))), range(1, 5))) + [first.result()]
        statuses = sorted(status for status, _, _ in answers)
        assert statuses == [503, 503, 504, 504, 504]
        for status, headers, reply in answers:
            assert status == 504 or headers["Retry-After"] == "1"
            assert re.search("waiting already" if status == 503 else "no answer within 2 s", reply["error"])
        time.sleep(4)
        assert len(batches) == 1  # those that had waited too long were dropped


def test_a_body_that_does_not_come(policy):
    with serving(policy, limits=Limits(timeout=0.2)) as address, socket.create_connection(address.split(":")) as slow:
        slow.sendall(
            b"POST /infer HTTP/1.1\r\nHost: robot\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        reply = slow.recv(1000).decode()
    assert reply.startswith("HTTP/1.1 408") and "body: did not arrive within 0.2 s (--timeout)" in reply


def test_a_client_that_has_gone_is_forgotten(policy, monkeypatch):
    batches = slowed(policy, monkeypatch, 0.5)
    with serving(policy, batcher=Batcher(policy, max_batch=1)) as address:
        batches.clear()
        with PolicyClient(f"ws://{address}") as first, connect(f"ws://{address}") as gone:
            gone.recv()
            with ThreadPoolExecutor(1) as threads:
                running = threads.submit(first.infer, observation(1))
                while not batches:
                    time.sleep(0.01)
                gone.send(pack(observation(2)))
                over_http = socket.create_connection(address.split(":"))
                body = pack(observation(3))
                over_http.sendall(
                    b"POST /infer HTTP/1.1\r\nHost: robot\r\nContent-Type: application/msgpack\r\n"
                    + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
                )  # fmt: skip
                time.sleep(0.1)
                gone.close()
                over_http.close()
                assert_answers(running.result())
            assert_answers(first.infer(observation(4)))
        assert len(batches) == 2


def test_pings_are_answered_while_the_model_computes(policy, monkeypatch):
    slowed(policy, monkeypatch, 2.5)
    with serving(policy) as address, connect(f"ws://{address}", ping_interval=0.2, ping_timeout=1.0) as connection:
        connection.recv()
        connection.send(pack(observation()))
        assert_answers(unpack(connection.recv()))


def test_reasoning_is_reused(policy, monkeypatch):
    given, predict = [], policy.predict

    def spy(*args, reasoning, **kwargs):
        given.append(reasoning[0])
        return predict(*args, reasoning=reasoning, **kwargs)

    monkeypatch.setattr(policy, "predict", spy)
    with serving(policy, reasoning_every=3) as address, PolicyClient(f"ws://{address}") as client:
        text = client.infer(observation())["reasoning"]
        for _ in range(2):
            assert client.infer(observation())["reasoning"] == text
        client.infer(observation())
        client.infer(observation(prompt="Put the cube down."))
        with PolicyClient(f"ws://{address}") as other:
            other.infer(observation())
        for session in ("left arm", "right arm", "left arm", None, None):
            infer(address, observation(session=session))
        assert given[1:] == [None, text, text, None, None, None, None, None, text, None, None]
    given.clear()
    with serving(policy, use_reasoning=False) as address:
        assert infer(address, observation())[1]["reasoning"] == ""
    assert given == ["", ""]


def test_what_is_queued_is_answered_before_it_stops(policy, monkeypatch):
    batches = slowed(policy, monkeypatch, 1.0)
    with ThreadPoolExecutor(3) as threads:
        with serving(policy, batcher=Batcher(policy, max_batch=1)) as address, ExitStack() as stack:
            idle = stack.enter_context(connect(f"ws://{address}"))
            connection_outlives = stack.pop_all()
            idle.recv()
            batches.clear()
            answers = [threads.submit(infer, address, observation(seed)) for seed in range(3)]
            while not batches:
                time.sleep(0.01)
            time.sleep(0.5)  # the others are queued by then
        assert [answer.result()[0] for answer in answers] == [200, 200, 200]
        with connection_outlives, pytest.raises(ConnectionClosed) as closed:
            idle.recv()
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "the server is shutting down")
        with pytest.raises(PolicyError, match=f"{address}: expected a policy server, found none"):
            PolicyClient(f"ws://{address}")


def test_command_serves_until_a_signal(aloha_checkpoint):
    process = subprocess.Popen(
        [sys.executable, "-m", "evaluate.serve", "--checkpoint", aloha_checkpoint, "--device", "cpu", "--port", "0",
         "--max_new_tokens", "3", "--no_reasoning", "--host", "0.0.0.0"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    shapes = "cameras top, left_wrist, right_wrist, state 14, chunk 8 x 14"
    found = re.fullmatch(rf"serving {aloha_checkpoint} on ws://0.0.0.0:(\d+) \({shapes}\)\n", line)
    assert found, line + process.communicate()[1]
    with PolicyClient(f"ws://127.0.0.1:{found[1]}") as client:
        assert_answers(client.infer(observation()))
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        with pytest.raises(PolicyError, match="1001 the server is shutting down"):
            client.infer(observation())
    assert process.returncode == 0 and output == "stopped; 1 queries answered\n"
    assert "whoever reaches 0.0.0.0 can use this server" in errors and "Traceback" not in errors


def test_flags_are_checked(aloha_checkpoint, monkeypatch):
    for flags, expected in [
        (["--max_batch", "0"], "--max_batch: expected more than 0, found 0"),
        (["--api_key", " "], "--api_key: expected a key, found nothing"),
        (["--prompt", ""], "--prompt: expected the task in words, found nothing"),
        (["--timeout", "nan"], "--timeout: expected more than 0, found nan"),
        (["--port", "-1"], "--port: expected 0 to 65535, found -1"),
        (["--port", "0", "--checkpoint", "nowhere"], "checkpoint.*nowhere"),
    ]:
        monkeypatch.setattr(sys, "argv", ["serve", "--checkpoint", aloha_checkpoint, *flags])
        with pytest.raises(UserError, match=expected):
            main()


def test_a_policy_that_cannot_act_is_not_served(policy, monkeypatch):
    monkeypatch.setattr(policy, "predict", lambda *args, **kwargs: (np.full((1, CHUNK, DIM), np.nan), [""]))
    with bind("127.0.0.1", 0) as listener, pytest.raises(UserError, match="--checkpoint: expected a policy that acts"):
        asyncio.run(PolicyServer(policy).run(listener, asyncio.Event(), lambda: None))


def test_addresses():
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: expected a free port, found {port} of 127.0.0.1 in use"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match="--host: expected an address of this machine, found 203.0.113.1"):
        bind("203.0.113.1", 0)
    with pytest.raises(UserError, match="--host"):
        bind("no host", 0)
    with pytest.raises(UserError, match="--port: expected 0 to 65535, found 70000"):
        bind("127.0.0.1", 70000)
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("robot.local")
