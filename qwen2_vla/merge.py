"""`python -m qwen2_vla.merge CHECKPOINT --output FOLDER`: any checkpoint as one plain, complete folder.

LoRA adapters (also QLoRA's, and the reference's) are merged into their base model; `--ema` takes the averaged weights.
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

from data_utils import UserError
from data_utils.normalization import STATS_JSON, STATS_PKL

from .adapters import has_adapters
from .configuration_qwen2_vla import Qwen2VLAConfig
from .loading import check_model_folder, load_model, load_processor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def merge(
    checkpoint: str, output: str, *, base: str | None = None, ema: bool = False, dtype: torch.dtype = torch.float32
) -> str:
    """Writes weights, configuration, tokenizer, processor and the dataset's statistics of a checkpoint to `output`.

    Args:
        checkpoint: a full checkpoint, or LoRA adapters of ours or of the reference.
        base: the adapters' base model, where it is not in the folder that they name.
        ema: take the averaged weights of `--using_ema`.

    Returns:
        one line that says what was written, and another if statistics are missing.

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
    if Qwen2VLAConfig.from_pretrained(checkpoint).policy_head_config is None:
        raise UserError(f"CHECKPOINT {checkpoint}: expected a DexVLA checkpoint, found a model without a policy head")
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
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            has_stats = _copy_stats(checkpoint, folder)
            os.replace(folder, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {output}: expected a folder that can be written, found {error}") from error
    kind = "adapters and base as one model" if adapters else "a full checkpoint"
    line = f"wrote {output}: {kind}, {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters in {dtype}"
    line += ", averaged (EMA)" if ema else ""
    return line if has_stats else f"{line}\n{checkpoint} has no {STATS_JSON}: without it the model cannot act"


def _copy_stats(checkpoint: str, folder: Path) -> bool:
    """Whether there are statistics that acting can read; a pickle is copied unopened."""
    for name in (STATS_JSON, STATS_PKL):
        if Path(checkpoint, name).is_file():
            shutil.copy(Path(checkpoint, name), folder)
    return (folder / STATS_JSON).is_file()


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m qwen2_vla.merge", description=__doc__.partition(": ")[2])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a full checkpoint or of LoRA adapters")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new or empty folder to write")
    parser.add_argument("--base", metavar="FOLDER", help="the adapters' base model, if it has moved")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (training with --using_ema True)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s)")
    args = parser.parse_args(argv)
    print(merge(args.checkpoint, args.output, base=args.base, ema=args.ema, dtype=DTYPES[args.dtype]))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
