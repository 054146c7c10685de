"""`python benchmarks/inference.py --batch 1 8`: how long a query for action chunks takes, and why.

A model of full size with random weights, made on the device, acts on synthetic observations: three cameras of 640x480,
chunks of 50 actions. It never ends a text by itself, so that every answer has `--tokens` tokens. One row per setting
and batch size, each after its own warm-up:

    p50, p99: ms of `Qwen2VLAPolicy.predict`, from images to actions in the robot's units; chunks/s: at the p50
    GB: peak of PyTorch's tensors, 10^9 bytes
    image: ms on the host to resize and tokenise and to hand everything to the device; vision: the vision tower
    prefill: reading prompt and draft, without the vision tower; decode: each further token; steps: how many there were
    diffusion: the DDIM loop

The parts are measured in queries of their own, in which the device is waited for before and after each part; vision is
called by itself. What is missing to the whole is fusion, un-normalising and (plain) what `generate` does besides.
Before the rows it prints how well the ways agree: relative error of the actions, and how many texts are the same. In
bf16 a random model's texts may differ, since many tokens are about as likely.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qwen2_vla.environment  # noqa: F401  before the libraries that it prepares

# isort: split
import numpy as np
import torch
from torch import nn

from benchmarks.train_step import choose_device, clean_up, device_name
from data_utils.errors import UserError, run_command
from policy_heads.diffusion import DiffusionPolicyHead, ZeroLinear
from qwen2_vla import Qwen2VLAPolicy, Qwen2VLAProcess
from qwen2_vla.flops import PRESETS, build_model, preset_config
from qwen2_vla.graphs import Replayed
from qwen2_vla.processing_qwen2_vla import ANSWER_MARK
from qwen2_vla.tiny import make_processor, make_tokenizer
from qwen2_vla.vision import encode_images

SETTINGS = {
    "plain": "transformers' generate and a head that is asked step by step",
    "write": "static cache, every token decoded",
    "draft": "as before, with a draft that turns out to be right",
    "given": "the reasoning of an earlier query is taken again, nothing is written",
    "none": "a policy without reasoning",
}
CAMERAS = ("top", "left_wrist", "right_wrist")
INSTRUCTION = "Transfer the red cube to the other arm."
WARM_UP_QUERIES = 3
COLUMNS = (
    "device | torch | model | batch | setting | way | p50 | p99 | chunks/s | GB | "
    "image | vision | prefill | decode | steps | diffusion"
)
HEADER = f"| {COLUMNS} |\n|{'---|' * len(COLUMNS.split('|'))}"


def make_policy(preset: str, chunk_size: int, device: torch.device) -> Qwen2VLAPolicy:
    """Random weights, fp32, with the tiny model's tokenizer; no text of it ever ends."""
    config, tokenizer = preset_config(preset, None, chunk_size), make_tokenizer()
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    config.data_config = {"camera_names": CAMERAS, "image_size_stable": (320, 240), "image_size_wrist": (320, 240)}
    config.data_config |= {"delta_control": False, "use_reasoning": True, "augment": True}
    model = build_model(config, device)
    for module in model.modules():
        if isinstance(module, ZeroLinear):  # at zero, most of the head would have no effect
            nn.init.normal_(module.weight, std=0.02)
    tokenizer.convert_tokens_to_ids = lambda token: config.text_config.vocab_size  # one that is never written
    head = config.policy_head_config
    sizes = {"action": head.input_dim, "qpos": head.state_dim}
    values = {"min": -1, "max": 1, "mean": 0, "std": 1}
    stats = {f"{of}_{kind}": np.full(n, value, np.float32) for of, n in sizes.items() for kind, value in values.items()}
    return Qwen2VLAPolicy(model, Qwen2VLAProcess(make_processor(tokenizer), list(CAMERAS)), {"robot": stats})


