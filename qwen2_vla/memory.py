"""`python -m qwen2_vla.memory --batch 12`: will the training fit? Device memory per GPU, computed without a GPU.

Weights, gradients and optimizer states are counted by parameter, activations by running the real model on fake CUDA
tensors, which have sizes but no contents, and adding up what autograd keeps.
"""

import argparse
import functools
import json
import os
import warnings
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import product

import qwen2_vla.environment  # noqa: F401  before the libraries that it prepares

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from data_utils.errors import UserError, run_command
from policy_heads import SCALEDP_SIZES

from .adapters import add_lora, halve_frozen
from .configuration_qwen2_vla import Qwen2VLAConfig
from .flops import SampleSizes, build_model, collate, preset_config, synthetic_items
from .loading import build_config, freeze
from .modeling_qwen2_vla import VLA_MODULES

GIB, CARDS = 2**30, (12, 16, 24, 40, 80, 141)  # what cards are named after are GiB
FRAGMENTATION, CONTEXT = 0.05, GIB  # of the peak, for the allocator's gaps; CUDA's context and its libraries' workspace
BACKWARD = ("head", "lm_head", "language_model", "vision")  # the order in which gradients appear; head with fusion
MODES = ("full", "lora", "qlora4", "qlora8")
ADAPTED = ["vit", "llm"]  # what LoRA adapts here; the head trains in full beside it


@dataclass(frozen=True)
class Plan:
    """How one trains. zero 0: fp32 weights under bf16 autocast; else DeepSpeed's bf16 engine."""

    batch: int = 12
    mode: str = "full"
    zero: int = 0
    offload: bool = False
    gpus: int = 1
    optimizer: str = "adamw"
    checkpointing: bool = False
    freeze_vision_tower: bool = False
    using_ema: bool = False
    gradient_accumulation_steps: int = 1
    lora_r: int = 64

    def __post_init__(self):
        for flag, allowed in (("mode", MODES), ("zero", (0, 2, 3)), ("optimizer", ("adamw", "adamw8bit"))):
            if getattr(self, flag) not in allowed:
                expected = ", ".join(map(str, allowed))
                raise UserError(f"--{flag}: expected one of {expected}, found {getattr(self, flag)}")
        for flag in ("batch", "gpus", "gradient_accumulation_steps", "lora_r"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag}: expected a positive number, found {getattr(self, flag)}")
        if self.offload and not self.zero:
            raise UserError("--offload: expected --zero 2 or 3 too, found --zero 0")
        if self.zero == 3 and (self.bits < 16 or self.using_ema):
            raise UserError("--zero 3: expected neither quantised weights nor an EMA: ZeRO-3 shards the weights")

    @property
    def bits(self) -> int:
        return int(self.mode.removeprefix("qlora")) if self.mode.startswith("qlora") else 16

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.zero else torch.float32


@dataclass(frozen=True)
class Counts:
    """By part, a key each of BACKWARD. trained: numbers of parameters of each trained tensor. frozen, quantised: bytes.
    fixed, each: bytes that autograd keeps until the backward pass, of any batch and of each sample of it."""

    trained: dict[str, list[int]]
    frozen: int
    quantised: int
    fixed: dict[str, int]
    each: dict[str, int]

    def saved(self, part: str, batch: int) -> int:
        return self.fixed.get(part, 0) + batch * self.each.get(part, 0)


class FlashAttention(TorchFunctionMode):
    """What CUDA picks for bf16 without a mask: fake tensors have no device that could be asked for its kernels."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (x.to(torch.bfloat16) for x in args)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, kwargs.get("is_causal", False), scale=kwargs.get("scale"))[0]


def count_saved(model: nn.Module, batch: dict, keep_inputs_of: list[nn.Module] | tuple = ()) -> dict[str, int]:
    """Bytes that one forward pass leaves behind for its backward pass, by part, without parameters; each storage counts
    once. `keep_inputs_of`: layers that keep their input by themselves."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[str, Tensor]] = {}  # the tensors too: a freed storage's address would be used again
    part = "vision"

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in known:
            kept.setdefault(storage, (part, tensor))
        return tensor

    def enter(name: str, *_):
        nonlocal part
        part = name

    def keep_input(_, inputs: tuple):
        keep(inputs[0])

    first = {"language_model": base.model.language_model.layers[0], "lm_head": base.lm_head}
    first["head"] = base.input_action_proj if base.config.using_film else base.policy_head
    hooks = [m.register_forward_pre_hook(functools.partial(enter, name)) for name, m in first.items()]
    hooks += [m.register_forward_pre_hook(keep_input) for m in keep_inputs_of]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    saved = Counter()
    for name, tensor in kept.values():
        saved[name] += tensor.untyped_storage().nbytes()
    return dict(saved)


