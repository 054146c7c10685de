"""`python -m qwen2_vla.merge CHECKPOINT --output FOLDER`: any checkpoint as one plain, complete folder.

LoRA adapters (also QLoRA's, and the reference's) are merged into their base model; `--ema` takes the averaged weights.
A checkpoint of the reference does not say with which cameras, image sizes and statistics it acts; then tell, as in

    python -m qwen2_vla.merge CHECKPOINT --output FOLDER --task_name fold_shirt --stats dataset_stats.pkl
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import qwen2_vla.environment  # noqa: F401  before the libraries that it prepares

# isort: split
import torch
from safetensors import SafetensorError

from data_utils import UserError, run_command
from data_utils.normalization import STATS_JSON, STATS_PKL, check_stats, read_stats, save_stats
from data_utils.tasks import get_task

from .adapters import has_adapters
from .arguments import DataArguments
from .configuration_qwen2_vla import Qwen2VLAConfig
from .loading import check_model_folder, load_model, load_processor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def merge(
    checkpoint: str,
    output: str,
    *,
    base: str | None = None,
    ema: bool = False,
    dtype: torch.dtype = torch.float32,
    data_config: dict | None = None,
    stats: str | None = None,
) -> str:
    """Writes weights, configuration, tokenizer, processor and the dataset's statistics of a checkpoint to `output`.

    Args:
        checkpoint: a full checkpoint, or LoRA adapters of ours or of the reference.
        base: the adapters' base model, where it is not in the folder that they name.
        ema: take the averaged weights of `--using_ema`.
        data_config: for a checkpoint whose config.json has none: what training notes there, see `data_config_of`.
        stats: file with the statistics, `dataset_stats.pkl` or `.json`; those in the checkpoint's folder if None. With
            `data_config`, a pickle in that folder or the one above is found too, where the reference writes it.

    Returns:
        one line that says what was written, and another if it lacks what acting needs.

    Raises:
        UserError: for an incomplete checkpoint, an `output` that is not empty, or one that cannot be written.
    """
    target = Path(os.path.abspath(output))
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"--output {output}: expected a new or an empty folder, found one with files in it")
    if base is not None and not os.path.isdir(base):
        raise UserError(f"--base: expected a folder, found none at {base}")
    check_model_folder(checkpoint, "CHECKPOINT", base)
    adapters = has_adapters(checkpoint)
    if base is not None and not adapters:
        raise UserError(f"--base {base}: expected adapters in CHECKPOINT {checkpoint}, found a plain checkpoint")
    config = Qwen2VLAConfig.from_pretrained(checkpoint)
    head = config.policy_head_config
    if head is None:
        raise UserError(f"CHECKPOINT {checkpoint}: expected a DexVLA checkpoint, found a model without a policy head")
    if data_config and config.data_config:
        raise UserError(
            f"CHECKPOINT {checkpoint}: expected a config.json without data_config, found one for cameras "
            f"{', '.join(config.data_config['camera_names'])}: leave --task_name and --camera_names out"
        )
    if data_config and stats is None:
        stats = _find_stats(checkpoint)
    if stats is not None:
        robots = read_stats(stats)
        check_stats(robots, head.input_dim, head.state_dim, f"--stats {stats}")
    processor = load_processor(checkpoint, base)
    try:
        model = load_model(checkpoint, dtype=dtype, base=base, ema=ema)
    except UserError:
        raise
    except ValueError as error:  # weights and configuration do not fit each other
        raise UserError(f"CHECKPOINT: {error}") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # written beside its place, so that no half of a model is ever found there
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
            folder = Path(beside, "merged")
            if data_config:
                model.config.data_config = data_config
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            if stats is not None:
                save_stats(robots["default"] if list(robots) == ["default"] else robots, folder)
            lacking = [] if stats is not None or _copy_stats(checkpoint, folder) else [f"{STATS_JSON} (--stats)"]
            lacking += [] if model.config.data_config else ["cameras (--task_name or --camera_names)"]
            os.replace(folder, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {output}: expected a folder that can be written, found {error}") from error
    kind = "adapters and base as one model" if adapters else "a full checkpoint"
    line = f"wrote {output}: {kind}, {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters in {dtype}"
    line += ", averaged (EMA)" if ema else ""
    return f"{line}\nit cannot act yet: {checkpoint} has no {' and no '.join(lacking)}" if lacking else line


def _copy_stats(checkpoint: str, folder: Path) -> bool:
    """Whether there are statistics that acting can read; a pickle is copied unopened."""
    for name in (STATS_JSON, STATS_PKL):
        if Path(checkpoint, name).is_file():
            shutil.copy(Path(checkpoint, name), folder)
    return (folder / STATS_JSON).is_file()


def _find_stats(checkpoint: str) -> str:
    """The statistics' file in the checkpoint's folder, or in that of its training."""
    folders = [Path(checkpoint).resolve(), Path(checkpoint).resolve().parent]
    for path in (folder / name for folder in folders for name in (STATS_JSON, STATS_PKL)):
        if path.is_file():
            return str(path)
    raise UserError(f"--stats: expected {STATS_PKL} or {STATS_JSON} of the training, found none in {checkpoint}")


def data_config_of(args: argparse.Namespace) -> dict | None:
    """What the flags say about how a checkpoint was trained; None without --task_name and --camera_names.

    Raises:
        UserError: naming a flag that is missing or wrong.
    """
    told = [flag for flag in vars(DataArguments()) if getattr(args, flag, None) is not None]
    if not args.task_name and args.camera_names is None:
        if told:
            raise UserError(f"--{told[0]}: expected --task_name or --camera_names too, found neither")
        return None
    cameras = [name.strip() for name in (args.camera_names or "").split(",") if name.strip()]
    if args.camera_names is not None and (not cameras or len(set(cameras)) < len(cameras)):
        raise UserError(f"--camera_names: expected names, each once, found {args.camera_names!r}")
    data = DataArguments(**{flag: getattr(args, flag) for flag in told})
    return {
        "task_name": args.task_name,
        "camera_names": cameras or list(get_task(args.task_name)["camera_names"]),
        "image_size_stable": list(data.image_size_stable),
        "image_size_wrist": list(data.image_size_wrist),
        # a model that was trained without it writes none by itself
        "use_reasoning": args.use_reasoning is not False,
        "delta_control": data.delta_control,
        "augment": data.augment,
        "history_images_length": data.history_images_length,
    }


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text}")
    return text.lower() == "true"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m qwen2_vla.merge", description=__doc__.partition(": ")[2])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a full checkpoint or of LoRA adapters")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new or empty folder to write")
    parser.add_argument("--base", metavar="FOLDER", help="the adapters' base model, if it has moved")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (training with --using_ema True)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s)")
    told = parser.add_argument_group("a checkpoint of the reference", "How it was trained; it does not say so itself.")
    told.add_argument("--task_name", help="entry of TASK_CONFIGS: its camera_names, in the order of training")
    told.add_argument("--camera_names", metavar="A,B,…", help="cameras, instead of those of the task")
    told.add_argument("--stats", metavar="FILE", help=f"{STATS_PKL} or {STATS_JSON} (default: in or beside CHECKPOINT)")
    for flag in ("image_size_stable", "image_size_wrist"):
        told.add_argument(f"--{flag}", metavar='"(W,H)"', help='as in training (default: "(320,240)")')
    told.add_argument("--use_reasoning", type=_truth, metavar="BOOL", help="as in training (default: True)")
    told.add_argument("--delta_control", type=_truth, metavar="BOOL", help="as in training (default: False)")
    told.add_argument("--augment", type=_truth, metavar="BOOL", help="as in training (default: True)")
    told.add_argument("--history_images_length", type=int, metavar="F", help="as in training (default: 1)")
    args = parser.parse_args(argv)
    line = merge(
        args.checkpoint,
        args.output,
        base=args.base,
        ema=args.ema,
        dtype=DTYPES[args.dtype],
        data_config=data_config_of(args),
        stats=args.stats,
    )
    print(line)


if __name__ == "__main__":
    run_command(main)
