"""Nothing is lost: checkpoints are whole, signals are heard, and what is not finite is skipped and named."""

import json
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_vla
from data_utils.hdf5 import Hdf5Episode
from qwen2_vla import QWen2VLATrainer
from qwen2_vla.safety import PARTIAL, FiniteSteps, written_beside
from qwen2_vla.trainer import StepMeter

from .test_training import column, history, train  # noqa: F401  (a fixture)

# ---- checkpoints ----


def test_a_disk_that_fills_while_saving_loses_nothing(train, monkeypatch, tmp_path):  # noqa: F811
    whole = train("whole")
    save = QWen2VLATrainer._save_optimizer_and_scheduler
    written = []

    def fail_the_second_time(self, output_dir):
        written.append(output_dir)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(QWen2VLATrainer, "_save_optimizer_and_scheduler", fail_the_second_time)
    with pytest.raises(SystemExit, match="checkpoint-4: expected to write a checkpoint, found OSError.*No space left"):
        train("cut")
    assert PARTIAL in written[0] and sorted(p.name for p in (tmp_path / "cut").glob("checkpoint*")) == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = train("cut", resume_from_checkpoint=True)
    assert column(resumed, "loss") == column(whole, "loss")
    assert not (tmp_path / "cut" / PARTIAL).exists()


def test_a_half_checkpoint_of_a_killed_run_is_not_taken(train, tmp_path):  # noqa: F811
    out = Path(train("out", max_steps=2))
    (out / PARTIAL / "checkpoint-3").mkdir(parents=True)
    assert train_vla.newest_checkpoint(str(out)).endswith("checkpoint-2")
    train("out", max_steps=4, resume_from_checkpoint=True)
    assert not (out / PARTIAL).exists() and (out / "checkpoint-4" / "trainer_state.json").is_file()


@pytest.mark.parametrize("shared", [True, False])
def test_machines_with_one_disk_or_with_their_own(tmp_path, shared, monkeypatch):
    """Each machine's first rank puts the checkpoint in its place; on a shared disk only one of them may."""
    machines, barrier = 3, threading.Barrier(3, timeout=30)
    replace = os.replace

    def slowly(*paths):  # all of them have looked before one of them acts
        time.sleep(0.05)
        replace(*paths)

    monkeypatch.setattr(os, "replace", slowly)

    def save(rank: int):
        accelerator = SimpleNamespace(
            is_local_main_process=True, is_main_process=rank == 0, wait_for_everyone=barrier.wait
        )
        disk = tmp_path if shared else tmp_path / str(rank)
        for text in ("first", "again"):
            with written_beside(str(disk), 2, accelerator) as folder:
                written = Path(folder, "checkpoint-2", f"rng_state_{rank}.pth")
                written.parent.mkdir(parents=True, exist_ok=True)
                written.write_text(text)
        return disk / "checkpoint-2" / written.name

    with ThreadPoolExecutor(machines) as pool:
        kept = list(pool.map(save, range(machines)))
    assert [path.read_text() for path in kept] == ["again"] * machines
    assert not list(tmp_path.rglob(PARTIAL))


def test_old_checkpoints_go_only_when_the_new_one_is_whole(train, monkeypatch):  # noqa: F811
    seen = []
    finish = QWen2VLATrainer._finish_checkpoint

    def look(self, folder):
        seen.append(sorted(p.name for p in Path(self.args.output_dir).glob("checkpoint*")))
        finish(self, folder)

    monkeypatch.setattr(QWen2VLATrainer, "_finish_checkpoint", look)
    out = train("out", save_steps=1, save_total_limit=1)
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]
    assert [p.name for p in Path(out).glob("checkpoint*")] == ["checkpoint-4"]


def test_the_best_checkpoint_is_named_by_its_place(train):  # noqa: F811
    out = train(
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=False,
    )  # fmt: skip
    for folder in (f"{out}/checkpoint-2", f"{out}/checkpoint-4"):
        state = json.loads(Path(f"{folder}/trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).is_dir() and PARTIAL not in state["best_model_checkpoint"]


# ---- what is not finite ----


@pytest.fixture
def poisoned(monkeypatch):
    """Episode 0 holds a NaN that came after the checks, in the state of frame 5."""
    opened = Hdf5Episode.__init__

    def open_episode(self, path):
        opened(self, path)
        if self.path.endswith("episode_0.hdf5"):
            self.qpos[5, 3] = np.nan

    monkeypatch.setattr(Hdf5Episode, "__init__", open_episode)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_step_that_is_not_finite_is_skipped_and_named(train, poisoned, capsys, optim):  # noqa: F811
    out = train(optim=optim, max_steps=18, logging_steps=3, save_steps=100)  # one epoch: 36 frames, two a step
    lines = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(lines) == 1 and lines[0].startswith("step ") and lines[0].endswith("; skipped")
    assert ", rank 0: the loss is not finite" in lines[0] and "episode_0.hdf5 frames" in lines[0]
    assert " 5" in lines[0].split("episode_0.hdf5 frames")[1]
    assert all(math.isfinite(loss) for name in ("loss", "llm_loss", "action_loss") for loss in column(out, name))
    assert all(tensor.isfinite().all() for tensor in load_file(f"{out}/model.safetensors").values())


def test_skipping_leaves_weights_and_moments_as_they_were():
    for fused in (True, False):
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)

        def step(gradient, weight=weight, optimizer=optimizer):
            weight.grad = torch.full((4,), gradient)
            FiniteSteps.guard(optimizer, weight.grad.norm())
            optimizer.step()
            return weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()

        first, skipped, third = step(1.0), step(math.nan), step(1.0)
        assert torch.equal(first[0], skipped[0]) and torch.equal(first[1], skipped[1])
        assert not torch.equal(skipped[0], third[0]) and third[0].isfinite().all()


def test_too_many_skipped_steps_stop_with_the_list(train, poisoned, monkeypatch):  # noqa: F811
    with pytest.raises(SystemExit) as error:
        train(max_steps=80, logging_steps=40, save_steps=100, max_skipped_steps=1)
    message = str(error.value)
    assert "--max_skipped_steps 1: expected losses and gradients to be finite, found 2 steps" in message
    assert message.count("episode_0.hdf5 frames") == 2


# ---- the log ----


def test_every_line_of_the_log_says_how_fast_it_is(train):  # noqa: F811
    out = train()
    for name in ("samples_per_second", "data_wait"):
        values = column(out, name)
        assert len(values) == 4 and all(math.isfinite(value) and value >= 0 for value in values)
    assert all(entry["data_wait"] <= 1 for entry in history(out) if "data_wait" in entry)


def test_mfu_on_a_known_device(train, monkeypatch):  # noqa: F811
    monkeypatch.setattr("qwen2_vla.trainer.peak_flops", lambda name: 1e12 if name == "cpu" else None)
    out = train()
    assert len(column(out, "mfu")) == 4
    for entry in history(out):
        if "mfu" in entry:  # the same samples by the same mathematics
            flops_per_sample = entry["mfu"] * 1e12 / entry["samples_per_second"]
            assert 1e7 < flops_per_sample < 1e10


def test_the_meter_stands_still_while_the_run_saves(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    meter = StepMeter()
    with meter.waiting():
        clock[0] += 1
    clock[0] += 3
    with meter.pause():
        clock[0] += 100
    meter.count(8, flops=1e12)
    figures = meter.read(ranks=2, peak_flops=1e12)
    assert figures["samples_per_second"] == 4 and figures["data_wait"] == 0.25 and figures["mfu"] == 0.25
    clock[0] += 1
    assert meter.read(ranks=2, peak_flops=None)["samples_per_second"] == 0