class Queries:
    """The same B observations again and again."""

    def __init__(self, policy: Qwen2VLAPolicy, batch: int, tokens: int):
        self.policy, self.model, self.tokens = policy, policy.model, tokens
        rng, size = np.random.default_rng(0), (480, 640, 3)
        self.observations = [
            {
                "images": {camera: rng.integers(0, 256, size, dtype=np.uint8) for camera in CAMERAS},
                "qpos": rng.normal(size=policy.state_dim),
            }
            for _ in range(batch)
        ]
        self.instructions = [f"{INSTRUCTION} {i}" for i in range(batch)]
        self.noise = rng.normal(size=(batch, policy.chunk_size, policy.action_dim)).astype(np.float32)
        tokenizer = policy.process.tokenizer
        words = tokenizer("Pick up the cube with the right gripper. " * tokens).input_ids
        self.sub_step = tokenizer.decode(words[: max(1, tokens - len(tokenizer(ANSWER_MARK).input_ids))])
        self.written: list[list[int]] = []  # what this policy writes to these observations

    def ask(self, setting: str) -> tuple[np.ndarray, list[str]]:
        """Actions (B, T, A) and texts."""
        drafts = dict(zip(self.instructions, self.written)) if setting == "draft" else {}
        self.policy._drafts = drafts  # token ids: a text may be cut into other tokens than it was written in
        self.policy.use_reasoning = setting != "none"
        reasoning = self.sub_step if setting == "given" else None
        return self.policy.predict(
            self.observations, self.instructions, self.tokens, reasoning=reasoning, noise=self.noise
        )

    @contextmanager
    def acting(self, setting: str, way: str):
        head = self.model.policy_head
        self.model.way_of_acting = way
        if setting == "plain":
            head.noise_predictor = DiffusionPolicyHead.noise_predictor.__get__(head)
        try:
            if setting == "draft":
                self.ask("write")
                self.written = self.model.last_written
            yield
        finally:
            self.model.way_of_acting = "captured"
            head.__dict__.pop("noise_predictor", None)


class Stopwatch:
    """Keeps, by name, the seconds of every call of some functions; the device is waited for before and after."""

    def __init__(self):
        self.times: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def watching(self, functions: list[tuple[object, str, str]]):
        """`functions`: (object, attribute, name of the part)."""
        kept = [(thing, attribute, getattr(thing, attribute)) for thing, attribute, _ in functions]
        for (thing, attribute, part), (_, _, function) in zip(functions, kept):
            setattr(thing, attribute, self.timed(function, part))
        try:
            yield
        finally:
            for thing, attribute, function in kept:
                setattr(thing, attribute, function)

    def timed(self, function: Callable, part: str) -> Callable:
        def call(*args, **kwargs):
            wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            self.times[part].append(time.perf_counter() - start)
            return result

        return call


