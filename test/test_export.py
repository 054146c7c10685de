"""`python -m qwen2_vla.export`: a checkpoint that works without this repository; and transformers' Auto classes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from data_utils import UserError, find_all_hdf5, get_norm_stats, open_episode
from policy_heads import ScaleDPPolicyConfig, UnetDiffusionPolicyConfig
from qwen2_vla import Qwen2VLAConfig, Qwen2VLAPolicy, Qwen2VLForConditionalGenerationForVLA
from qwen2_vla.export import main as export
from qwen2_vla.loading import load_model

from .helpers import CAMERAS, ROOT, run, write_checkpoint
from .lora_cases import DATA, write_reference_output

# Acts in a process that cannot see the repository, with what the folder and the README in it offer
OUTSIDE = """
import re, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

inputs, observation, instruction, threads = torch.load("inputs.pt", weights_only=False)
torch.set_num_threads(threads)  # their number decides the order of sums
folder = "exported"
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
results = {"config": config.to_dict()}
tokenizer = AutoProcessor.from_pretrained(folder, trust_remote_code=True).tokenizer
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    results[auto.__name__] = model.predict_action(**inputs, tokenizer=tokenizer)
example = re.search(r"```python\\n(.*?)```", open(f"{folder}/README.md").read(), re.DOTALL).group(1)
code = {}
exec(example.replace('"."', repr(folder)), code)
torch.manual_seed(0)
results["policy"] = code["policy"].predict(observation, instruction, 4)
results["example"] = code["actions"].shape
results["modules"] = sorted(sys.modules)
torch.save(results, "results.pt")
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_base, task, tmp_path_factory):
    """Folder with a random model, and the path of one of its episodes."""
    from aloha_scripts.constants import TASK_CONFIGS

    folder = tmp_path_factory.mktemp("checkpoint")
    paths = find_all_hdf5(TASK_CONFIGS[task]["dataset_dir"])
    return write_checkpoint(folder, tiny_base, get_norm_stats(paths), **DATA), paths[0]


def seen_by(policy: Qwen2VLAPolicy, observation: dict, instruction: str) -> tuple[dict, tuple, tuple]:
    """What the policy hands to its model; the model's answer; the policy's."""
    seen = []
    predict = policy.model.predict_action
    policy.model.predict_action = lambda **inputs: seen.append((inputs, predict(**inputs))) or seen[-1][1]
    torch.manual_seed(0)
    answer = policy.predict(observation, instruction, 4)
    policy.model.predict_action = predict
    return *seen[0], answer


