"""RLDS datasets read without TensorFlow."""

import io
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_utils import DatasetError, UserError, find_episodes, open_episode
from data_utils.convert import convert_rlds
from data_utils.convert.__main__ import main
from data_utils.convert.tfrecord import crc32c, example_class, parse_example, records
from data_utils.index import summarize

from .helpers import GOLDEN

RLDS = GOLDEN / "rlds_tiny"
SHARD = "1.0.0/tiny_rlds-train.tfrecord-00000-of-00001"


def episodes_in(folder) -> list:
    return list(folder.rglob("*.hdf5"))


def protobuf(data: bytes) -> list[tuple[int, bytes]]:
    """(field number, content) of a message that holds nothing but bytes and messages."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if not data[at - 1] & 0x80:
                return value, at

    fields, at = [], 0
    while at < len(data):
        tag, at = varint(at)
        length, at = varint(at)
        fields.append((tag >> 3, data[at : at + length]))
        at += length
    return fields


def raw_episodes() -> list[dict[str, list[bytes]]]:
    """The fixture's values as they stand in the file: packed numbers in one piece, texts and images one by one."""
    data, episodes = (RLDS / SHARD).read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        episodes.append({})
        for _, entry in protobuf(protobuf(data[12 : 12 + length])[0][1]):
            name, feature = (content for _, content in protobuf(entry))
            (_, values), *_ = protobuf(feature) or [(0, b"")]
            episodes[-1][name.decode()] = [content for _, content in protobuf(values)]
        data = data[12 + length + 4 :]
    return episodes


def test_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as expected

    data = np.random.default_rng(0).bytes(5000)
    for length in (0, 1, 3, 4, 5, 8, 15, 16, 17, 63, 64, 65, 1000, 4096, 5000):
        assert crc32c(data[:length]) == expected(data[:length])


def test_rlds_becomes_hdf5(tmp_path, capsys):
    assert convert_rlds(RLDS, tmp_path).converted == 3
    assert "qpos <- steps/observation/state" in capsys.readouterr().out
    for path, raw, length in zip(find_episodes(tmp_path), raw_episodes(), (10, 11, 12), strict=True):
        episode = open_episode(path)
        assert len(episode) == length and episode.sim and not summarize(path).findings
        assert episode.instruction(0) == raw["steps/language_instruction"][0].decode()
        for name, values in (("action", episode.action), ("observation/state", episode.qpos)):
            assert np.array_equal(values, np.frombuffer(raw[f"steps/{name}"][0], "<f4").reshape(length, 7))
        for name, tolerance in (("image", 3), ("wrist_image", 0)):  # JPEG, as another decoder sees it, and PNG
            for t, data in enumerate(raw[f"steps/observation/{name}"]):
                expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
                assert np.abs(episode.frame(name, t) - expected).max() <= tolerance
        assert episode.images["image"].chunks == (1, 48, 64, 3)
        assert not episode.file["observations/qvel"][()].any() and episode.file["language_raw"].shape == (1,)
        episode.close()


def test_rlds_mapping_by_flags(tmp_path, capsys):
    flags = "--qpos state --qpos steps/action --action action --camera cam_high=image --language language_instruction"
    more = "--reasoning file_path --split train --jpeg 95 --real"
    main(["rlds", str(RLDS), str(tmp_path), *flags.split(), *more.split()])
    assert "converted 3 episodes, skipped 0" in capsys.readouterr().out
    episode = open_episode(tmp_path / "train" / "episode_000001.hdf5")
    assert episode.qpos.shape == (11, 14) and np.array_equal(episode.qpos[:, 7:], episode.action)
    assert (episode.sim, episode.compressed, episode.camera_names) == (False, True, ["cam_high"])
    assert [episode.reasoning(t) for t in range(11)] == ["ep1"] * 11
    assert episode.file["compress_len"].shape == (1, 11) and episode.frame("cam_high", 10).shape == (48, 64, 3)
    main(["rlds", str(RLDS), str(tmp_path), *flags.split(), *more.split()])
    assert "converted 0 episodes, skipped 3 (already there)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--qpos nothing", "--qpos nothing: expected the name of one feature"),
        ("--action image", "--action image: expected numbers of every step, found steps/observation/image"),
        ("--camera cam=state", "--camera state: expected images"),
        ("--language state", "--language state: expected a text"),
        ("--split val", "found the splits train"),
        ("--camera a=image --camera a=wrist_image", "--camera: expected each name once"),
    ],
)
def test_rlds_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["rlds", str(RLDS), str(tmp_path / "out"), *flags.split()])
    assert not episodes_in(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "byte", "record", "shard"])
def test_damaged_rlds_is_named_and_taken_up_again(tmp_path, damage):
    source, out = tmp_path / "rlds", tmp_path / "out"
    shutil.copytree(RLDS, source)
    shard = source / SHARD
    whole = shard.read_bytes()
    second = 12 + struct.unpack("<Q", whole[:8])[0] + 4
    third = second + 12 + struct.unpack("<Q", whole[second : second + 8])[0] + 4
    if damage == "cut":
        shard.write_bytes(whole[:-100])
        message = f"{shard}: record 2: expected it to end at byte {len(whole)}"
    elif damage == "byte":
        shard.write_bytes(whole[: second + 500] + bytes([whole[second + 500] ^ 1]) + whole[second + 501 :])
        message = f"{shard}: record 1: bytes: expected the checksum"
    elif damage == "record":
        shard.write_bytes(whole[:third])
        message = f"{shard}: expected 3 records, as dataset_info.json says, found 2"
    else:
        shard.rename(shard.with_name("tiny_rlds-train.tfrecord-00000-of-00002"))
        message = "split train: expected 2 files, found 1; missing are those numbered [1]"
    with pytest.raises(DatasetError) as error:
        convert_rlds(source, out)
    assert message in str(error.value) and not list(tmp_path.rglob("*.partial"))
    done = len(episodes_in(out))
    shutil.rmtree(source)
    shutil.copytree(RLDS, source)
    report = convert_rlds(source, out)
    assert (report.converted, report.skipped) == (3 - done, done)


