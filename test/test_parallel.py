"""Two processes compute what one does, whatever engine shares the work."""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from data_utils import EpisodicDataset, Qwen2VLADataCollatorForSupervisedDataset, get_norm_stats
from qwen2_vla import Qwen2VLAProcess, Qwen2VLForConditionalGenerationForVLA
from qwen2_vla.loading import load_processor
from qwen2_vla.safety import FiniteSteps

from .helpers import CAMERAS, EPISODES, GOLDEN, ROOT, relative_error
from .test_scripts import SMALL, data_dir, free_port, losses, script  # noqa: F401  (fixtures)


def test_ddp_zero2_and_zero3_agree(script):  # noqa: F811
    """The same samples and the same noise on every rank, so the same losses; logged with five digits."""
    curves = {}
    for zero in ("ddp", "scripts/zero2.json", "scripts/zero3.json"):
        output, _ = script(
            "train_dexvla_stage2.sh", "--max_steps", "3", "--save_strategy", "no", output=zero.split("/")[-1],
            NUM_DEVICES=2, ZERO=zero,
        )  # fmt: skip
        curves[zero] = torch.tensor(losses(output))
        assert curves[zero].shape == (3, 3), output[-3000:]
    for zero, curve in curves.items():
        assert torch.allclose(curve, curves["ddp"], rtol=1e-4), zero


def test_two_nodes_of_one_process_each(data_dir, tiny_base, tmp_path):  # noqa: F811
    """torchrun started once per machine, as README says; here both are this one."""
    port, small = free_port(), [part for flag, value in SMALL.items() for part in (f"--{flag}", str(value))]
    nodes = []
    for rank in range(2):
        settings = {
            "MNOP": tiny_base, "TASKNAME": "sim_transfer_cube_scripted", "OUTPUT": tmp_path / "out", "NUM_DEVICES": 1,
            "ZERO": "ddp", "NUM_NODES": 2, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = ["bash", "scripts/train_dexvla_stage2.sh", *(f"{k}={v}" for k, v in settings.items()), *small]
        env = os.environ | {
            "PYTHON": sys.executable, "DEXVLA_DATA_DIR": str(data_dir), "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        nodes.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert len(losses(outputs[0])) == 2 and losses(outputs[0]) == losses(outputs[1])  # each machine keeps its log
    assert (tmp_path / "out" / "checkpoint-2" / "rng_state_1.pth").is_file()


def batch_of(indices: list[int]) -> dict:
    processor = load_processor(str(GOLDEN / "checkpoint"))
    data = EpisodicDataset(
        EPISODES, CAMERAS, get_norm_stats(EPISODES), 8, image_size_stable=(56, 56),
        transform=Qwen2VLAProcess(processor, CAMERAS, image_size_wrist=(56, 56)),
    )  # fmt: skip
    collator = Qwen2VLADataCollatorForSupervisedDataset(pad_token_id=processor.tokenizer.pad_token_id)
    return collator([data[i] for i in indices])


def gradients_of(model, indices: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(indices[0])
    model(**batch_of(indices)).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in grads.items()}


def sharded_rank(rank: int, port: int, folder: str):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = Qwen2VLForConditionalGenerationForVLA.from_pretrained(GOLDEN / "checkpoint", dtype=torch.float32).train()
    for module in model.modules():
        if type(module).__name__ in ("Qwen2VLDecoderLayer", "Qwen2VLVisionBlock", "ScaleDPBlock"):
            fully_shard(module)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    gradients = gradients_of(model, [rank, 10 + rank])
    if rank == 1:  # one rank's share of one gradient is enough
        shares = (p.grad.to_local() for p in model.parameters() if p.grad is not None)
        next(share for share in shares if share.numel())[0] = torch.nan
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    before = [p.to_local().clone() for p in model.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    steps = FiniteSteps(limit=10)
    steps.watch(1, torch.tensor(1.0))
    steps.watch(1, norm)
    assert torch.stack([bad for *_, bad in steps.pending]).tolist() == [False, True]
    FiniteSteps.guard(optimizer, norm)
    optimizer.step()
    assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before))
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_fsdp2_averages_gradients(model, tmp_path):
    """Sharded as scripts/fsdp2.json has it done; the Trainer's own FSDP wants an accelerator."""
    torch.multiprocessing.spawn(sharded_rank, (free_port(), str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "gradients.pt", weights_only=True)
    first = gradients_of(model.train(), [0, 10])
    model.zero_grad()
    second = gradients_of(model, [1, 11])
    assert sharded.keys() == first.keys()
    for name, gradient in sharded.items():
        assert relative_error(gradient, (first[name] + second[name]) / 2) < 1e-4, name
