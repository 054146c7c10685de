"""`python benchmarks/train_step.py --batch 12 --settings base compile`: how fast a training step is, and why.

A model of full size with random weights, made on the device, learns from synthetic batches of real shape: three cameras
of 320x240, 360 tokens, chunks of 50 actions. One row per setting and batch size, each after its own warm-up:

    samples/s, tokens/s: there is no padding
    TFLOP/s: samples/s times the operations that the mathematics needs (qwen2_vla/flops.py), nothing recomputed
    MFU: TFLOP/s divided by the device's dense bf16 peak, where that is known
    GB: peak of PyTorch's tensors, 10^9 bytes
    data: collating a batch and handing it to the device; host: until all other calls of the step have returned, also
        where they wait because the device has enough to do; both by the host's clock
    forward, backward, optimizer (with gradient clipping): by the device's clock

The last five are shares of the step's time; host and device work at once, so they do not add up to 100 %.
"""

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qwen2_vla.environment  # noqa: F401  before the libraries that it prepares

# isort: split
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from data_utils.errors import UserError, run_command
from policy_heads import SCALEDP_SIZES
from qwen2_vla.adapters import add_lora
from qwen2_vla.flops import (
    PRESETS,
    SampleSizes,
    build_model,
    collate,
    peak_flops,
    preset_config,
    synthetic_items,
    training_flops,
)
from qwen2_vla.loading import freeze

SETTINGS = {
    "base": "fp32 weights under bf16 autocast, SDPA, fused AdamW, nothing compiled: training on one GPU as it is",
    "compile": "torch.compile of each decoder layer, vision block and DiT block",
    "checkpointing": "activations of these blocks are computed again in the backward pass",
    "bf16_weights": "bf16 weights and gradients, AdamW on fp32 master weights: DeepSpeed's bf16 engine",
    "lora": "LoRA on vision tower and language model (rank 64), head and fusion in full",
    "adam8bit": "bitsandbytes' AdamW with 8-bit states instead of PyTorch's",
    "freeze_vision": "the vision tower does not train",
}
PACKAGES = {"lora": "peft", "adam8bit": "bitsandbytes"}
LORA_MODULES = ["vit", "llm"]
ADAM = {"lr": 2e-5, "betas": (0.9, 0.98), "eps": 1e-7}
COLUMNS = (
    "device | torch | model | setting | batch | samples/s | tokens/s | TFLOP/s | MFU | GB | "
    "data | host | forward | backward | optimizer"
)
HEADER = f"| {COLUMNS} |\n|{'---|' * len(COLUMNS.split('|'))}"


def parse_settings(names: list[str]) -> list[tuple[str, ...]]:
    """ "compile+lora" -> ("compile", "lora"); leaves out, with a note, what needs a missing package."""
    settings = []
    for name in names:
        options = tuple(name.split("+"))
        unknown = set(options) - set(SETTINGS)
        if unknown:
            raise UserError(f"--settings: expected {', '.join(SETTINGS)}, joined by +, found {', '.join(unknown)}")
        missing = [p for option, p in PACKAGES.items() if option in options and importlib.util.find_spec(p) is None]
        if missing:
            print(f"{name}: left out, it needs the package {', '.join(missing)}")
        else:
            settings.append(options)
    return settings


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    head = base.policy_head
    head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    return [*base.model.visual.blocks, *base.model.language_model.layers, *head.blocks]


def make_model(config, options: tuple[str, ...], device: torch.device) -> nn.Module:
    model = build_model(config, device, torch.bfloat16 if "bf16_weights" in options else torch.float32)
    freeze(model, vision_tower="freeze_vision" in options)
    if "lora" in options:
        model = add_lora(model, LORA_MODULES)
    if "checkpointing" in options:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if "compile" in options:
        for block in repeated_blocks(model):
            block.compile(dynamic=False)
    return model


def make_update(model: nn.Module, options: tuple[str, ...]) -> Callable[[], None]:
    """A function that clips the gradients, steps the optimizer and forgets the gradients."""
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in weights] if "bf16_weights" in options else weights
    if "adam8bit" in options:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(masters, **ADAM)
    else:
        optimizer = torch.optim.AdamW(masters, fused=True, **ADAM)

    @torch.no_grad()
    def update():
        if masters is not weights:
            for master, weight in zip(masters, weights):
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not weights:
            torch._foreach_copy_(weights, masters)

    return update


