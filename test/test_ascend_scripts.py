"""The path for Ascend NPUs as far as a CPU can tell: the scripts on CPU processes, the calls to torch_npu."""

import importlib.machinery
import json
import os
import re
import sys
import types

import pytest
import torch

from qwen2_vla import environment
from qwen2_vla.loading import choose_attention

from .helpers import ROOT, run, write_episode
from .test_scripts import SMALL, free_port

SCRIPTS = {
    f"train_8p_{kind}_stage{stage}.sh": (stage, steps)
    for kind, steps in (("performance", 50), ("full", 10000))
    for stage in (2, 3)
}
# Only what STEPS, BATCH_SIZE and the scripts' own settings do not say
TINY = {key: SMALL[key] for key in SMALL if key not in ("max_steps", "per_device_train_batch_size", "logging_steps")}
FIGURES = (
    r"Final Performance images/sec : (?P<speed>\S+)\n"
    r"Final Train Loss : (?P<loss>\S+)\n"
    r"E2E Training Duration sec : (?P<seconds>\d+)\n$"
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        path = folder / "sim_transfer_cube_scripted" / f"episode_{i}.hdf5"
        write_episode(path, 6, cameras=["top", "left_wrist", "right_wrist"], seed=i, jpeg=True)
    return folder


def start(name: str, *arguments, log, **env):
    env = {"CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": str(free_port()), "LOG": str(log)} | env
    return run(["bash", f"test/{name}", *map(str, arguments)], env)


def check_figures(output: str, folder):
    """The last lines are those of the training that wrote `folder`."""
    found = re.search(FIGURES, output)
    assert found, output[-3000:]
    results = json.loads((folder / "train_results.json").read_text())
    assert float(found["speed"]) == pytest.approx(results["train_samples_per_second"], rel=1e-3)
    assert float(found["loss"]) == pytest.approx(results["train_loss"], rel=1e-3)
    assert int(found["seconds"]) >= int(results["train_runtime"])


def test_stage2_on_two_processes_then_stage3(tiny_base, data_dir, tmp_path):
    """The three paths, settings, then flags; what the figures say is what the trainer recorded."""
    tiny = [part for flag, value in TINY.items() for part in (f"--{flag}", value)]
    stage2, stage3, log = tmp_path / "stage2", tmp_path / "stage3", tmp_path / "logs" / "run.log"
    settings = ["TASKNAME=sim_transfer_cube_scripted", "NUM_DEVICES=2", "STEPS=6", f"--data_path={data_dir}"]
    name = "train_8p_performance_stage2.sh"
    result = start(name, tiny_base, "", stage2, *settings, "--batch_size=1", *tiny, log=log)
    assert result.returncode == 0, result.stdout
    check_figures(result.stdout, stage2)
    assert re.search(FIGURES, log.read_text()), "the figures are in the log too"
    state = json.loads((stage2 / "trainer_state.json").read_text())
    assert state["global_step"] == 6 and [entry["step"] for entry in state["log_history"]] == [5, 6]
    assert not list(stage2.glob("checkpoint-*"))

    # settings from the environment, one process, checkpoints
    env = {"STEPS": "2", "BATCH_SIZE": "1", "NUM_DEVICES": "1", "DEXVLA_DATA_DIR": str(data_dir)}
    result = start("train_8p_full_stage3.sh", "head.ckpt", stage2, stage3, settings[0], *tiny, log=log, **env)
    assert result.returncode == 0, result.stdout
    assert "head.ckpt has no effect" in result.stdout and "no policy head" not in log.read_text()
    check_figures(result.stdout, stage3)
    assert (stage3 / "checkpoint-2" / "model.safetensors").is_file()
    assert log.read_text().count("training on 1 x cpu") == 1 and "2 x cpu" not in log.read_text(), (
        "a run starts its log anew"
    )


@pytest.fixture
def recorded_python(tmp_path):
    """A stand-in for `python` on a machine with 8 NPUs: answers launch.sh's question, writes down how it is called."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = - ]; then echo npu 8 bf16; exit; fi\nprintf "%s\\n" "$@" >{tmp_path}/called\n'
        f"env >{tmp_path}/env\n"
        "echo \"{'train_runtime': '2.5', 'train_samples_per_second': '38.4', 'train_loss': '1.5e-02', 'epoch': '1'}\"\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_settings_on_eight_npus(name, recorded_python, tmp_path):
    stage, steps = SCRIPTS[name]
    paths = [tmp_path / part for part in ("first", "second", "third")]
    result = start(name, *paths, "--seed", 7, log=tmp_path / "log", PYTHON=str(recorded_python), OMP_NUM_THREADS="")
    assert result.returncode == 0, result.stdout
    found = re.search(FIGURES, result.stdout)
    assert (found["speed"], found["loss"]) == ("38.4", "1.5e-02")
    called = (tmp_path / "called").read_text().splitlines()
    flags = {flag: value for flag, value in zip(called, called[1:]) if flag.startswith("--")}  # the last one wins
    assert flags["--num_gpus"] == "8" and flags["--deepspeed"] == "scripts/zero2.json"
    assert flags["--bf16"] == "True" and "--tf32" not in flags and flags["--flash_attn"] == "True"
    assert flags["--max_steps"] == str(steps) and flags["--logging_steps"] == "5"
    assert flags["--per_device_train_batch_size"] == "12" and flags["--seed"] == "7"
    assert flags["--lr_scheduler_type"] == ("constant" if stage == 2 else "cosine")
    assert flags["--save_strategy"] == ("no" if steps == 50 else "steps")
    assert flags["--model_name_or_path"] == str(paths[stage - 2]) and flags["--output_dir"] == str(paths[2])
    assert flags.get("--pretrain_dit_path") == (str(paths[1]) if stage == 2 else None)


def test_environment_of_the_scripts_can_be_overridden(recorded_python, tmp_path):
    cann = tmp_path / "cann_root" / "cann"
    cann.mkdir(parents=True)
    (cann / "set_env.sh").write_text("export LD_LIBRARY_PATH=$NOBODY_SET_THIS:here\nfalse\n")
    result = start(
        "train_8p_full_stage2.sh", "MNOP=x", f"OUTPUT={tmp_path}/out", log=tmp_path / "log",
        PYTHON=str(recorded_python), HCCL_CONNECT_TIMEOUT="300", CANN_ROOT=str(tmp_path / "cann_root"),
        ASCEND_HOME_PATH="", OMP_NUM_THREADS="",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    env = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert env["HCCL_CONNECT_TIMEOUT"] == "300" and env["LD_LIBRARY_PATH"] == ":here"
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "1"
    documented = (ROOT / "docs" / "ascend.md").read_text()
    exported = re.findall(r"^export (\w+)=", (ROOT / "test" / "env_npu.sh").read_text(), re.MULTILINE)
    assert all(variable in env and f"`{variable}`" in documented for variable in exported)


def test_a_failing_training_fails_the_script(tiny_base, recorded_python, tmp_path):
    log = tmp_path / "log"
    result = start(
        "train_8p_full_stage2.sh", tiny_base, "", tmp_path / "out", "TASKNAME=nothing", "NUM_DEVICES=1", log=log
    )
    assert result.returncode == 1 and "Final" not in result.stdout
    assert "error: --task_name: expected one of " in result.stdout, result.stdout
    assert result.stdout.rstrip().endswith(f"above are the last lines of {log}"), result.stdout

    result = start("train_8p_full_stage2.sh", log=log, PYTHON=str(recorded_python))
    assert result.returncode == 1 and "error: expected MNOP (folder of the official Qwen2-VL)" in result.stdout
    result = start("train_8p_full_stage2.sh", "one", "two", log=log)
    assert result.returncode == 1 and "expected 3 paths or none, found 2 (one two)" in result.stdout

    recorded_python.write_text('#!/bin/sh\nif [ "$1" = - ]; then echo npu 8 bf16; fi\n')
    result = start("train_8p_full_stage2.sh", "MNOP=x", f"OUTPUT={tmp_path}/out", log=log, PYTHON=str(recorded_python))
    assert result.returncode == 1 and f"error: {log}: expected train_samples_per_second, found none" in result.stdout


class Calls:
    """Stands in for torch_npu and torch.npu: takes what environment.py asks of them, and computes nothing."""

    def __init__(self, monkeypatch, available: bool):
        self.compile_mode, self.threads, self.casts = [], [], []
        options = {name: types.SimpleNamespace() for name in ("config", "conv", "matmul")}
        self.npu = types.SimpleNamespace(
            is_available=lambda: available, set_compile_mode=lambda **mode: self.compile_mode.append(mode), **options
        )
        module = types.ModuleType("torch_npu")
        module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
        module.Format = types.SimpleNamespace(NCDHW=30)
        module.npu_format_cast = lambda tensor, layout: self.casts.append(layout) or tensor
        monkeypatch.setitem(sys.modules, "torch_npu", module)
        monkeypatch.setattr(torch, "npu", self.npu, raising=False)
        monkeypatch.setattr(torch, "set_num_threads", self.threads.append)


def test_settings_on_an_npu(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    calls = Calls(monkeypatch, available=True)
    assert environment.prepare_npu()
    assert calls.compile_mode == [{"jit_compile": False}] and calls.threads == [1]
    assert calls.npu.config.allow_internal_format is False
    assert calls.npu.conv.allow_hf32 is False and calls.npu.matmul.allow_hf32 is False
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # somebody's own choice
    assert environment.prepare_npu() and calls.threads == [1]


def test_no_settings_without_an_npu(monkeypatch):
    calls = Calls(monkeypatch, available=False)
    assert not environment.prepare_npu()
    assert not calls.compile_mode and not calls.threads and not vars(calls.npu.config)


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_nothing_is_imported_where_torch_npu_is_not_installed():
    assert not environment.prepare_npu() and "torch_npu" not in sys.modules


def test_only_a_weight_on_an_npu_is_laid_out(monkeypatch):
    calls = Calls(monkeypatch, available=True)
    weight = torch.nn.Parameter(torch.zeros(4, 3, 2, 14, 14))
    environment.use_plain_layout(weight)
    assert not calls.casts
    npu = types.SimpleNamespace(type="npu")
    environment.use_plain_layout(types.SimpleNamespace(device=npu, ndim=1, data=torch.zeros(0)))
    assert not calls.casts
    on_npu = types.SimpleNamespace(device=npu, ndim=5, data=weight.data)
    environment.use_plain_layout(on_npu)
    assert calls.casts == [30] and on_npu.data.data_ptr() == weight.data_ptr()


def test_flash_attention_is_an_npus_own(monkeypatch):
    monkeypatch.setattr("qwen2_vla.loading.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("qwen2_vla.loading.is_torch_npu_available", lambda: True)
    assert choose_attention(True) == "flash_attention_2" and choose_attention(False) == "sdpa"


def test_scripts_can_be_executed():
    assert all(os.access(ROOT / "test" / name, os.X_OK) for name in SCRIPTS)
