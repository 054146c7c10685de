"""`python -m qwen2_vla.export CHECKPOINT --output FOLDER`: a checkpoint that works without this repository.

Beside weights, tokenizer, processor and statistics the folder holds the Python code that runs them, so that
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` is enough, and a model card that says how to act.
"""

import argparse
import ast
import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import qwen2_vla.environment  # noqa: F401  before the libraries that it prepares

# isort: split
from transformers import PreTrainedConfig

from data_utils import UserError, run_command

from .loading import check_model_folder
from .merge import DTYPES, merge
from .policy import read_settings

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("qwen2_vla", "policy_heads", "data_utils")
# One module to enter by: transformers makes a package of its own of every module named in `auto_map`, and one
# package's classes are not another's.
ENTRY = "dexvla"
ENTRY_CLASSES = {
    "Qwen2VLAConfig": "configuration_qwen2_vla",
    "Qwen2VLForConditionalGenerationForVLA": "modeling_qwen2_vla",
    "Qwen2VLAPolicy": "policy",
}
AUTO_MAP = {
    "AutoConfig": f"{ENTRY}.Qwen2VLAConfig",
    "AutoModelForCausalLM": f"{ENTRY}.Qwen2VLForConditionalGenerationForVLA",
    "AutoModelForImageTextToText": f"{ENTRY}.Qwen2VLForConditionalGenerationForVLA",
}
UNLESS_REGISTERED = r"""from transformers import CONFIG_MAPPING

if \2 not in CONFIG_MAPPING:
    \1"""
PIP_NAMES = {"cv2": "opencv-python-headless"}
# Adapters, averages and quantisation are over when a folder has been exported, and with them what they import.
REPLACED = {
    "qwen2_vla.loading": '''"""Loads an exported folder: its weights are whole, nothing has to be put together."""

from transformers import AutoProcessor, ProcessorMixin

from .errors import UserError
from .modeling_qwen2_vla import Qwen2VLForConditionalGenerationForVLA


def load_model(folder: str, *, dtype, bits=16, base=None, ema=False, compute_dtype=None, device=None):
    if bits != 16 or base is not None or ema:
        raise UserError(f"{folder}: expected no bits, base or ema for an exported folder, found {bits}, {base}, {ema}")
    return Qwen2VLForConditionalGenerationForVLA.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def load_processor(folder: str, base: str | None = None) -> ProcessorMixin:
    # it looks at config.json, and would ask whether to run the code that is running
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)
''',
}
CARD = """---
library_name: transformers
pipeline_tag: robotics
tags: [robotics, vla, dexvla]
---
# {name}

A DexVLA policy ([arXiv 2502.05855](https://arxiv.org/abs/2502.05855)): camera images, an instruction and the robot's
state of {state} dimensions in, a chunk of {chunk} actions with {action} dimensions out, and in words what the robot is
about to do.

    pip install {requirements}

It acts so; `"."` is this folder:

```python
import numpy as np
from transformers.dynamic_module_utils import get_class_from_dynamic_module

policy = get_class_from_dynamic_module("{entry}.Qwen2VLAPolicy", ".").from_pretrained(".")
observation = {{
    "images": {{camera: np.zeros({frame}, np.uint8) for camera in {cameras}}},  # RGB
    "qpos": np.zeros({state}, np.float32),  # the robot's units
}}
actions, reasoning = policy.predict(observation, "Pick up the cube."{robot})  # ({chunk}, {action}) in the robot's units
```

The model alone, for inputs that are already processed and actions that are still normalised, is
`AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)`. The Python files are licensed Apache-2.0
(`LICENSE-code`).
"""