def test_it_acts_without_the_repository(checkpoint, tmp_path):
    folder, path = checkpoint
    episode = open_episode(path)
    observation = {"images": {camera: episode.frame(camera, 3) for camera in CAMERAS}, "qpos": episode.qpos[3]}
    instruction = episode.instruction(3)
    policy = Qwen2VLAPolicy.from_pretrained(folder, device="cpu")
    inputs, (normalised, texts), (actions, text) = seen_by(policy, observation, instruction)
    tensors = {key: value for key, value in inputs.items() if key != "tokenizer"}
    torch.save((tensors, observation, instruction, torch.get_num_threads()), tmp_path / "inputs.pt")
    exported = run(["-m", "qwen2_vla.export", folder, "--output", str(tmp_path / "exported")])
    assert exported.returncode == 0 and "Python files and a README.md" in exported.stdout, exported.stdout

    (tmp_path / "act.py").write_text(OUTSIDE)
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    outside = subprocess.run(
        [sys.executable, "-P", "act.py"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert outside.returncode == 0, outside.stderr
    assert "Do you wish to run the custom code?" not in outside.stdout + outside.stderr  # who would answer?
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    assert not {"qwen2_vla", "policy_heads", "data_utils"} & set(results["modules"])
    for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        assert torch.equal(results[auto][0], normalised) and results[auto][1] == texts
    assert np.array_equal(results["policy"][0], actions) and results["policy"][1] == text
    assert results["example"] == (8, 14)
    assert results["config"]["data_config"] == DATA and results["config"]["model_type"] == "qwen2_vla"


def test_the_folder_is_complete_and_a_checkpoint_still(checkpoint, tmp_path):
    folder, _ = checkpoint
    export([folder, "--output", str(tmp_path / "exported"), "--dtype", "bf16"])
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert {"README.md", "LICENSE-code", "dataset_stats.json", "tokenizer.json", "processor_config.json"} <= names
    for module in (tmp_path / "exported").glob("*.py"):  # nothing but files beside it and what pip installs
        source = module.read_text()
        assert not re.search(r"^\s*(from|import) (qwen2_vla|policy_heads|data_utils)\b", source, re.MULTILINE), module
        assert {f"{name}.py" for name in re.findall(r"^\s*from \.(\S+) import", source, re.MULTILINE)} <= names
        assert str(ROOT) not in source
    requirements = re.search(r"pip install (.*)", (tmp_path / "exported/README.md").read_text()).group(1).split()
    assert {"torch", "torchvision", "diffusers", "timm", "opencv-python-headless"} <= set(requirements)
    assert "peft" not in requirements and any(name.startswith("transformers==") for name in requirements)
    policy = Qwen2VLAPolicy.from_pretrained(str(tmp_path / "exported"), device="cpu")  # with the repository's own code
    assert type(policy.model) is Qwen2VLForConditionalGenerationForVLA


def test_two_exports_beside_the_repository(checkpoint, tmp_path, monkeypatch):
    """Their classes have the same names as those that are imported here."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, path = checkpoint
    episode = open_episode(path)
    observation = {"images": {camera: episode.frame(camera, 0) for camera in CAMERAS}, "qpos": episode.qpos[0]}
    answers = [seen_by(Qwen2VLAPolicy.from_pretrained(folder, device="cpu"), observation, "Fold.")[2]]
    for name in ("one", "two"):
        output = str(tmp_path / name)
        export([folder, "--output", output])
        exported = get_class_from_dynamic_module("dexvla.Qwen2VLAPolicy", output)
        assert exported.__module__ != Qwen2VLAPolicy.__module__
        answers.append(seen_by(exported.from_pretrained(output, device="cpu"), observation, "Fold.")[2])
        with pytest.raises(ValueError, match="expected no bits, base or ema"):
            exported.from_pretrained(output, device="cpu", ema=True)
    answers.append(seen_by(Qwen2VLAPolicy.from_pretrained(folder, device="cpu"), observation, "Fold.")[2])
    for actions, text in answers[1:]:
        assert np.array_equal(actions, answers[0][0]) and text == answers[0][1]
    for config in (ScaleDPPolicyConfig, UnetDiffusionPolicyConfig):  # still the repository's
        assert CONFIG_MAPPING[config.model_type] is config


def test_adapters_and_averages_are_exported_whole(tiny_base, checkpoint, tmp_path):
    folder, _ = checkpoint
    adapters = tmp_path / "adapters"
    expected = write_reference_output(adapters, tiny_base, modules=["llm"])
    shutil.copy(Path(folder, "dataset_stats.json"), adapters)
    export([str(adapters), "--output", str(tmp_path / "merged")])
    assert not (tmp_path / "merged/adapter_config.json").exists()
    merged = load_model(str(tmp_path / "merged")).state_dict()
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in expected.items())

    averaged = tmp_path / "averaged"
    shutil.copytree(folder, averaged)
    name = "policy_head.pos_embed"
    save_file({name: torch.full_like(load_file(averaged / "model.safetensors")[name], 7)}, averaged / "ema.safetensors")
    export([str(averaged), "--output", str(tmp_path / "ema"), "--ema"])
    assert (load_file(tmp_path / "ema/model.safetensors")[name] == 7).all()


def test_a_policy_of_several_robots_says_which(checkpoint, tmp_path):
    several = tmp_path / "several"
    shutil.copytree(checkpoint[0], several)
    stats = json.loads((several / "dataset_stats.json").read_text())
    (several / "dataset_stats.json").write_text(json.dumps({"aloha": stats, "franka": stats}))
    export([str(several), "--output", str(tmp_path / "exported")])
    assert "\"Pick up the cube.\", unnorm_key='aloha')" in (tmp_path / "exported/README.md").read_text()
    assert Qwen2VLAPolicy.from_pretrained(str(tmp_path / "exported"), device="cpu").unnorm_keys == ["aloha", "franka"]


def test_what_cannot_be_exported(checkpoint, tmp_path):
    folder, _ = checkpoint
    without = {name: tmp_path / name for name in ("stats", "data")}
    for path in without.values():
        shutil.copytree(folder, path)
    (without["stats"] / "dataset_stats.json").unlink()
    config = json.loads((without["data"] / "config.json").read_text())
    (without["data"] / "config.json").write_text(json.dumps(config | {"data_config": None}))
    for source, output, message in (
        (folder, folder, "--output .*: expected a new or an empty folder, found one with files"),
        (str(without["stats"]), "new", "checkpoint .*: expected dataset_stats.json"),
        (str(without["data"]), "new", r"found no data_config \(cameras.*qwen2_vla.merge"),
        (str(tmp_path / "nothing"), "new", "CHECKPOINT"),
    ):
        with pytest.raises(UserError, match=message):
            export([source, "--output", output if output == folder else str(tmp_path / output)])
    assert not (tmp_path / "new").exists()


def test_auto_classes_know_a_plain_checkpoint(checkpoint):
    folder, _ = checkpoint
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is Qwen2VLAConfig and config.policy_head_config.prediction_horizon == 8
    expected = load_model(folder).state_dict()
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder)
        assert type(model) is Qwen2VLForConditionalGenerationForVLA
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