def planned_model(config: Qwen2VLAConfig, plan: Plan) -> tuple[nn.Module, list[nn.Linear]]:
    """The model on fake CUDA tensors, frozen and adapted, and its layers that would be quantised: bf16 here."""
    model, quantised = build_model(config, "meta"), []
    freeze(model, vision_tower=plan.freeze_vision_tower)
    if plan.bits < 16:
        outside = (*VLA_MODULES, "lm_head")
        linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(outside)]
        quantised = [m for _, m in linear if plan.bits == 8 or m.in_features % 64 == 0]  # nf4 is in blocks of 64
    if plan.mode != "full":
        with torch.device("meta"):
            model = add_lora(model, ADAPTED, r=plan.lora_r)
        halve_frozen(model)
    made: dict[int, Tensor] = {}  # tied weights stay tied
    stored = {id(layer.weight) for layer in quantised}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, old in own.items():
                if old is None:
                    continue
                dtype = torch.bfloat16 if plan.zero and old.is_floating_point() or id(old) in stored else old.dtype
                new = torch.empty_like(old, dtype=dtype, device="cuda:0")
                is_weight = isinstance(old, nn.Parameter)
                own[name] = made.setdefault(id(old), nn.Parameter(new, old.requires_grad) if is_weight else new)
    return model, quantised


