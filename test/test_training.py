"""train_vla.py from end to end, in this process, with a tiny model on the CPU."""

import json
import os
import shutil
from pathlib import Path

import h5py
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_vla
from aloha_scripts.constants import TASK_CONFIGS
from data_utils import UserError
from qwen2_vla import Qwen2VLAConfig, Qwen2VLAPolicy, Qwen2VLForConditionalGenerationForVLA
from qwen2_vla.loading import load_model

from .helpers import write_episode

LOSSES = ("loss", "llm_loss", "action_loss")
NO_SIZE = {"policy_head_depth": None, "policy_head_width": None, "policy_head_heads": None}


@pytest.fixture
def train(task, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "restored afterwards")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")

    def run(output: str = "out", **flags) -> str:
        settings = {
            "model_name_or_path": tiny_base, "task_name": task, "output_dir": tmp_path / output,
            "policy_head_depth": 1, "policy_head_width": 64, "policy_head_heads": 4, "chunk_size": 8,
            "image_size_stable": "(56,56)", "image_size_wrist": "(56,56)", "use_reasoning": True, "use_cpu": True,
            "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2,
            "learning_rate": 1e-3, "disable_tqdm": True,
        }  # fmt: skip
        flags = {key: value for key, value in (settings | flags).items() if value is not None}
        train_vla.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
        return str(tmp_path / output)

    return run


def history(folder: str) -> list[dict]:
    return json.loads(Path(f"{folder}/trainer_state.json").read_text())["log_history"]


def column(folder: str, name: str) -> list[float]:
    return [entry[name] for entry in history(folder) if name in entry]


def test_log_validation_and_complete_checkpoints(train, capsys, tmp_path):
    out = train(
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4, lazy_preprocess=True, tf32=True,
        logging_dir=tmp_path / "log", max_steps=8, save_steps=4,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "--lazy_preprocess True has no effect" in printed
    assert torch.cuda.is_available() or "--tf32 True has no effect: there is no CUDA device" in printed
    assert "3 training episodes with 36 frames, 1 validation episodes" in printed
    assert "train_samples_per_second" in printed and "train_loss" in printed

    for prefix, count in (("", 8), ("eval_", 4)):
        loss, llm_loss, action_loss = (column(out, prefix + name) for name in LOSSES)
        assert len(loss) == len(llm_loss) == len(action_loss) == count
        assert loss == pytest.approx([a + b for a, b in zip(llm_loss, action_loss)], rel=1e-3)
    assert column(out, "loss")[-1] < column(out, "loss")[0]
    results = json.loads(Path(f"{out}/train_results.json").read_text())
    assert results["train_samples_per_second"] > 0 and results["train_loss"] > 0

    events = EventAccumulator(str(tmp_path / "log")).Reload()
    for name in LOSSES:
        assert len(events.Scalars(f"train/{name}")) == 8 and len(events.Scalars(f"eval/{name}")) == 4

    for folder in (out, f"{out}/checkpoint-4", f"{out}/checkpoint-8"):
        config = Qwen2VLAConfig.from_pretrained(folder)
        assert config.data_config["camera_names"] == ["cam_high", "cam_left_wrist", "cam_right_wrist"]
        policy = Qwen2VLAPolicy.from_pretrained(folder, device="cpu")  # weights, processor, statistics: all is there
        assert policy.process.camera_names == config.data_config["camera_names"]
        assert all(os.path.isfile(f"{folder}/dataset_stats.{kind}") for kind in ("json", "pkl"))


def test_stage3_starts_from_stage2(train):
    stage2 = train("stage2")
    stage3 = train("stage3", model_name_or_path=stage2, policy_head_depth=None, policy_head_width=None,
                   policy_head_heads=None, learning_rate=1e-8, max_steps=1)  # fmt: skip
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (stage2, stage3))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert Qwen2VLAConfig.from_pretrained(stage3).policy_head_config.depth == 1


def test_resume_continues_the_uninterrupted_run(train, tmp_path):
    whole = train("whole", max_steps=4, using_ema=True)
    interrupted = tmp_path / "interrupted"
    shutil.copytree(f"{whole}/checkpoint-2", interrupted / "checkpoint-2")
    resumed = train("interrupted", max_steps=4, using_ema=True, resume_from_checkpoint=True)
    assert column(resumed, "loss") == column(whole, "loss")
    for name in ("model.safetensors", "ema.safetensors", "checkpoint-4/ema.safetensors"):
        a, b = load_file(f"{whole}/{name}"), load_file(f"{resumed}/{name}")
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_checkpoint_is_loaded_at_the_end(train, lora):
    """The last steps have a learning rate that ruins the model, so an earlier checkpoint is the best."""
    flags = {"lora_enable": True, "lora_r": 4} if lora else {}
    out = train(
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        learning_rate=0.3, warmup_ratio=1.0 - 1e-6, max_grad_norm=1e9, **flags,
    )  # fmt: skip
    state = json.loads(Path(f"{out}/trainer_state.json").read_text())
    losses = column(out, "eval_loss")
    assert losses[0] < losses[1] and state["best_model_checkpoint"].endswith("checkpoint-2")
    best, saved = load_model(f"{out}/checkpoint-2").state_dict(), load_model(out).state_dict()
    assert all(torch.equal(best[key], saved[key]) for key in best)


