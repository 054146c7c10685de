"""`python -m qwen2_vla.merge`: any checkpoint as one plain, complete folder."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_vla
from data_utils import EpisodicDataset, UserError, get_norm_stats, open_episode, save_stats, unnormalize_action
from data_utils.normalization import read_stats
from qwen2_vla import Qwen2VLAPolicy
from qwen2_vla.adapters import lora_targets, plain_name
from qwen2_vla.loading import load_model
from qwen2_vla.merge import main as merge
from qwen2_vla.modeling_qwen2_vla import VLA_MODULES

from .helpers import CAMERAS, EPISODES, GOLDEN, relative_error, run
from .lora_cases import DATA, assert_same, small_training, write_reference_output

STATS = get_norm_stats(EPISODES)


def test_the_output_of_the_reference_as_one_folder(tiny_base, tmp_path, capsys):
    moved = tmp_path / "base"
    shutil.copytree(tiny_base, moved)
    folder = tmp_path / "reference"
    expected = write_reference_output(folder, str(moved), modules=["vit", "llm"])
    moved.rename(tmp_path / "elsewhere")
    output = tmp_path / "models" / "merged"
    with pytest.raises(UserError, match="found .*base; name it in adapter_config.json.*--base BASE"):
        merge([str(folder), "--output", str(output)])
    assert not output.exists()
    save_stats(STATS, folder)
    command = [str(folder), "--output", str(output), "--base", str(tmp_path / "elsewhere")]
    merge(command)
    assert "adapters and base as one model" in capsys.readouterr().out
    assert os.listdir(tmp_path / "models") == ["merged"]  # nothing is left beside it
    shutil.rmtree(tmp_path / "elsewhere")
    policy = Qwen2VLAPolicy.from_pretrained(str(output), device="cpu")  # it stands alone
    assert_same(policy.model, expected)
    assert policy.model.config.data_config == DATA and policy.stats["qpos_mean"].shape == (14,)
    again = run(["-m", "qwen2_vla.merge", *command])
    assert again.returncode == 1 and again.stdout.strip().splitlines()[-1].startswith("error: --output "), again.stdout


def test_full_checkpoints_in_another_dtype_and_averaged(model, processor, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("model.visual.")}
    merge([str(checkpoint), "--output", str(tmp_path / "bf16"), "--dtype", "bf16"])
    assert "M parameters in torch.bfloat16" in (printed := capsys.readouterr().out)
    assert "it cannot act yet: " in printed and "no dataset_stats.json (--stats) and no cameras" in printed
    stored = load_file(tmp_path / "bf16/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert_same(load_model(str(tmp_path / "bf16")), {n: p.bfloat16().float() for n, p in model.state_dict().items()})

    with pytest.raises(UserError, match="expected averaged weights .ema.safetensors"):
        merge([str(checkpoint), "--output", str(tmp_path / "ema"), "--ema"])
    save_file({name: 0.5 * p.detach() for name, p in trained.items()}, checkpoint / "ema.safetensors")
    merge([str(checkpoint), "--output", str(tmp_path / "ema"), "--ema"])
    halved = {*trained, "lm_head.weight"}  # tied
    expected = {name: 0.5 * p if name in halved else p for name, p in model.state_dict().items()}
    assert_same(load_model(str(tmp_path / "ema")), expected)


@pytest.mark.parametrize("modules", [["vit", "llm"], ["llm", "di_head"]], ids=" ".join)
def test_averaged_adapters(tiny_base, tmp_path, task, modules):
    """The average of adapters is merged as they are."""
    flags = {"lora_enable": True, "lora_module": " ".join(modules), "lora_r": 4, "using_ema": True, "save_steps": 2}
    train_vla.main(small_training(tiny_base, task, tmp_path / "out", **flags))
    checkpoint = tmp_path / "out/checkpoint-2"
    merge([str(checkpoint), "--output", str(tmp_path / "ema"), "--ema"])
    merge([str(checkpoint), "--output", str(tmp_path / "last")])
    average = {plain_name(name): tensor for name, tensor in load_file(checkpoint / "ema.safetensors").items()}
    ema, last = load_model(str(tmp_path / "ema")), load_model(str(tmp_path / "last"))
    assert_same(last, load_model(str(tmp_path / "out")).state_dict())
    for module in VLA_MODULES[1:]:
        for name, tensor in getattr(ema, module).state_dict().items():
            assert torch.equal(tensor, average[f"{module}.{name}"])
    base = load_model(tiny_base, last.config).state_dict()
    for layer in lora_targets(last, ["llm"]):
        b, a = (average[f"{layer}.lora_{x}.weight"] for x in "BA")
        change = ema.get_submodule(layer).weight - base[f"{layer}.weight"]
        assert b.abs().max() > 0 and torch.allclose(change, 256 / 4 * b @ a, atol=1e-5)
    Qwen2VLAPolicy.from_pretrained(str(tmp_path / "ema"), device="cpu")


def test_what_cannot_be_merged(model, processor, tiny_base, tmp_path):
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    output = str(tmp_path / "new")
    for arguments, message in (
        ([str(tmp_path / "nothing"), "--output", output], "CHECKPOINT: expected a folder, found none"),
        ([tiny_base, "--output", output], "expected a DexVLA checkpoint, found a model without a policy head"),
        ([str(tmp_path / "full"), "--output", tiny_base], "--output .*: expected a new or an empty folder"),
        ([str(tmp_path / "full"), "--output", output, "--base", tiny_base], "--base .*: expected adapters in"),
        ([str(tmp_path / "full"), "--output", output, "--base", "x"], "--base: expected a folder, found none at x"),
    ):
        with pytest.raises(UserError, match=message):
            merge(arguments)
    weights = load_file(tmp_path / "full/model.safetensors")
    weights.pop("policy_head.pos_embed")
    save_file(weights, tmp_path / "full/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing: policy_head.pos_embed"):
        merge([str(tmp_path / "full"), "--output", output])
    assert not Path(output).exists()


def test_a_failed_write_leaves_nothing(model, processor, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(processor), "save_pretrained", full_disk)
    with pytest.raises(UserError, match="--output .*: expected a folder that can be written, found .*No space left"):
        merge([str(tmp_path / "full"), "--output", str(tmp_path / "models/new")])
    assert os.listdir(tmp_path / "models") == []


# ---- checkpoints of the reference, which do not say how they were trained ----


def write_pickle(path: Path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return str(path)


def test_a_reference_checkpoint_is_made_complete(task, tmp_path, capsys):
    """Without a word about cameras; the statistics lie, as a pickle, where the reference's training leaves them."""
    checkpoint = tmp_path / "training/checkpoint-100"
    shutil.copytree(GOLDEN / "checkpoint", checkpoint)
    with pytest.raises(UserError, match="found no dataset_stats.json and no data_config .*merge.*--task_name.*--stats"):
        Qwen2VLAPolicy.from_pretrained(str(checkpoint), "cpu")
    command = [str(checkpoint), "--output", str(tmp_path / "whole"), "--task_name", task]
    with pytest.raises(UserError, match="--stats: expected dataset_stats.pkl .*found none"):
        merge(command)
    write_pickle(tmp_path / "training/dataset_stats.pkl", STATS)
    merge([*command, "--image_size_stable", "(84,56)", "--image_size_wrist", "(56,56)", "--history_images_length", "2"])
    assert "dataset_stats.json" not in capsys.readouterr().out  # nothing is missing
    policy = Qwen2VLAPolicy.from_pretrained(str(tmp_path / "whole"), "cpu")
    assert policy.model.config.data_config == {
        "task_name": task, "camera_names": CAMERAS, "image_size_stable": [84, 56], "image_size_wrist": [56, 56],
        "use_reasoning": True, "delta_control": False, "augment": True, "history_images_length": 2,
    }  # fmt: skip
    assert all(np.array_equal(policy.stats[key], STATS[key]) for key in STATS)
    assert_same(policy.model, load_model(str(GOLDEN / "checkpoint")).state_dict())
    with pytest.raises(UserError, match="expected a config.json without data_config, found one for cameras cam_high"):
        merge([str(tmp_path / "whole"), "--output", str(tmp_path / "again"), "--task_name", task])