def write_rlds(folder, features: dict, steps: dict):
    """A dataset of one episode; `steps`: path -> list of bytes, floats or ints."""
    example = example_class()()
    for path, values in steps.items():
        entry = example.features.feature.add(key=path)
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
        getattr(entry.value, kind).value.extend(values)
    data = example.SerializeToString()
    masked = [
        (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
        for crc in map(crc32c, (struct.pack("<Q", len(data)), data))
    ]
    folder.mkdir(parents=True)
    record = struct.pack("<QI", len(data), masked[0]) + data + struct.pack("<I", masked[1])
    (folder / "x-val.tfrecord-00000-of-00001").write_bytes(record)
    described = {"featuresDict": {"features": features}}
    sequence = {"sequence": {"feature": described, "length": "-1"}}
    text = {"text": {}, "pythonClassName": "Text"}
    top = {
        "featuresDict": {
            "features": {"steps": sequence, "episode_metadata": {"featuresDict": {"features": {"task": text}}}}
        }
    }
    (folder / "features.json").write_text(json.dumps(top))


def tensor(dtype: str, *shape: int, encoding: str = "none") -> dict:
    shape = {"dimensions": [str(size) for size in shape]} if shape else {}
    return {"tensor": {"dtype": dtype, "encoding": encoding, "shape": shape}, "pythonClassName": "Tensor"}


def test_rlds_forms_of_features(tmp_path):
    """Images as plain tensors, packed float64, integers, a scalar, one instruction for the whole episode."""
    rng = np.random.default_rng(0)
    pixels, packed = rng.integers(0, 256, (4, 6, 8, 3)), rng.normal(size=(4, 5))
    features = {
        "camera": tensor("uint8", 6, 8, 3),
        "state": tensor("float64", 5, encoding="zlib"),
        "gripper": tensor("int64"),
        "action": tensor("float32", 2, 3),
    }
    steps = {
        "steps/camera": pixels.ravel().tolist(),
        "steps/state": [zlib.compress(row.tobytes()) for row in packed],
        "steps/gripper": [0, 1, 1, 0],
        "steps/action": np.arange(24.0).tolist(),
        "episode_metadata/task": ["Öffne die Tür.".encode()],
    }
    write_rlds(tmp_path / "rlds", features, steps)
    convert_rlds(tmp_path / "rlds", tmp_path / "out", qpos=["state", "gripper"])
    episode = open_episode(tmp_path / "out" / "val" / "episode_000000.hdf5")
    assert np.array_equal(episode.qpos, np.concatenate([packed, [[0], [1], [1], [0]]], axis=1).astype(np.float32))
    assert np.array_equal(episode.action, np.arange(24).reshape(4, 6))
    assert np.array_equal([episode.frame("camera", t) for t in range(4)], pixels)
    assert episode.instruction(3) == "Öffne die Tür."


def test_rlds_names_that_stand_for_several_features(tmp_path):
    both = {"featuresDict": {"features": {"state": tensor("float32", 2)}}}
    features = {"action": tensor("float32", 2), "left": both, "right": both}
    steps = {"steps/action": [0.0] * 4, "steps/left/state": [1.0] * 4, "steps/right/state": [2.0] * 4}
    write_rlds(tmp_path / "rlds", features, steps | {"episode_metadata/task": [b"go"]})
    with pytest.raises(UserError, match="found steps/left/state and steps/right/state; its features: steps/action"):
        convert_rlds(tmp_path / "rlds", tmp_path / "out", qpos=["state"])
    with pytest.raises(UserError, match="--qpos: expected numbers of every step called state or .*--qpos FEATURE"):
        convert_rlds(tmp_path / "rlds", tmp_path / "out")
    convert_rlds(tmp_path / "rlds", tmp_path / "out", qpos=["right/state"])
    assert (open_episode(tmp_path / "out" / "val" / "episode_000000.hdf5").qpos == 2).all()


@pytest.mark.parametrize("name", ["steps/state", "steps/texts"])
def test_rlds_steps_that_do_not_fit(tmp_path, name):
    steps = {"steps/action": [0.0] * 6, "steps/state": [0.0] * 6, "steps/texts": [b"a"] * 3}
    steps[name] = steps[name][:-1] + [b"b"] if name == "steps/texts" else steps[name][:-1]
    features = {"action": tensor("float32", 2), "state": tensor("float32", 2), "texts": {"text": {}}}
    write_rlds(tmp_path / "rlds", features, steps)
    with pytest.raises(DatasetError, match=f"record 0: {name}: expected (6 values for 3 steps, found 5|one text)"):
        convert_rlds(tmp_path / "rlds", tmp_path / "out", language="texts")
    assert not episodes_in(tmp_path)
    assert parse_example(next(records(tmp_path / "rlds" / "x-val.tfrecord-00000-of-00001")))["steps/action"] == [0] * 6