def test_output_dirs_of_other_runs(train):
    out = train(max_steps=2)
    with pytest.raises(UserError, match="expected no checkpoints of another run, found checkpoint-2"):
        train()
    for change, message in (
        ({"delta_control": True}, "delta_control False .asked for: True"),
        ({"chunk_size": 16}, "head.prediction_horizon 8 .asked for: 16"),
        ({"policy_head_depth": 2}, "head.depth 1 .asked for: 2"),
        ({"lora_enable": True}, "LoRA False .asked for: True"),
    ):
        with pytest.raises(UserError, match=f"is another run's: .*{message}"):
            train(resume_from_checkpoint=True, **change)
    stats = Path(f"{out}/checkpoint-2/dataset_stats.json")
    stats.write_text(json.dumps(json.loads(stats.read_text()) | {"action_mean": [9.0] * 14}))
    with pytest.raises(UserError, match="is another run's: statistics of other episodes"):
        train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="--resume_from_checkpoint: expected True or a checkpoint's folder"):
        train("other", resume_from_checkpoint=f"{out}/checkpoint-3")


def test_resume_skips_a_checkpoint_that_was_not_written_to_its_end(train, capsys):
    out = train(max_steps=2)
    Path(f"{out}/checkpoint-9").mkdir()
    train(resume_from_checkpoint=True, max_steps=4)
    assert "checkpoint-9: skipped" in capsys.readouterr().out and len(column(out, "loss")) == 4


def test_resume_without_a_checkpoint_starts_anew(train, capsys):
    train(resume_from_checkpoint=True, max_steps=1)
    assert "no checkpoint in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"task_name": "no_such_task"}, "--task_name: expected one of .*sim_insertion_scripted.*found no_such_task"),
        ({"load_pretrain": True}, "--model_pretrain: expected a folder with Qwen2-VL"),
        ({"model_name_or_path": "/nowhere"}, "--model_name_or_path: expected a folder, found none at /nowhere"),
        ({"action_dim": 7}, r"action: expected 7 columns \(--action_dim\), found 14"),
        ({"state_dim": 10}, r"observations/qpos: expected 10 columns \(--state_dim\), found 14"),
        ({"image_size_stable": "(320;240)"}, "--image_size_stable: expected"),
        ({"policy_head_size": "ScaleDP_XL", "policy_head_depth": None}, "--policy_head_size: expected one of"),
        ({"load_pretrain_dit": True}, "--load_pretrain_dit True: expected --pretrain_dit_path too"),
        (
            {"load_pretrain_dit": True, "pretrain_dit_path": "/no.ckpt"},
            "--pretrain_dit_path: expected .*none at /no.ckpt",
        ),
    ],
)
def test_bad_input_stops_before_any_weight_is_loaded(train, monkeypatch, flags, message):
    monkeypatch.setattr(train_vla, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        train(**flags)


def test_validation_needs_episodes(train, task, monkeypatch):
    monkeypatch.setitem(TASK_CONFIGS, task, TASK_CONFIGS[task] | {"train_ratio": 1.0})
    with pytest.raises(UserError, match="--eval_strategy .*expected validation episodes, found none"):
        train(eval_strategy="steps")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset_dir": []}, "dataset_dir: expected folders"),
        ({"camera_names": []}, "camera_names: expected a list of names"),
        ({"camera_names": "top"}, "camera_names: expected a list of names"),
        ({"train_ratio": "x"}, "train_ratio: expected a number in"),
        ({"sample_weights": 0.5}, "sample_weights: expected a list of numbers"),
        ({"name_filter": "x"}, "name_filter: expected a function"),
    ],
)
def test_task_config_values_are_checked(train, task, monkeypatch, change, message):
    monkeypatch.setitem(TASK_CONFIGS, task, TASK_CONFIGS[task] | change)
    with pytest.raises(UserError, match=message):
        train()


def test_a_bad_frame_found_in_training_names_itself(train, task, monkeypatch, tmp_path):
    path = write_episode(tmp_path / "data" / "e.hdf5", 4, jpeg=True)
    with h5py.File(path, "r+") as file:
        file["observations/images/cam_high"][1:3] = 0
    monkeypatch.setitem(TASK_CONFIGS, task, TASK_CONFIGS[task] | {"dataset_dir": str(tmp_path / "data")})
    with pytest.raises(
        SystemExit, match=r"error on rank 0: .*e\.hdf5: observations/images/cam_high, frame [12]: expected"
    ):
        train(dataloader_num_workers=1)


def test_task_config_keys_are_required(train, task, monkeypatch):
    monkeypatch.setitem(TASK_CONFIGS, task, {"dataset_dir": "x"})
    with pytest.raises(UserError, match=r"TASK_CONFIGS\['test_task'\]: expected episode_len, camera_names"):
        train()


