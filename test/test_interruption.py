"""Runs that are killed, asked to stop, or lose a process: real processes, as a user or a cluster would do it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .helpers import ROOT
from .test_scripts import SMALL, data_dir, free_port  # noqa: F401  (a fixture)

STEPS = 16


@pytest.fixture
def start(data_dir, tiny_base, tmp_path):  # noqa: F811
    """Starts the stage-2 script in a process group of its own."""
    running = []

    def popen(output: str, *flags: str, devices: int = 1) -> subprocess.Popen:
        settings = {
            "MNOP": tiny_base, "TASKNAME": "sim_transfer_cube_scripted", "OUTPUT": tmp_path / output,
            "NUM_DEVICES": devices, "MASTER_PORT": free_port(),
        }  # fmt: skip
        small = SMALL | {"max_steps": STEPS, "save_steps": 4, "gradient_accumulation_steps": 2, "using_ema": True}
        small_flags = [part for flag, value in small.items() for part in (f"--{flag}", str(value))]
        process = subprocess.Popen(
            ["bash", "scripts/train_dexvla_stage2.sh", *(f"{key}={value}" for key, value in settings.items()),
             *small_flags, *flags],
            cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "",
                              "DEXVLA_DATA_DIR": str(data_dir)},
        )  # fmt: skip
        running.append(process)
        return process

    yield popen
    for process in running:
        kill_group(process, signal.SIGKILL)


def kill_group(process: subprocess.Popen, sig: signal.Signals):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sig)


def pids_of(process: subprocess.Popen, pattern: str) -> list[int]:
    """The processes of its group whose command line matches."""
    found = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "--", pattern], text=True, capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for(condition, what: str, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def losses_logged(folder: Path) -> int:
    log = folder / "log.log"
    return log.read_text().count("{'loss'") if log.is_file() else 0


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def curve(folder: Path) -> list[tuple]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    keys = ("step", "loss", "llm_loss", "action_loss", "grad_norm")
    return [tuple(entry[key] for key in keys) for entry in history if "loss" in entry]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(start, tmp_path, devices):
    whole = start("whole", devices=devices)
    output = whole.communicate(timeout=200)[0]
    assert whole.returncode == 0, output[-3000:]
    killed = start("killed", devices=devices)
    wait_for(lambda: losses_logged(tmp_path / "killed") >= 6, "six steps")
    kill_group(killed, signal.SIGKILL)
    killed.wait()
    reached = checkpoints(tmp_path / "killed")[-1]
    assert 4 <= reached < STEPS
    resumed = start("killed", "--resume_from_checkpoint", "True", devices=devices)
    output = resumed.communicate(timeout=200)[0]
    assert resumed.returncode == 0, output[-3000:]
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == STEPS
    last = f"checkpoint-{STEPS}/ema.safetensors"
    assert (tmp_path / "killed" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


@pytest.mark.parametrize("devices", [1, 2])
def test_sigterm_saves_and_stops(start, tmp_path, devices):
    process = start("out", "--save_steps", "1000", "--max_steps", "100000", devices=devices)
    folder = tmp_path / "out"
    wait_for(lambda: losses_logged(folder) >= 3, "three steps")
    kill_group(process, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]  # ends when the last process of the group has closed it
    assert "SIGTERM: saving and stopping after step" in output, output[-3000:]
    assert "--resume_from_checkpoint True goes on" in output, output[-3000:]
    (step,) = checkpoints(folder)
    assert curve(folder / f"checkpoint-{step}")[-1][0] == step


def test_a_dead_rank_ends_the_run(start, tmp_path):
    process = start("out", "--max_steps", "100000", devices=2)
    wait_for(lambda: losses_logged(tmp_path / "out") >= 3, "three steps")
    os.kill(pids_of(process, "--local_rank=1")[0], signal.SIGKILL)
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and "exits with return code = -9" in output, output[-3000:]


def test_a_dead_worker_ends_the_run(start, tmp_path):
    process = start("out", "--max_steps", "100000", "--dataloader_num_workers", "1")
    wait_for(lambda: losses_logged(tmp_path / "out") >= 3, "three steps")
    os.kill(max(pids_of(process, "train_vla.py")), signal.SIGKILL)
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and "DataLoader worker" in output and "killed" in output, output[-3000:]