def export(checkpoint: str, output: str, *, base: str | None = None, ema: bool = False, dtype: str = "fp32") -> str:
    """Writes a checkpoint of any kind (full, LoRA adapters, the reference's) with its code to `output`.

    Args:
        base: the adapters' base model, where it is not in the folder that they name.
        ema: take the averaged weights of `--using_ema`. dtype: of the weights, `fp32` or `bf16`.

    Returns:
        one line that says what was written.

    Raises:
        UserError: for a checkpoint that cannot act, or an `output` that is not empty or cannot be written.
    """
    check_model_folder(checkpoint, "CHECKPOINT", base)
    config, robots = read_settings(checkpoint)
    code = {f"{name}.py": source for name, source in collect_code().items()}
    line = merge(checkpoint, output, base=base, ema=ema, dtype=DTYPES[dtype])
    folder = Path(output)
    try:
        for name, source in code.items():
            (folder / name).write_text(source, encoding="utf-8")
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | {"auto_map": AUTO_MAP}, indent=2) + "\n")
        card = model_card(config, Path(checkpoint).resolve().name, list(robots), code)
        (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.copy(ROOT / "LICENSE", folder / "LICENSE-code")
    except OSError as error:
        raise UserError(f"--output {output}: expected a folder that can be written, found {error}") from error
    return f"{line}; {len(code)} Python files and a README.md that says how it acts"


def model_card(config: PreTrainedConfig, name: str, robots: list[str], code: dict[str, str]) -> str:
    """README.md of an exported folder; its Python example runs as it stands. `robots`: names of their statistics."""
    data, head = config.data_config, config.policy_head_config
    width, height = data["image_size_stable"]
    history = data.get("history_images_length", 1)
    return CARD.format(
        name=name,
        entry=ENTRY,
        chunk=head.prediction_horizon,
        action=head.input_dim,
        state=head.state_dim,
        cameras=list(data["camera_names"]),
        frame=(height, width, 3) if history == 1 else (history, height, width, 3),
        robot="" if len(robots) == 1 else f", unnorm_key={robots[0]!r}",
        requirements=" ".join(requirements(code)),
    )


def requirements(code: dict[str, str]) -> list[str]:
    """What pip has to install for the code, transformers with the version that it was written for."""
    found = {"accelerate"}  # transformers asks for it when weights are loaded
    for source in code.values():
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    packages = sorted(PIP_NAMES.get(name, name) for name in found - sys.stdlib_module_names)
    return [f"{name}=={version(name)}" if name == "transformers" else name for name in packages]


def collect_code() -> dict[str, str]:
    """Module name -> source of the model, the policy and all they import here, side by side in one folder."""
    entry = "".join(f"from .{module} import {name}\n" for name, module in ENTRY_CLASSES.items())
    code = {ENTRY: f'"""What this folder offers."""\n\n{entry}\n__all__ = {list(ENTRY_CLASSES)}\n'}
    waiting, seen = [f"qwen2_vla.{module}" for module in ENTRY_CLASSES.values()], set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        source = REPLACED.get(module) or _path(module).read_text(encoding="utf-8")
        name = module.rpartition(".")[2]
        if name in code:
            raise RuntimeError(f"{module}: two modules of this name would be one file")
        if module not in REPLACED:
            source, needed = _flatten(source, module)
            waiting += needed
        code[name] = source
    return code


def _path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _flatten(source: str, module: str) -> tuple[str, list[str]]:
    """Source whose imports of this repository are of files beside it, and the modules that these are."""
    package = module.partition(".")[0]
    lines, needed = source.splitlines(), []
    for node in reversed(
        [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    ):
        sources: dict[str, list[str]] = {}  # module -> what is imported from it
        for alias in node.names:
            if isinstance(node, ast.Import):
                home = alias.name if alias.name.partition(".")[0] in PACKAGES else None
                imported = f"__name__ as _{alias.name.replace('.', '_')}"  # for what importing it does
            else:
                home = ".".join(filter(None, [package if node.level else None, node.module]))
                home = _home(home, alias.name) if home.partition(".")[0] in PACKAGES else None
                imported = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            if home:
                sources.setdefault(home, []).append(imported)
        if sources:
            _check_replacements(module, sources)
            indent = " " * node.col_offset
            lines[node.lineno - 1 : node.end_lineno] = [
                f"{indent}from .{home.rpartition('.')[2]} import {', '.join(names)}" for home, names in sources.items()
            ]
            needed += sources
    text = "\n".join(lines) + "\n"
    # `auto_map` says what the model's classes are; registered, they would replace the repository's own
    text = re.sub(r"^Auto\w+\.register\(.*Qwen2VLA.*\)\n", "", text, flags=re.MULTILINE)
    # heads are found by their registered names; where the repository or another exported folder has named them already,
    # they stay that one's
    text = re.sub(r"^(AutoConfig\.register\((\S+), .*)$", UNLESS_REGISTERED, text, flags=re.MULTILINE)
    text = re.sub(r"^(AutoModel\w*\.register\(.*)\)$", r"\1, exist_ok=True)", text, flags=re.MULTILINE)
    return text, needed


def _home(module: str, name: str) -> str:
    """The module that defines what a package's `__init__` only passes on."""
    if _path(module).name == "__init__.py":
        for node in ast.parse(_path(module).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level and any(alias.name == name for alias in node.names):
                return f"{module}.{node.module}"
    return module


def _check_replacements(module: str, sources: dict[str, list[str]]):
    for home in REPLACED.keys() & sources.keys():
        lacking = [name for name in sources[home] if f"def {name}(" not in REPLACED[home]]
        if lacking:
            raise RuntimeError(f"{module} imports {', '.join(lacking)} of {home}, which the exported one does not have")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m qwen2_vla.export", description=__doc__.partition(": ")[2])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a full checkpoint or of LoRA adapters")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new or empty folder to write")
    parser.add_argument("--base", metavar="FOLDER", help="the adapters' base model, if it has moved")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (training with --using_ema True)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s)")
    args = parser.parse_args(argv)
    print(export(args.checkpoint, args.output, base=args.base, ema=args.ema, dtype=args.dtype))


if __name__ == "__main__":
    run_command(main)
