"""The policy server, over real HTTP and WebSocket connections."""

import base64
import gzip
import json
import re
import socket

import msgpack
import numpy as np
import pytest
from openpi_client import msgpack_numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from evaluate.client import PolicyClient, PolicyError
from evaluate.serving import Batcher, Limits, RequestReader
from evaluate.wire import pack, to_json, unpack

from .serving import (
    CAMERAS,
    CHUNK,
    DIM,
    JSON,
    MSGPACK,
    PROMPT,
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


@pytest.fixture(scope="module")
def server(aloha_policy):
    """Address of a server with small limits, for requests that do it no harm."""
    reader = RequestReader(aloha_policy, max_image=(200, 100))
    limits = Limits(timeout=60, max_body=2**20)
    with serving(
        aloha_policy, reader=reader, limits=limits, batcher=Batcher(aloha_policy, max_new_tokens=3)
    ) as address:
        yield address


def test_every_format_reaches_the_policy_alike(policy, monkeypatch):
    seen = slowed(policy, monkeypatch, 0)
    message = observation()
    channels_first = message | {"images": {name: image.transpose(2, 0, 1) for name, image in message["images"].items()}}
    in_base64 = to_json(message) | {
        "images": {
            name: {"__ndarray__": base64.b64encode(image.tobytes()).decode(), "dtype": "uint8", "shape": image.shape}
            for name, image in message["images"].items()
        }
    }
    with serving(policy) as address:
        seen.clear()  # the warm-up
        for variant in (message, channels_first):
            status, reply = infer(address, variant)
            assert status == 200 and reply["actions"].dtype == np.float32
            assert_answers(reply)
        for variant in (to_json(message), to_json(channels_first), in_base64):
            status, _, reply = request(address, "/infer", json.dumps(variant).encode(), **JSON)
            assert status == 200
            assert_answers(reply)
        with PolicyClient(f"ws://{address}") as client:
            assert client.metadata == request(address, "/metadata")[2] == policy.metadata()
            assert_answers(client.infer(message))
    assert len(seen) == 6
    for ((found),) in seen:
        assert np.allclose(found["qpos"], message["state"])
        for name in CAMERAS:
            assert found["images"][name].dtype == np.uint8
            assert np.array_equal(found["images"][name], message["images"][name])


def test_openpi_clients_connect(policy):
    with serving(policy, reader=RequestReader(policy, prompt=PROMPT)) as address:
        host, port = address.split(":")
        client = WebsocketClientPolicy(host, int(port))
        assert client.get_server_metadata() == policy.metadata()
        assert_answers(client.infer(observation()))
        assert_answers(client.infer(observation(prompt=None)))  # as openpi's ALOHA robots do
        with pytest.raises(RuntimeError, match="400 images: expected cameras top"):
            client.infer(observation(images={}))
        broker = ActionChunkBroker(client, action_horizon=CHUNK)
        actions = np.stack([broker.infer(observation())["actions"] for _ in range(CHUNK)])
        assert actions.shape == (CHUNK, DIM) and not np.allclose(actions[0], actions[-1])
        client._ws.close()


def test_arrays_are_packed_as_openpi_packs_them():
    message = {"a": np.arange(6, dtype=">i4").reshape(2, 3), "b": np.float32(0.5), "c": {"d": np.zeros((0, 2), bool)}}
    assert pack(message) == msgpack_numpy.packb(message)
    back = unpack(pack(message))
    assert np.array_equal(back["a"], message["a"]) and back["b"] == 0.5 and back["c"]["d"].shape == (0, 2)
    with pytest.raises(TypeError, match="numpy arrays of numbers"):
        pack({"a": np.array([object()])})


def array(**changes) -> dict:
    """An image as openpi packs it, with changes."""
    image = np.zeros((48, 64, 3), np.uint8)
    packed = {b"__ndarray__": True, b"data": image.tobytes(), b"dtype": "|u1", b"shape": [48, 64, 3]}
    return packed | {key.encode(): value for key, value in changes.items()}


def cameras(image) -> dict:
    return observation()["images"] | {"top": image}


STATE, IMAGE = np.zeros(DIM, np.float32), np.zeros((48, 64, 3), np.uint8)
BAD = {
    "no state": ({"state": None}, "state: expected an array of numbers, found none"),
    "state is text": ({"state": "zero"}, "state: expected an array of numbers, found 'zero'"),
    "state of 7": ({"state": STATE[:7]}, r"state: expected shape \(14,\), found \(7,\)"),
    "state of text": ({"state": ["a"] * DIM}, "state: expected an array of numbers"),
    "state of bool": ({"state": np.zeros(DIM, bool)}, "state: expected an array of numbers, found dtype bool"),
    "ragged state": ({"state": [[1.0], [1.0, 2.0]]}, "state: expected an array of numbers"),
    "huge state": ({"state": [10**400] * DIM}, "state: expected an array of numbers"),
    "NaN": ({"state": np.where(np.arange(DIM) == 3, np.nan, STATE)}, r"state\[3\]: expected finite numbers, found nan"),
    "infinite": ({"state": np.full(DIM, np.inf)}, r"state\[0\]: expected finite numbers, found inf"),
    "beyond float32": ({"state": np.full(DIM, 1e300)}, r"state\[0\]: expected finite numbers, found inf"),
    "no images": ({"images": None}, "images: expected a map of cameras .*top.* found none"),
    "images is a list": ({"images": [IMAGE.tolist()]}, "images: expected a map of cameras"),
    "wrong camera": ({"images": {"cam_high": IMAGE}}, "images: .*missing top, left_wrist, right_wrist, found cam_high"),
    "grey image": ({"images": cameras(IMAGE[..., 0])}, r"images\['top'\]: expected .*found \(48, 64\)"),
    "four channels": ({"images": cameras(np.zeros((48, 64, 4), np.uint8))}, r"images\['top'\]: .*\(48, 64, 4\)"),
    "history": ({"images": cameras(np.stack([IMAGE] * 2))}, r"images\['top'\]: .*\(2, 48, 64, 3\)"),
    "empty image": ({"images": cameras(np.zeros((0, 64, 3), np.uint8))}, r"images\['top'\]: expected an image"),
    "float image": ({"images": cameras(IMAGE.astype(np.float32))}, r"images\['top'\]: .*uint8.*float32"),
    "list beyond 255": ({"images": cameras((IMAGE + 0).tolist()[:-1] + [[[256, 0, 0]] * 64])}, r"\['top'\].*0 to 255"),
    "list of floats": ({"images": cameras([[[0.5, 0.5, 0.5]]])}, r"images\['top'\]: expected whole numbers"),
    "image is text": (
        {"images": cameras("top.png")},
        r"images\['top'\]: expected an array of numbers, found 'top.png'",
    ),
    "objects": ({"images": cameras(array(dtype="|O"))}, r"images\['top'\]: dtype: .*found '\|O'"),
    "structures": ({"images": cameras(array(dtype="i4,f8"))}, r"images\['top'\]: dtype"),
    "dtype is a list": ({"images": cameras(array(dtype=[["a", "<i4"]]))}, r"images\['top'\]: dtype"),
    "negative shape": ({"images": cameras(array(shape=[-48, -64, 3]))}, r"images\['top'\]: shape: .*\[-48, -64, 3\]"),
    "lying shape": (
        {"images": cameras(array(shape=[480, 640, 3]))},
        r"\['top'\]: data: .* takes 921600 bytes, found 9216",
    ),
    "shape of text": ({"images": cameras(array(shape="48x64x3"))}, r"images\['top'\]: shape"),
    "nine dimensions": ({"images": cameras(array(shape=[1] * 9))}, r"images\['top'\]: shape"),
    "absurd shape": ({"images": cameras(array(shape=[0, 2**62, 2**62], data=b""))}, r"images\['top'\]"),
    "data is text": ({"images": cameras(array(data="0" * 9216))}, r"images\['top'\]: data: expected bytes, found str"),
    "no prompt": ({"prompt": None}, "prompt: expected the task in words, found none"),
    "empty prompt": ({"prompt": "  "}, "prompt: expected the task in words"),
    "prompt is a number": ({"prompt": 3}, "prompt: expected the task in words, found 3"),
    "endless prompt": ({"prompt": "a" * 2001}, "prompt: expected at most 2000 characters, found 2001"),
    "image token": ({"prompt": "Fold <|image_pad|>."}, "prompt: .*control token <.image_pad.>"),
    "unknown robot": ({"unnorm_key": "r2d2"}, "unnorm_key: expected one of .*, found 'r2d2'"),
    "robot is an array": ({"unnorm_key": STATE}, "unnorm_key: expected one of .*, found ndarray"),
    "frozen alone": ({"frozen": 2}, "prefix: expected it"),
    "prefix alone": ({"prefix": np.zeros((2, DIM))}, "frozen: expected it"),
    "prefix too long": ({"prefix": np.zeros((9, DIM)), "frozen": 1}, r"prefix: expected shape \(n, 14\).*\(9, 14\)"),
    "prefix of 7": ({"prefix": np.zeros((2, 7)), "frozen": 1}, r"prefix: expected shape \(n, 14\).*\(2, 7\)"),
    "NaN in prefix": ({"prefix": np.full((2, DIM), np.nan), "frozen": 1}, r"prefix\[0\]\[0\]: expected finite"),
    "frozen too many": ({"prefix": np.zeros((2, DIM)), "frozen": 3}, "frozen: expected 0 to 2, .*found 3"),
    "frozen is an array": ({"prefix": np.zeros((2, DIM)), "frozen": STATE}, "frozen: expected 0 to 2"),
    "session is a number": ({"session": 3}, "session: expected up to 200 characters, found 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_named(server, name):
    changes, expected = BAD[name]
    if name == "huge state":  # msgpack has no such integers
        body = json.dumps(to_json(observation(**changes))).encode()
        status, _, reply = request(server, "/infer", body, **JSON)
        assert (status, list(reply)) == (400, ["error"])
        assert re.search(expected, reply["error"])
        return
    message = observation(**changes)
    status, error = infer(server, message)
    assert status == 400
    assert re.search(expected, error)
    with PolicyClient(f"ws://{server}") as client:
        with pytest.raises(PolicyError, match=expected) as refusal:
            client.infer(message)
        assert refusal.value.status == 400
        assert_answers(client.infer(observation()))  # the connection goes on


BODIES = [
    (MSGPACK, b"", 400, "body: expected one msgpack map"),
    (MSGPACK, b"\xc1", 400, "body: expected one msgpack map"),
    (MSGPACK, pack(observation())[:-1], 400, "body: expected one msgpack map, found broken msgpack"),
    (MSGPACK, b"\x91" * 5000, 400, "body: expected one msgpack map"),
    (MSGPACK, b"\x81\x90\x01", 400, "body: expected one msgpack map"),
    (MSGPACK, b"\xdf\xff\xff\xff\xff", 400, "body: expected one msgpack map"),
    (MSGPACK, msgpack.packb([1]), 400, "body: expected one msgpack map, found list"),
    (MSGPACK, msgpack.packb({1: 2}), 400, "images: expected a map"),
    (
        MSGPACK,
        msgpack.packb({"images": {}, "state": {b"__npgeneric__": True, b"data": []}}),
        400,
        "state: expected a numpy",
    ),
    (JSON, b"{", 400, "body: expected a JSON object, found broken JSON"),
    (JSON, b"\xff\xfe", 400, "body: expected a JSON object"),
    (JSON, b"[" * 100_000, 400, "body: expected a JSON object"),
    (JSON, b"[]", 400, "body: expected one JSON object, found list"),
    (JSON, b'{"images": {"top": {"__ndarray__": "!"}}}', 400, "images\\['top'\\]: __ndarray__: expected base64"),
    (JSON, json.dumps(to_json(observation(prompt="\ud800"))).encode(), 400, "prompt: expected text"),
    ({}, b"{}", 415, "Content-Type: expected application/json or application/msgpack"),
    ({"Content_Type": "text/plain"}, b"{}", 415, "Content-Type: .*found text/plain"),
    (MSGPACK, bytes(2**20 + 1), 413, "body: expected at most 1048576 bytes"),
    (JSON | {"Content_Encoding": "gzip"}, gzip.compress(bytes(2**27)), 413, "body: expected at most 1048576 bytes"),
    (JSON | {"Content_Encoding": "gzip"}, b"no gzip", 400, "body: could not be read"),
    (
        MSGPACK,
        pack(observation(images=cameras(np.zeros((128, 256, 3), np.uint8)))),
        413,
        "\\['top'\\]: .*200x100.*256x128",
    ),
    (MSGPACK, pack(observation(images=cameras(np.zeros((201, 90, 3), np.uint8)))), 413, "\\['top'\\]: .*found 90x201"),
]


@pytest.mark.parametrize("headers, body, expected_status, expected", BODIES, ids=range(len(BODIES)))
def test_broken_bodies_are_refused(server, headers, body, expected_status, expected):
    status, _, reply = request(server, "/infer", body, **headers)
    assert status == expected_status and list(reply) == ["error"]
    assert re.search(expected, reply["error"])
    assert request(server, "/healthz")[2] == {"status": "ok"}


def test_paths_and_methods(server):
    for path, method, status, expected in [
        ("/", "GET", 426, "Upgrade: expected a WebSocket"),
        ("/nowhere", "GET", 404, "path: expected /infer.*found /nowhere"),
        ("/infer", "GET", 405, "method: expected POST, found GET"),
        ("/healthz", "POST", 405, "method: expected GET"),
        ("/%00/../..", "POST", 404, "path"),
    ]:
        found, headers, reply = request(server, path, b"" if method == "POST" else None, method)
        assert found == status and re.search(expected, reply["error"])
        assert status != 405 or "Allow" in headers
    with socket.create_connection(server.split(":")) as connection:  # no HTTP at all
        connection.sendall(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        assert b"400" in connection.recv(1000).splitlines()[0]
    assert request(server, "/health")[0] == 200


def test_bad_websocket_frames(server):
    with connect(f"ws://{server}", compression=None, max_size=None) as connection:
        assert unpack(connection.recv())["camera_names"] == CAMERAS
        for frame, expected in [
            ("hello", "400 body: expected a binary message"),
            (b"\xc1", "400 body: .*broken msgpack"),
        ]:
            connection.send(frame)
            assert re.match(expected, connection.recv())
        connection.send(pack(observation()))
        assert_answers(unpack(connection.recv()))
        connection.send(bytes(2**20 + 1))
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1009
    with PolicyClient(f"ws://{server}") as client, pytest.raises(PolicyError, match="closed the connection .1009"):
        client.infer(observation(images={name: np.zeros((400, 400, 3), np.uint8) for name in CAMERAS}))


def test_the_key_is_asked_for(policy):
    with serving(policy, api_key="secret ü") as address:
        for given in (
            {},
            {"Authorization": "Api-Key wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Api-Key "},
        ):
            for path in ("/metadata", "/nowhere"):
                status, headers, reply = request(address, path, **given)
                assert status == 401 and headers["WWW-Authenticate"] == "Api-Key"
                assert reply["error"].startswith("Authorization: expected 'Api-Key <the server's key>', found")
            assert infer(address, observation(), **given)[0] == 401
            with pytest.raises(InvalidStatus, match="401"), connect(f"ws://{address}", additional_headers=given):
                raise AssertionError("let in without the key")
        key = "secret ü".encode().decode("latin-1")  # how urllib and websockets send it
        for scheme in ("Api-Key", "Bearer", "api-key"):
            assert request(address, "/metadata", Authorization=f"{scheme} {key}")[0] == 200
        assert request(address, "/healthz")[0] == 200
        with pytest.raises(PolicyError, match="refuses the API key"):
            PolicyClient(f"ws://{address}", "wrong")


def test_extra_keys_are_ignored(policy, caplog):
    with serving(policy) as address:
        for _ in range(2):
            assert infer(address, observation(timestamp=3.5, images=cameras(IMAGE) | {"cam_low": IMAGE}))[0] == 200
    assert [record.getMessage() for record in caplog.records if "timestamp" in record.getMessage()] == [
        "requests hold 'timestamp', which is ignored; known: state, images, prompt, unnorm_key, prefix, frozen, session"
    ]


def test_one_of_several_robots_is_named(policy, monkeypatch):
    stats = policy.stats
    moved = stats | {"action_min": stats["action_min"] + 100, "action_max": stats["action_max"] + 100}
    monkeypatch.setattr(policy, "robot_stats", {"left": stats, "right": moved})
    monkeypatch.setattr(policy, "unnorm_keys", ["left", "right"])
    with serving(policy) as address:
        assert infer(address, observation()) == (400, "unnorm_key: expected one of left, right, found none")
        for robot, offset in (("left", 0), ("right", 100)):
            status, reply = infer(address, observation(unnorm_key=robot))
            assert status == 200 and np.allclose(reply["actions"], stats["action_min"] + offset, atol=0.2)
    with serving(policy, reader=RequestReader(policy, unnorm_key="right")) as address:  # for clients that name none
        status, reply = infer(address, observation())
        assert status == 200 and np.allclose(reply["actions"], stats["action_min"] + 100, atol=0.2)