def quantised_bytes(layer: nn.Linear, bits: int) -> int:
    """Of a weight (outputs, inputs) in bitsandbytes' formats: nf4 with double quantisation, or int8 by rows."""
    count, blocks = layer.weight.numel(), -(-layer.weight.numel() // 64)
    if bits == 8:
        return count + 4 * layer.out_features
    constants = blocks + 4 * -(-blocks // 256) + 4  # a byte for each block of 64, and what those bytes mean
    return -(-count // 2) + constants + 4 * (16 + 256)  # and the two code books


def part_of(name: str, tied: bool) -> str:
    if "visual." in name:
        return "vision"
    if any(module in name for module in VLA_MODULES):
        return "head"
    return "lm_head" if "lm_head" in name or (tied and "embed_tokens" in name) else "language_model"


def count(config: Qwen2VLAConfig, plan: Plan, sizes: SampleSizes) -> Counts:
    """Runs the forward pass of one sample and of two on fake CUDA tensors; everything grows linearly in the batch."""
    same = {"batch": 1, "gpus": 1, "offload": False, "optimizer": "adamw", "using_ema": False}
    key = replace(plan, **same, gradient_accumulation_steps=1, zero=2 if plan.zero else 0)
    return _count(config.to_json_string(use_diff=False), key, sizes)


@functools.cache
def _count(config_json: str, plan: Plan, sizes: SampleSizes) -> Counts:
    config = Qwen2VLAConfig(**json.loads(config_json))
    batches = [collate(synthetic_items(config, sizes, size), "cpu") for size in (1, 2)]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, FlashAttention():
        model, quantised = planned_model(config, plan)
        if plan.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        torch.set_autocast_enabled("cuda", not plan.zero)  # torch.autocast would look for a real device
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        saved = []
        try:
            for batch in batches:
                on_device = tree_map_only(Tensor, lambda tensor: fake.from_tensor(tensor).to("cuda:0"), batch)
                saved.append(count_saved(model, on_device, quantised if plan.bits == 8 else ()))
                torch.clear_autocast_cache()
        finally:
            torch.set_autocast_enabled("cuda", False)
    each = {part: saved[1][part] - saved[0][part] for part in saved[0]}
    own = {id(layer.weight) for layer in quantised}
    trained, frozen = {part: [] for part in BACKWARD}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            trained[part_of(name, config.tie_word_embeddings)].append(p.numel())
        elif id(p) not in own:
            frozen += p.numel() * p.element_size()
    stored = sum(quantised_bytes(layer, plan.bits) for layer in quantised)
    return Counts(trained, frozen, stored, {part: saved[0][part] - each[part] for part in each}, each)


def optimizer_bytes(sizes: list[int], optimizer: str) -> int:
    """Two moments of each parameter, and of each tensor the step: `sizes` are numbers of parameters. bitsandbytes keeps
    a byte for each moment and two constants for each block of 256; tensors below 4096 stay fp32."""
    if optimizer == "adamw":
        return sum(8 * size + 4 for size in sizes)
    return sum(8 * size if size < 4096 else 2 * size + 8 * -(-size // 256) for size in sizes)


def states(counts: Counts, plan: Plan) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer, ema and step (gradients made for the optimizer) on a GPU, host off it."""
    trained = [size for tensors in counts.trained.values() for size in tensors]
    number, width = sum(trained), plan.dtype.itemsize
    weights, optimizer = width * number + counts.frozen + counts.quantised, optimizer_bytes(trained, plan.optimizer)
    ema = 4 * number if plan.using_ema else 0
    if not plan.zero:
        gradients = width * number * (2 if plan.gpus > 1 else 1)  # DDP's buckets hold them once more
        return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "ema": ema, "step": 0, "host": 0}
    sharded = width * number, 4 * number + optimizer, 4 * number  # the optimizer's own are fp32
    (gradients, optimizer, step), host = (part // plan.gpus for part in sharded), 0
    if plan.offload:
        gradients, optimizer, step, host = 0, 0, 0, gradients + optimizer + step
    if plan.zero == 3:
        shard, gathered = weights // plan.gpus, min(weights, width * 10**9)  # stage3_max_live_parameters
        weights, host = (gathered, host + shard) if plan.offload else (gathered + shard, host)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "ema": ema, "step": step, "host": host}


def estimate(config: Qwen2VLAConfig, plan: Plan, sizes: SampleSizes) -> dict[str, int]:
    """Bytes per GPU, a key each of ROWS, and `host`, what offloading moves to the machine's memory for each GPU.

    Gradients appear while activations go, part by part, so the peak is below the sum; with gradient accumulation, DDP
    or DeepSpeed all gradients exist all the time.
    """
    counts = count(config, plan, sizes)
    loose = count(config, replace(plan, checkpointing=False), sizes)
    result = states(counts, plan)
    saved = {part: counts.saved(part, plan.batch) for part in BACKWARD}
    # fp32 gradient and bf16 logits and gradient, and accelerate's fp32 copy of the output, beside what autograd keeps
    logits = 12 * plan.batch * sizes.answer_tokens * config.text_config.vocab_size
    depths = {"language_model": config.text_config.num_hidden_layers, "vision": config.vision_config.depth}
    block = max(loose.saved(part, plan.batch) // depth for part, depth in depths.items())
    # a block's gradients are about as large as what it kept, which checkpointing makes anew
    short_lived = max(logits, (2 if plan.checkpointing else 1) * block)

    all_the_time = plan.zero or plan.gradient_accumulation_steps > 1 or plan.gpus > 1
    live, done, gradients = sum(saved.values()), 0, result["gradients"]
    # autocast keeps all of its bf16 copies until the forward pass ends, also those that checkpointing makes anew
    copies = sum(loose.fixed.values()) - sum(counts.fixed.values()) if plan.mode == "full" and not plan.zero else 0
    peaks = [live + max(short_lived, copies) + (gradients if all_the_time else 0), gradients + result["step"]]
    for part in BACKWARD:
        live, done = live - saved[part], done + plan.dtype.itemsize * sum(counts.trained[part])
        peaks.append(live + short_lived + (gradients if all_the_time else done))
    peak = result["weights"] + result["optimizer"] + result["ema"] + max(peaks)
    margin = int(FRAGMENTATION * peak) + CONTEXT
    result |= {"activations": sum(saved.values()), "logits": saved["lm_head"], "transient": short_lived}
    return result | {"peak": peak, "margin": margin, "total": peak + margin}


ROWS = {
    "weights": "weights", "gradients": "gradients (all of them)", "optimizer": "optimizer states", "ema": "EMA",
    "activations": "activations kept for the backward pass", "logits": "  of them around the logits",
    "transient": "short-lived: logits' or one block's gradients",
    "peak": "peak of PyTorch's tensors", "margin": "margin: 5 % fragmentation, 1 GiB CUDA", "total": "needed",
    "host": "in the memory of the machine, for each GPU",
}  # fmt: skip


def table(result: dict[str, int]) -> str:
    lines = [f"{label:<48}{result[name] / GIB:8.1f} GiB" for name, label in ROWS.items()]
    fits = (f"{card} GB: {'yes' if result['total'] <= card * GIB else 'no'}" for card in CARDS)
    return "\n".join([*lines, "fits into " + ", ".join(fits)])


def ladder(folder: str | None, chunk: int | None, sizes: SampleSizes) -> str:
    """A markdown table: from everything on one GPU down to 4-bit adapters, GiB per GPU with the margin."""
    setups = {
        "full, fp32 weights, bf16 autocast": Plan(),
        "full, ZeRO-2 bf16, 8 GPUs": Plan(zero=2, gpus=8),
        "full, ZeRO-2 bf16 offload": Plan(zero=2, offload=True),
        "LoRA": Plan(mode="lora"),
        "QLoRA 4": Plan(mode="qlora4"),
    }
    lines = ["| training | head | checkpointing | batch 1 | batch 4 | batch 12 | card for 12 |", "|" + "---|" * 7]
    for (name, plan), head, again in product(setups.items(), ("ScaleDP_H", "ScaleDP_L"), (False, True)):
        plans = [replace(plan, checkpointing=again, batch=batch) for batch in (1, 4, 12)]
        config = make_config(folder, head, chunk)
        totals = [estimate(config, plan, sizes)["total"] for plan in plans]
        card = next((f"{card} GB" for card in CARDS if totals[-1] <= card * GIB), "none")
        cells = [name, head, "on" if again else "off", *(f"{total / GIB:.1f}" for total in totals), card]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_config(folder: str | None, head: str | None, chunk: int | None) -> Qwen2VLAConfig:
    if folder is None:
        return preset_config("2b", head, chunk or 50)
    present = Qwen2VLAConfig.from_pretrained(folder).policy_head_config if os.path.isdir(folder) else None
    return build_config(folder, head_size=head, chunk_size=chunk or getattr(present, "prediction_horizon", 50))


def main(argv: list[str] | None = None):
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers by old names
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in fields(Plan):
        if flag.type is bool:
            parser.add_argument(f"--{flag.name}", action="store_true")
        else:
            parser.add_argument(f"--{flag.name}", type=flag.type, default=flag.default)
    parser.add_argument("--head", choices=SCALEDP_SIZES, help="default: what --model says, else ScaleDP_H")
    parser.add_argument("--chunk_size", type=int, help="default: what --model says, else 50")
    parser.add_argument("--tokens", type=int, default=SampleSizes.tokens, help="text and image tokens of a sample")
    parser.add_argument("--model", help="folder with a config.json (default: the sizes of Qwen2-VL-2B)")
    parser.add_argument("--ladder", action="store_true", help="one table of many settings")
    args = parser.parse_args(argv)
    sizes = SampleSizes(tokens=args.tokens)
    if args.ladder:
        print(ladder(args.model, args.chunk_size, sizes))
        return
    plan = Plan(**{flag.name: getattr(args, flag.name) for flag in fields(Plan)})
    print(table(estimate(make_config(args.model, args.head, args.chunk_size), plan, sizes)))


if __name__ == "__main__":
    run_command(main)