def wait():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measure(queries: Queries, setting: str, way: str, count: int) -> dict[str, float]:
    """Figures of one row, s."""
    device = queries.model.device
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    with queries.acting(setting, way):
        watch = Stopwatch()
        ask = watch.timed(queries.ask, "query")
        for _ in range(WARM_UP_QUERIES + count):
            ask(setting)
        times = watch.times["query"][WARM_UP_QUERIES:]
        figures = {"p50": np.percentile(times, 50), "p99": np.percentile(times, 99)}
        figures["memory"] = torch.accelerator.max_memory_allocated() if device.type != "cpu" else 0
        return figures | measure_parts(queries, setting, max(2, count // 4))


def measure_parts(queries: Queries, setting: str, count: int) -> dict[str, float | None]:
    """s of each part of a query, and the number of steps; `decode` is None if there are no steps."""
    policy, model, watch = queries.policy, queries.model, Stopwatch()
    functions = [(policy, "_inputs", "image"), (model, "_denoise", "diffusion")]
    if setting == "plain":
        functions += [(model, "_write_plainly", "text"), (model.model, "forward", "forward")]
        functions += [(model.model.visual, "forward", "vision")]
    else:
        writer = list(model._kept.writers.values())[-1]  # the one used last
        functions += [(writer, "write", "text"), (writer, "read", "read"), (writer, "step", "step")]
        images = policy._inputs(queries.observations, queries.instructions, [policy.stats] * len(queries.instructions))
        encode = Replayed(lambda *images: encode_images(model.model.visual, list(images)), model._graphs())
        with torch.no_grad():
            encode(*images["images"])
            for _ in range(count):
                watch.timed(encode, "vision")(*images["images"])
    with watch.watching(functions):
        for _ in range(count):
            queries.ask(setting)
    if setting == "plain":  # the first of a query's calls reads the prompt
        calls = watch.times.pop("forward")
        watch.times["read"], watch.times["step"] = calls[:: queries.tokens], calls[count:]
    steps = len(watch.times.pop("step", [])) / count
    mean = {part: sum(times) / count for part, times in watch.times.items()}
    return mean | {
        "prefill": mean["read"] - mean["vision"],
        "decode": (mean["text"] - mean["read"]) / steps if steps else None,
        "steps": steps,
    }


def references(queries: Queries) -> dict[str, tuple[np.ndarray, list[str]]]:
    """By setting, what the plain way yields; for settings that it does not know, what the fast one does."""
    expected = {}
    for setting in ("plain", "given", "none"):
        with queries.acting(setting, "plain" if setting == "plain" else "fast"):
            expected[setting] = queries.ask(setting)
    return expected | {"write": expected["plain"], "draft": expected["plain"]}


def agreement(queries: Queries, ways: list[str], expected: dict[str, tuple[np.ndarray, list[str]]]) -> str:
    """One line: how far each way and setting is from what was expected."""
    parts = []
    for setting in list(SETTINGS)[1:]:
        for way in ways:
            with queries.acting(setting, way):
                actions, texts = queries.ask(setting)
            error = np.linalg.norm(actions - expected[setting][0]) / np.linalg.norm(expected[setting][0])
            same = sum(text.strip() == other.strip() for text, other in zip(texts, expected[setting][1]))
            parts.append(f"{setting}, {way}: {error:.1e}, {same} of {len(texts)} texts the same")
    return "; ".join(parts)


def row(args: argparse.Namespace, batch: int, setting: str, way: str, figures: dict | None) -> str:
    model = f"{args.preset}{' compiled' if args.compile else ''}"
    cells = [device_name(args.device), torch.__version__, model, str(batch), setting, way]
    if figures is None:
        return f"| {' | '.join([*cells, 'OOM', *['–'] * 9])} |"
    cells += [f"{1e3 * figures[name]:.1f}" for name in ("p50", "p99")]
    cells += [f"{batch / figures['p50']:.1f}", f"{figures['memory'] / 1e9:.1f}" if figures["memory"] else "–"]
    for name in ("image", "vision", "prefill", "decode", "steps", "diffusion"):
        number = figures[name]
        cells.append("–" if number is None else f"{number:.0f}" if name == "steps" else f"{1e3 * number:.2f}")
    return f"| {' | '.join(cells)} |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="2b", help="sizes of the model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="observations in a query")
    parser.add_argument("--tokens", type=int, default=20, help="of the reasoning")
    parser.add_argument("--queries", type=int, default=20, help="that are measured per row")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--chunk_size", type=int, default=50)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the repeated blocks; without plain")
    parser.add_argument("--device", help="default: the accelerator that is there, else cpu")
    parser.add_argument("--output", metavar="FILE", help="append each row to it when it is known")
    parser.add_argument("--header", action="store_true", help="print the table's head only")
    args = parser.parse_args(argv)
    for flag, found in (("tokens", args.tokens - 1), ("queries", args.queries), ("batch", min(args.batch))):
        if found < 1:
            least = 2 if flag == "tokens" else 1
            raise UserError(f"--{flag}: expected at least {least}, found {getattr(args, flag)}")
    args.device = choose_device(args.device)
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.header:
        print(HEADER)
        return
    torch.manual_seed(0)
    policy = make_policy(args.preset, args.chunk_size, args.device)
    ways = ["fast", "captured"] if args.device.type == "cuda" else ["fast"]
    for setting in args.settings:
        print(f"{setting}: {SETTINGS[setting]}")
    queries = Queries(policy, args.batch[0], args.tokens)
    if not args.compile:
        print(f"fp32: {agreement(queries, ways, references(queries))}", flush=True)
    if args.device.type != "cpu":
        policy.model.to(torch.bfloat16)  # as a checkpoint is loaded there
    if args.compile or args.device.type != "cpu":
        expected = references(queries)
        if args.compile:
            policy.model.compile_for_acting()
            ways = ways[-1:]
        print(f"{str(policy.model.dtype).removeprefix('torch.')}: {agreement(queries, ways, expected)}", flush=True)
    print(f"\n{HEADER}", flush=True)
    for batch in args.batch:
        queries = Queries(policy, batch, args.tokens)
        for setting in args.settings:
            for way in ["plain"] if setting == "plain" else ways:
                if setting == "plain" and args.compile:
                    continue
                try:
                    figures = measure(queries, setting, way, args.queries)
                except torch.OutOfMemoryError:
                    figures = None
                    clean_up(args.device)
                line = row(args, batch, setting, way, figures)
                print(line, flush=True)
                if args.output:
                    with open(args.output, "a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    run_command(main)