@pytest.mark.parametrize("module, bits", [("vit llm", 16), ("di_head", 16), ("llm", 4), ("llm", 8)])
def test_lora_checkpoints_act_resume_and_end_merged(train, module, bits):
    flags = {
        "lora_enable": True,
        "lora_module": module,
        "lora_r": 4,
        "lora_alpha": 8,
        "non_lora_lr": 1e-4,
        "bits": bits,
    }
    out = train(**flags)
    adapters = load_file(f"{out}/checkpoint-4/adapter_model.safetensors")
    assert any("lora_A" in name for name in adapters)
    assert any("policy_head.x_embedder.weight" in name for name in adapters) == (module != "di_head")
    merged = load_file(f"{out}/model.safetensors")  # a plain, complete checkpoint
    assert not any("lora" in name for name in merged) and not Path(f"{out}/adapter_config.json").exists()
    policy = Qwen2VLAPolicy.from_pretrained(f"{out}/checkpoint-4", device="cpu")
    assert policy.stats["action_mean"].shape == (14,)
    plain = Qwen2VLAPolicy.from_pretrained(out, device="cpu").model.state_dict()
    for name, tensor in policy.model.state_dict().items():
        assert torch.allclose(tensor, plain[name], atol=1e-6), name

    shutil.rmtree(f"{out}/checkpoint-4")
    again = train(**flags, resume_from_checkpoint=True)
    resumed = load_file(f"{again}/checkpoint-4/adapter_model.safetensors")
    assert all(torch.allclose(adapters[name], resumed[name], atol=1e-5) for name in adapters)
    after = load_file(f"{again}/model.safetensors")
    assert all(torch.allclose(merged[name], after[name], atol=1e-5) for name in merged)


def test_adapters_on_adapters(train):
    """Stage 3 with LoRA from a LoRA checkpoint of stage 2: nothing of stage 2 is lost."""
    flags = {"lora_enable": True, "lora_module": "llm", "lora_r": 4, "learning_rate": 1e-2}
    stage2 = train("stage2", **flags)
    still = flags | {"learning_rate": 0}
    stage3 = train("stage3", **NO_SIZE, **still, model_name_or_path=f"{stage2}/checkpoint-4")
    before, after = load_file(f"{stage2}/model.safetensors"), load_file(f"{stage3}/model.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    with pytest.raises(UserError, match="--bits 4: expected a plain checkpoint, found the adapters"):
        load_model(f"{stage2}/checkpoint-4", bits=4)
    assert load_model(f"{stage2}/checkpoint-4", dtype=torch.bfloat16).dtype == torch.bfloat16
    by_adapters = load_model(f"{stage3}/checkpoint-4").state_dict()
    assert torch.allclose(by_adapters["policy_head.pos_embed"], before["policy_head.pos_embed"])


@pytest.mark.parametrize(
    "flags",
    [
        {"is_tinyvla": True, "using_film": False},
        {"policy_head_type": "unet_diffusion_policy"},
    ],
)
def test_other_heads_train(train, flags, capsys):
    out = train(max_steps=2, **flags)
    assert ("--policy_head_depth 1 has no effect" in capsys.readouterr().out) == ("policy_head_type" in flags)
    assert len(column(out, "loss")) == 2
    Qwen2VLForConditionalGenerationForVLA.from_pretrained(out)


def test_evaluation_with_averaged_weights(train, tiny_base):
    """At the last step both are evaluated: once the weights as they are, once their average."""
    flags = {"eval_strategy": "steps", "eval_steps": 4, "using_ema": True, "per_device_eval_batch_size": 4}
    plain, averaged = train("plain", **flags), train("averaged", eval_ema=True, **flags)
    assert column(plain, "loss") == column(averaged, "loss")  # training does not notice
    assert column(plain, "eval_loss") != column(averaged, "eval_loss")
    for name in ("model.safetensors", "checkpoint-4/ema.safetensors"):
        a, b = load_file(f"{plain}/{name}"), load_file(f"{averaged}/{name}")
        assert all(torch.equal(a[key], b[key]) for key in a)
    policy = Qwen2VLAPolicy.from_pretrained(f"{plain}/checkpoint-4", device="cpu", ema=True)
    stored = load_file(f"{plain}/checkpoint-4/ema.safetensors")
    weights = dict(policy.model.named_parameters())
    assert stored and all(torch.equal(weights[name], average) for name, average in stored.items())


def test_adapters_in_bf16_leave_a_whole_model(train, tiny_base):
    """The frozen layers are halved while it trains; what is merged in the end has the base's own precision."""
    out = train(lora_enable=True, lora_module="vit llm", lora_r=4, bf16=True, max_steps=8, learning_rate=1e-2)
    assert column(out, "loss")[-1] < column(out, "loss")[0]
    merged, base = load_file(f"{out}/model.safetensors"), load_file(f"{tiny_base}/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert merged[name].dtype == torch.float32 and not torch.equal(merged[name], base[name])
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