def test_it_acts_as_the_reference_trained_it(tmp_path):
    options = ["--camera_names", "cam_high, cam_left_wrist,cam_right_wrist", "--use_reasoning", "False"]
    options += ["--stats", write_pickle(tmp_path / "stats.pkl", STATS), "--augment", "False"]
    merge([str(GOLDEN / "checkpoint"), "--output", str(tmp_path / "whole"), *options])
    policy = Qwen2VLAPolicy.from_pretrained(str(tmp_path / "whole"), "cpu")
    assert policy.image_size == (320, 240) and not policy.use_reasoning
    episode = open_episode(EPISODES[0])
    noise = np.random.default_rng(0).normal(size=(1, policy.chunk_size, 14)).astype(np.float32)
    observation = {"images": {name: episode.frame(name, 3) for name in CAMERAS}, "qpos": episode.qpos[3]}
    actions, text = policy.predict(observation, episode.instruction(3), noise=noise[0])
    item = EpisodicDataset(EPISODES, CAMERAS, STATS, 8, transform=policy.process, use_reasoning=False)[3]
    batch = policy.collate([item])
    condition = load_model(str(GOLDEN / "checkpoint")).eval()(**batch).condition.detach()
    expected = policy.model.policy_head.denoise(torch.from_numpy(noise), condition, batch["states"])[0].numpy()
    assert text == "" and relative_error(actions, unnormalize_action(expected, STATS)) < 1e-4