class Clock:
    """Moments as the device sees them; `seconds` between two of them once everything is done."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> torch.Event | float:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def wait(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def seconds(self, start: torch.Event | float, end: torch.Event | float) -> float:
        return end - start if self.device.type == "cpu" else start.elapsed_time(end) / 1e3


def train_step(model, items: list[dict], update: Callable[[], None], clock: Clock, precision) -> tuple[list, list]:
    """Device times before forward, backward, optimizer and after; host times before and after data, and at the end."""
    host = [time.perf_counter()]
    batch = collate(items, clock.device)
    host.append(time.perf_counter())
    device = [clock.now()]
    with precision:
        loss = model(**batch).loss
    device.append(clock.now())
    loss.backward()
    device.append(clock.now())
    update()
    device.append(clock.now())
    host.append(time.perf_counter())
    return device, host


def measure(config, options: tuple[str, ...], batch: int, args: argparse.Namespace, sizes: SampleSizes) -> dict:
    """Figures of one row, seconds as means of `--steps` steps after `--warmup` others."""
    device, clock = args.device, Clock(args.device)
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    model = make_model(config, options, device)
    update = make_update(model, options)
    items = synthetic_items(config, sizes, batch)
    precision = torch.autocast(device.type, torch.bfloat16, enabled="bf16_weights" not in options)
    step = (model, items, update, clock, precision)
    for _ in range(args.warmup):
        train_step(*step)
    clock.wait()
    start = time.perf_counter()
    times = [train_step(*step) for _ in range(args.steps)]
    clock.wait()
    total = (time.perf_counter() - start) / args.steps
    figures = {"step": total, "data": 0.0, "host": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    for moments, host in times:
        figures["data"] += (host[1] - host[0]) / args.steps
        figures["host"] += (host[2] - host[1]) / args.steps
        for name, before, after in zip(("forward", "backward", "optimizer"), moments, moments[1:]):
            figures[name] += clock.seconds(before, after) / args.steps
    figures["memory"] = torch.accelerator.max_memory_allocated() if device.type != "cpu" else None
    if args.profile:
        write_profile(args.profile, f"{'+'.join(options)}, batch {batch}", lambda: train_step(*step), clock)
    return figures


def write_profile(path: str, title: str, run: Callable, clock: Clock):
    """Appends the 20 operations that take most of the device's time in one step."""
    on_cpu = clock.device.type == "cpu"
    with profile(activities=None if not on_cpu else [ProfilerActivity.CPU]) as recorded:
        run()
        clock.wait()
    by = "self_cpu_time_total" if on_cpu else "self_device_time_total"
    table = recorded.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=90)
    with open(path, "a") as file:
        file.write(f"{title}\n{table}\n\n")


def row(config, options: tuple[str, ...], batch: int, figures: dict | None, args, sizes: SampleSizes) -> str:
    cells = [device_name(args.device), torch.__version__, args.preset, "+".join(options), str(batch)]
    if figures is None:
        return f"| {' | '.join([*cells, 'OOM', *['–'] * 9])} |"
    lora_modules = LORA_MODULES if "lora" in options else []
    frozen = {"freeze_vision_tower": "freeze_vision" in options, "lora_modules": lora_modules}
    rate, peak = batch / figures["step"], peak_flops(device_name(args.device))
    flops = rate * sum(training_flops(config, sizes, **frozen).values())
    cells += [f"{rate:.2f}", f"{rate * sizes.tokens:,.0f}", f"{flops / 1e12:.3g}"]
    cells += [f"{flops / peak:.1%}" if peak else "–"]
    cells += [f"{figures['memory'] / 1e9:.1f}" if figures["memory"] else "–"]
    cells += [f"{figures[name] / figures['step']:.0%}" for name in ("data", "host", "forward", "backward", "optimizer")]
    return f"| {' | '.join(cells)} |"


def choose_device(asked: str | None) -> torch.device:
    """What --device says, else the accelerator that is there, else the CPU. Raises UserError when it is not there."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    kinds = {"cpu", torch.device(best).type}
    if asked and asked.partition(":")[0] not in kinds:
        raise UserError(f"--device: expected {' or '.join(sorted(kinds))} on this machine, found {asked}")
    return torch.device(asked or best)


def device_name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def clean_up(device: torch.device):
    gc.collect()
    torch.compiler.reset()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="2b", help="sizes of the backbone")
    parser.add_argument("--head", choices=SCALEDP_SIZES, help="default: the preset's, ScaleDP_H for 2b")
    parser.add_argument("--batch", type=int, nargs="+", default=[12])
    parser.add_argument("--settings", nargs="+", default=["base"], help=f"of {', '.join(SETTINGS)}; join with +")
    parser.add_argument("--chunk_size", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=SampleSizes.tokens, help="text and image tokens of a sample")
    parser.add_argument("--steps", type=int, default=10, help="that are measured")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--device", help="default: the accelerator that is there, else cpu")
    parser.add_argument("--profile", metavar="FILE", help="append the 20 slowest operations of each row to it")
    parser.add_argument("--output", metavar="FILE", help="append each row to it when it is known")
    parser.add_argument("--header", action="store_true", help="print the table's head only")
    args = parser.parse_args(argv)
    for flag, found in (("steps", args.steps), ("warmup", args.warmup + 1), ("batch", min(args.batch))):
        if found < 1:
            raise UserError(f"--{flag}: expected a positive number, found {getattr(args, flag)}")
    args.device = choose_device(args.device)
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.header:
        print(HEADER)
        return
    settings = parse_settings(args.settings)
    torch.set_float32_matmul_precision("high")  # as --tf32 True
    config = preset_config(args.preset, args.head, args.chunk_size)
    sizes = SampleSizes(tokens=args.tokens)
    operations = training_flops(config, sizes)
    print(f"{sum(operations.values()) / 1e12:.3f} TFLOP a sample: ", end="")
    print(", ".join(f"{part} {flops / 1e12:.3f}" for part, flops in operations.items()))
    for option in dict.fromkeys(option for options in settings for option in options):
        print(f"{option}: {SETTINGS[option]}")
    print(f"\n{HEADER}", flush=True)
    for batch in args.batch:
        for options in settings:
            torch.manual_seed(0)
            try:
                figures = measure(config, options, batch, args, sizes)
            except torch.OutOfMemoryError:
                figures = None
            clean_up(args.device)
            line = row(config, options, batch, figures, args, sizes)
            print(line, flush=True)
            if args.output:
                with open(args.output, "a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    run_command(main)
