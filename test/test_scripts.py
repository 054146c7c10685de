"""The shell scripts as a user starts them: real processes, real DeepSpeed over gloo, the tiny model."""

import json
import os
import re
import socket

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_utils import load_data
from policy_heads import ScaleDP, ScaleDPPolicyConfig
from qwen2_vla import Qwen2VLAPolicy
from qwen2_vla.loading import load_model

from .helpers import ROOT, run, write_episode

SMALL = {
    "policy_head_depth": 1, "policy_head_width": 64, "policy_head_heads": 4, "chunk_size": 8,
    "image_size_stable": "(56,56)", "image_size_wrist": "(56,56)", "per_device_train_batch_size": 2, "logging_steps": 1,
    "save_steps": 2, "max_steps": 2, "learning_rate": 1e-3, "dataloader_num_workers": 0, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where the simulator's tasks of TASK_CONFIGS look for episodes."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        path = folder / "sim_transfer_cube_scripted" / f"episode_{i}.hdf5"
        write_episode(path, 6, cameras=["top", "left_wrist", "right_wrist"], seed=i, jpeg=True)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def script(data_dir, tiny_base, tmp_path):
    def start(name: str, *flags: str, output: str = "out", model: str | None = None, **settings) -> tuple[str, str]:
        settings = {
            "MNOP": model or tiny_base, "TASKNAME": "sim_transfer_cube_scripted", "OUTPUT": tmp_path / output,
            "NUM_DEVICES": 1, "MASTER_PORT": free_port(),
        } | settings  # fmt: skip
        small = [part for flag, value in SMALL.items() for part in (f"--{flag}", str(value))]
        command = ["bash", f"scripts/{name}", *(f"{key}={value}" for key, value in settings.items()), *small, *flags]
        data = settings.get("DEXVLA_DATA_DIR", data_dir)
        result = run(command, {"DEXVLA_DATA_DIR": str(data), "CUDA_VISIBLE_DEVICES": ""})
        return result.stdout, str(tmp_path / output)

    return start


def losses(output: str) -> list[dict]:
    pattern = r"\{'loss': '([\d.]+)', 'llm_loss': '([\d.]+)', 'action_loss': '([\d.]+)'"
    return [tuple(map(float, found)) for found in re.findall(pattern, output)]


def test_stage2_then_stage3_on_one_device(script):
    output, stage2 = script("train_dexvla_stage2.sh", output="stage2")
    assert len(losses(output)) == 2 and "train_samples_per_second" in output, output[-3000:]
    assert (ROOT / stage2 / "log.log").read_text().count("'loss'") == 2
    assert list((ROOT / stage2 / "log").glob("events*"))
    output, stage3 = script("train_dexvla_stage3.sh", output="stage3", model=stage2)
    assert "no policy head" not in output and losses(output), output[-3000:]
    assert Qwen2VLAPolicy.from_pretrained(stage3, device="cpu").stats["qpos_std"].shape == (14,)


def test_two_processes_under_zero2_resume(script):
    """The same script on two devices: DeepSpeed ZeRO-2, a checkpoint that is complete, and a run that goes on."""
    output, folder = script("train_dexvla_stage2.sh", NUM_DEVICES=2)
    assert len(losses(output)) == 2 and "saved to" in output, output[-3000:]
    checkpoint = load_file(f"{folder}/checkpoint-2/model.safetensors")
    assert any(name.startswith("policy_head.") for name in checkpoint)
    Qwen2VLAPolicy.from_pretrained(f"{folder}/checkpoint-2", device="cpu")
    output, _ = script(
        "train_dexvla_stage2.sh", "--max_steps", "4", "--resume_from_checkpoint", "True", NUM_DEVICES=2,
    )  # fmt: skip
    assert len(losses(output)) == 2, output[-3000:]
    state = json.loads((ROOT / folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3, 4]


def test_two_processes_average_losses_and_draw_their_own_noise(script):
    """An untrained head predicts zero noise, so its loss is the noise's own; the text's loss is that of the samples."""
    flags = ["--max_steps", "1", "--learning_rate", "0", "--save_strategy", "no", "--augment", "False"]
    two, _ = script("train_dexvla_stage2.sh", *flags, output="two", NUM_DEVICES=2)
    same_samples, _ = script("train_dexvla_stage2.sh", *flags, "--per_device_train_batch_size", "4", output="one")
    rank_0, _ = script("train_dexvla_stage2.sh", *flags, output="rank_0")
    assert losses(two)[0][1] == pytest.approx(losses(same_samples)[0][1], rel=2e-3)
    assert losses(two)[0][2] != losses(rank_0)[0][2]  # rank 1 did not repeat what rank 0 drew


def test_divla_trains_adapters_and_the_unet(script):
    output, folder = script("train_divla.sh", "--lora_r", "4")
    assert losses(output), output[-3000:]
    names = load_file(f"{folder}/checkpoint-2/adapter_model.safetensors")
    assert any("lora_A" in name for name in names) and any("policy_head.down_modules" in name for name in names)


def test_zero3_with_a_stage1_head(script, tmp_path):
    config = ScaleDPPolicyConfig(depth=1, n_emb=64, num_heads=4, cond_dim=128, prediction_horizon=8)
    stage1 = {f"noise_pred_net.{name}": 0.02 * torch.randn_like(p) for name, p in ScaleDP(config).state_dict().items()}
    torch.save({"nets": {"nets": stage1}}, tmp_path / "head.ckpt")
    output, folder = script(
        "train_dexvla_stage2.sh", "--learning_rate", "0", NUM_DEVICES=2, ZERO="scripts/zero3.json",
        DIT_PRETRAIN=tmp_path / "head.ckpt",
    )  # fmt: skip
    assert len(losses(output)) == 2 and "tensors taken" in output, output[-3000:]
    weights = load_file(f"{folder}/model.safetensors")
    assert all(tensor.numel() for tensor in weights.values())
    assert torch.allclose(weights["policy_head.pos_embed"], stage1["noise_pred_net.pos_embed"])
    assert weights["reasoning_film.scale_fc.weight"].abs().max() == 0 < weights["input_action_proj.mlps.0.weight"].std()


def test_plain_python_takes_the_deepspeed_flag(script):
    output, _ = script("train_dexvla_stage2.sh", "--save_strategy", "no", ZERO="scripts/zero2.json")
    assert len(losses(output)) == 2, output[-3000:]


def test_mistakes_are_one_line(script, tiny_base):
    for settings, flags, message in (
        ({}, ["--action_dim", "7"], "error: .*action: expected 7 columns (--action_dim), found 14"),
        ({"TASKNAME": "nothing"}, [], "error: --task_name: expected one of "),
        ({"NUM_DEVICES": 2}, ["--state_dim", "7"], "error: .*expected 7 columns (--state_dim)"),
        ({}, ["--chunk_sise", "8"], "error: --chunk_sise: expected a flag of train_vla.py, did you mean --chunk_size?"),
        ({"MNOP": ""}, [], "error: expected MNOP (folder of the official Qwen2-VL), found nothing"),
    ):
        output, _ = script("train_dexvla_stage2.sh", *flags, **settings)
        pattern = re.escape(message).replace(r"\.\*", ".*")
        assert re.search(pattern, output), output
        assert "Traceback" not in output, output


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_nan_under_deepspeed_is_skipped_and_named(script, tmp_path, zero):
    cameras = ["top", "left_wrist", "right_wrist"]
    folder = tmp_path / "data" / "sim_transfer_cube_scripted"
    paths = [write_episode(folder / f"episode_{i}.hdf5", 6, cameras=cameras, seed=i) for i in range(2)]
    load_data(str(folder), None, cameras, 8)
    for path in paths:  # past the checks: they trust size and time of change
        times = path.stat()
        with h5py.File(path, "r+") as file:
            file["observations/qpos"][3, 5] = np.nan
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    output, out = script(
        "train_dexvla_stage2.sh", "--max_steps", "3", "--save_steps", "100", "--logging_steps", "3", NUM_DEVICES=2,
        ZERO=f"scripts/{zero}.json", DEXVLA_DATA_DIR=folder.parent,
    )  # fmt: skip
    lines = re.findall(r"step \d, rank \d: the loss is not finite; the batch was .*?; skipped", output)
    assert lines and all("frames" in line and re.search(r"\b3\b", line) for line in lines), output[-3000:]
    assert all(tensor.isfinite().all() for tensor in load_file(f"{out}/model.safetensors").values())


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_adapters_of_two_processes_end_merged(script, zero):
    flags = ["--lora_enable", "True", "--lora_module", "llm", "--lora_r", "4"]
    output, folder = script("train_dexvla_stage2.sh", *flags, NUM_DEVICES=2, ZERO=f"scripts/{zero}.json")
    assert "saved to" in output, output[-3000:]
    policy = Qwen2VLAPolicy.from_pretrained(folder, device="cpu")
    merged = load_model(f"{folder}/checkpoint-2").state_dict()
    assert all(torch.allclose(p, merged[name], atol=1e-6) for name, p in policy.model.state_dict().items())