class Malicious:
    """Its pickle calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_no_code_of_a_pickle_runs(tmp_path):
    target = tmp_path / "ran"
    for function, arguments in (
        (os.mkdir, (str(target),)),
        (eval, (f"__import__('os').mkdir({str(target)!r})",)),
        (getattr, ("text", "format")),
        (np.load, (str(target),)),
    ):
        evil = Malicious(function, *arguments)
        for content in (evil, STATS | {"action_std": evil}, {"action_min": np.array([evil], dtype=object)}):
            path = write_pickle(tmp_path / "evil.pkl", content)
            with pytest.raises(UserError, match="evil.pkl: expected statistics .*, which is neither an array"):
                read_stats(path)
            assert not target.exists()
    with pytest.raises(UserError, match="neither an array nor a number"):  # a name that leads elsewhere
        read_stats(write_pickle(tmp_path / "evil.pkl", b"\x80\x04\x8c\x05numpy\x8c\x0ecore.os.system\x93."))


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol(tmp_path, protocol):
    numbers = {key: values.astype(np.float64) for key, values in STATS.items()}
    numbers["count"] = np.int64(3)
    path = write_pickle(tmp_path / "stats.pkl", pickle.dumps(numbers, protocol))
    stats = read_stats(path)["default"]
    assert stats["count"] == 3 and all(np.array_equal(stats[key], STATS[key]) for key in STATS)
    if protocol < 4:  # names of modules have no length before them: as numpy 1 wrote them
        renamed = pickle.dumps(numbers, protocol).replace(b"numpy._core", b"numpy.core")
        assert read_stats(write_pickle(tmp_path / "old.pkl", renamed))["default"].keys() == stats.keys()
    by_robot = write_pickle(tmp_path / "robots.pkl", pickle.dumps({"a": numbers, "b": STATS}, protocol))
    assert list(read_stats(by_robot)) == ["a", "b"]


def test_wrong_statistics_and_flags(tmp_path):
    def without(key: str) -> dict:
        return {name: values for name, values in STATS.items() if name != key}

    command = [str(GOLDEN / "checkpoint"), "--output", str(tmp_path / "new")]
    stats = ["--stats", write_pickle(tmp_path / "s.pkl", STATS)]
    cameras = ["--camera_names", "top"]
    for options, message in (
        ([*stats, "--task_name", "nothing"], "--task_name: expected one of .*, found nothing"),
        ([*stats, "--augment", "False"], "--augment: expected --task_name or --camera_names too, found neither"),
        ([*stats, "--camera_names", ","], "--camera_names: expected names, each once, found ','"),
        ([*stats, "--camera_names", "top,top"], "--camera_names: expected names, each once, found 'top,top'"),
        ([*stats, *cameras, "--image_size_stable", "big"], "--image_size_stable: expected"),
        ([*stats, *cameras, "--history_images_length", "0"], "--history_images_length: expected"),
        (["--stats", "none.pkl", *cameras], "none.pkl: expected statistics as training writes them, found .*No such"),
    ):
        with pytest.raises(UserError, match=message):
            merge([*command, *options])
    for content, message in (
        (without("action_max"), "--stats .*s.pkl: expected action_max, found only action_mean"),
        (STATS | {"qpos_std": np.ones(7)}, r"qpos_std: expected 14 finite numbers.*found shape \(7,\)"),
        (STATS | {"action_min": np.full(14, np.inf)}, "action_min: expected 14 finite numbers"),
        ({"a": STATS, "b": without("qpos_mean")}, "s.pkl: b: expected qpos_mean"),
        ([1, 2], "s.pkl: expected statistics as training writes them"),
        ({}, "expected action_min, found only nothing"),
        (b"\x80\x04no pickle", "s.pkl: expected statistics as training writes them"),
    ):
        write_pickle(tmp_path / "s.pkl", content)
        with pytest.raises(UserError, match=message):
            merge([*command, *stats, *cameras])
    assert not (tmp_path / "new").exists()
