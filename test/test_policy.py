"""A checkpoint folder acts: every kind of it, alone and in batches, with the images of training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_utils import (
    EpisodicDataset,
    UserError,
    get_norm_stats,
    open_episode,
    save_stats,
    unnormalize_action,
)
from qwen2_vla import Qwen2VLAPolicy
from qwen2_vla.merge import main as merge

from .helpers import CAMERAS, EPISODES, relative_error, write_checkpoint, write_episode
from .lora_cases import write_reference_output

T, A = 8, 14
STATS = get_norm_stats(EPISODES)
NOISE = np.random.default_rng(0).normal(size=(3, T, A)).astype(np.float32)


def observed(t: int, episode: int = 0, history: int = 1) -> dict:
    recorded = open_episode(EPISODES[episode])
    frames = {camera: recorded.frames(camera, t, history) for camera in CAMERAS}
    return {
        "images": {camera: np.stack(some) if history > 1 else some[0] for camera, some in frames.items()},
        "qpos": recorded.qpos[t],
    }


def act(policy, **options):
    return policy.predict(observed(3), "Pick up the cube.", 4, noise=NOISE[0], **options)


# ---- every kind of checkpoint ----


def test_predicts_robot_units(policy):
    seen = []
    predict = policy.model.predict_action
    policy.model.predict_action = lambda **inputs: seen.append(predict(**inputs)) or seen[-1]
    try:
        actions, text = act(policy)
    finally:
        policy.model.predict_action = predict
    assert actions.shape == (T, A) and actions.dtype == np.float32 and isinstance(text, str)
    assert np.allclose(actions, unnormalize_action(seen[0][0][0].numpy(), policy.stats))
    assert (actions >= STATS["action_min"] - 1e-3).all() and (actions <= STATS["action_max"] + 1e-3).all()
    assert policy.metadata() == {
        "camera_names": CAMERAS, "image_size": [84, 56], "state_dim": 14, "action_dim": A, "chunk_size": T,
        "history_images_length": 1, "delta_control": False, "use_reasoning": True, "unnorm_keys": ["default"],
    }  # fmt: skip


def test_a_moved_folder_is_enough(policy, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "moved")
    moved = Qwen2VLAPolicy.from_pretrained(str(tmp_path / "moved"), torch.device("cpu"))
    (actions, text), expected = act(moved), act(policy)
    assert relative_error(actions, expected[0]) < 1e-5 and text == expected[1]


def test_adapters_act_as_the_merged_model(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    adapters = str(tmp_path / "adapters")
    write_reference_output(Path(adapters), str(base), modules=["vit", "llm"])
    save_stats(STATS, adapters)
    expected = act(Qwen2VLAPolicy.from_pretrained(adapters, "cpu"))
    merge([adapters, "--output", str(tmp_path / "merged")])
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="found .*base"):
        Qwen2VLAPolicy.from_pretrained(adapters, "cpu")
    for source, options in ((adapters, {"base": str(tmp_path / "elsewhere")}), (str(tmp_path / "merged"), {})):
        actions, text = act(Qwen2VLAPolicy.from_pretrained(source, "cpu", **options))
        assert relative_error(actions, expected[0]) < 1e-5 and text == expected[1]
    with pytest.raises(UserError, match="--bits 4: expected a plain checkpoint.*qwen2_vla.merge"):
        Qwen2VLAPolicy.from_pretrained(adapters, "cpu", bits=4, base=str(tmp_path / "elsewhere"))


def test_averaged_weights(policy, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "trained")
    with pytest.raises(UserError, match="expected averaged weights .ema.safetensors"):
        Qwen2VLAPolicy.from_pretrained(str(tmp_path / "trained"), "cpu", ema=True)
    average = {name: 0.9 * p.detach() for name, p in policy.model.named_parameters() if not p.is_meta}
    save_file({name: p for name, p in average.items() if ".visual." not in name}, tmp_path / "trained/ema.safetensors")
    averaged = Qwen2VLAPolicy.from_pretrained(str(tmp_path / "trained"), "cpu", ema=True)
    weight = "policy_head.final_layer.linear.weight"
    assert torch.allclose(averaged.model.get_parameter(weight), average[weight])
    assert relative_error(act(averaged)[0], act(policy)[0]) > 1e-3
    merge([str(tmp_path / "trained"), "--output", str(tmp_path / "merged"), "--ema"])
    again = Qwen2VLAPolicy.from_pretrained(str(tmp_path / "merged"), "cpu")
    assert relative_error(act(again)[0], act(averaged)[0]) < 1e-4
    with pytest.raises(UserError, match="bits 8: expected 16 with averaged weights; python -m qwen2_vla.merge .*--ema"):
        Qwen2VLAPolicy.from_pretrained(str(tmp_path / "trained"), "cpu", ema=True, bits=8)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(policy, checkpoint, bits, monkeypatch):
    quantised = Qwen2VLAPolicy.from_pretrained(checkpoint, "cpu", bits=bits)
    kinds = {type(layer).__name__ for layer in quantised.model.model.language_model.modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    actions, text = act(quantised)
    assert actions.shape == (T, A) and np.isfinite(actions).all() and isinstance(text, str)
    conditions = []
    for one in (policy, quantised):
        monkeypatch.setattr(one.model, "_denoise", lambda noise, condition, _: conditions.append(condition) or noise)
        assert act(one, reasoning="Pick.")[1] == "Pick."
    assert 0 < relative_error(conditions[1], conditions[0]) < {4: 0.3, 8: 0.03}[bits]


def test_folders_that_cannot_act(checkpoint, tiny_base, tmp_path):
    def cut_off(path: Path):
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])

    def rewrite(**stats):
        return lambda path: save_stats(STATS | stats, path)

    def forget_cameras(path: Path):
        config = json.loads((path / "config.json").read_text())
        del config["data_config"]["camera_names"]
        (path / "config.json").write_text(json.dumps(config))

    with pytest.raises(UserError, match="checkpoint: expected a folder, found none at None"):
        Qwen2VLAPolicy.from_pretrained(None)
    for number, (change, message) in enumerate((
        (shutil.rmtree, "checkpoint: expected a folder, found none at"),
        (lambda path: shutil.copy(Path(tiny_base, "config.json"), path), "found a model without a policy head"),
        (lambda path: (path / "dataset_stats.json").unlink(), "found no dataset_stats.json; python -m qwen2_vla.merge"),
        (lambda path: (path / "dataset_stats.json").write_text("[]"), "stats.json: expected statistics as training"),
        (cut_off, "expected whole weights of its config.json, found .*"),
        (lambda path: (path / "model.safetensors").unlink(), "expected whole weights of its config.json, found .*"),
        (lambda path: (path / "config.json").unlink(), "expected config.json, found none"),
        (lambda path: (path / "tokenizer.json").unlink(), r"expected its tokenizer \(tokenizer.json\), found none"),
        (forget_cameras, "config.json: data_config: expected camera_names too, found none"),
        (rewrite(action_min=np.zeros(7)), r"action_min: expected 14 finite numbers.*found shape \(7,\)"),
        (rewrite(qpos_std=np.full(14, np.nan)), "qpos_std: expected 14 finite numbers"),
    )):  # fmt: skip
        copy = tmp_path / str(number)
        shutil.copytree(checkpoint, copy)
        change(copy)
        with pytest.raises(UserError, match=message):
            Qwen2VLAPolicy.from_pretrained(str(copy), "cpu")
    with pytest.raises(UserError, match="bits: expected 4, 8 or 16, found 2"):
        Qwen2VLAPolicy.from_pretrained(checkpoint, "cpu", bits=2)
    for device in ("no_such_device", "cuda:99"):
        with pytest.raises(UserError, match=f"device: expected one of this machine, .*found {device}"):
            Qwen2VLAPolicy.from_pretrained(checkpoint, device)


# ---- several observations at once ----

TEXTS = ["Pick up the cube.", "Fold the shirt, then fold it once more and put it away.", "Go."]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_is_its_single_predictions(policy, mixed):
    observations = [observed(2), observed(5, 1), observed(0, 2)]
    prefix = 0.5 * (STATS["action_min"] + STATS["action_max"]) + np.zeros((5, A), np.float32)
    options = {"reasoning": [None, "Reach out.", ""], "prefix": [prefix, None, prefix[:2]], "frozen": [3, None, 0]}
    options = options if mixed else {}
    actions, texts = policy.predict(observations, TEXTS, 4, noise=NOISE, **options)
    assert actions.shape == (3, T, A)
    for i in range(3):
        of_one = {key: values[i] for key, values in options.items()}
        alone, text = policy.predict(observations[i], TEXTS[i], 4, noise=NOISE[i], **of_one)
        assert relative_error(actions[i], alone) < 1e-4 and texts[i] == text
    assert not mixed or texts[1:] == ["Reach out.", ""]
    shared, _ = policy.predict([observations[0]] * 2, TEXTS[0], 4, noise=NOISE[[0, 0]])
    assert relative_error(shared[0], shared[1]) < 1e-4


def test_a_batch_of_videos(tiny_base, tmp_path):
    policy = Qwen2VLAPolicy.from_pretrained(
        write_checkpoint(tmp_path, tiny_base, STATS, history_images_length=2), "cpu"
    )
    observations = [observed(2, history=2), observed(5, 1, history=2)]
    options = {"reasoning": [None, "Reach out."]}
    actions, texts = policy.predict(observations, TEXTS[:2], 4, noise=NOISE[:2], **options)
    for i in range(2):
        alone, text = policy.predict(observations[i], TEXTS[i], 4, noise=NOISE[i], reasoning=options["reasoning"][i])
        assert relative_error(actions[i], alone) < 1e-4 and texts[i] == text
    still = {camera: np.stack([frames[1]] * 2) for camera, frames in observations[0]["images"].items()}
    moved, _ = policy.predict(observations[0] | {"images": still}, TEXTS[0], 4, noise=NOISE[0], reasoning="")
    assert relative_error(moved, policy.predict(observations[0], TEXTS[0], 4, noise=NOISE[0], reasoning="")[0]) > 1e-3


def test_drawn_noise_is_torchs(policy):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(policy.predict(observed(3), TEXTS[0], 4)[0])
    assert np.array_equal(drawn[0], drawn[1]) and not np.allclose(drawn[0], drawn[2], atol=1e-3)


def test_a_prefix_is_kept(policy):
    free, _ = act(policy)
    prefix = free[:5] + 0.05 * (STATS["action_max"] - STATS["action_min"])  # partly beyond what the data held
    with pytest.raises(UserError, match="frozen: expected prefix too"):
        act(policy, frozen=2)
    kept, _ = act(policy, prefix=prefix, frozen=2)
    span = np.abs(STATS["action_max"] - STATS["action_min"])
    assert (np.abs(kept[:2] - prefix[:2]) < 1e-5 * (1 + span)).all()
    away = (np.abs(kept[:5] - prefix) / span).mean(axis=1)  # (5,)
    assert (away[2:] > 1e-4).all() and away[4] > away[2]  # they fade out
    assert not np.allclose(kept[5:], free[5:], atol=1e-4)
    whole, _ = act(policy, prefix=prefix, frozen=5)
    assert (np.abs(whole[:5] - prefix) < 1e-5 * (1 + span)).all()
    nothing, _ = act(policy, prefix=prefix[:0])
    assert relative_error(nothing, free) < 1e-6


def test_drafts_change_nothing(policy):
    policy._drafts.clear()
    expected = act(policy)
    assert policy._drafts["Pick up the cube."]
    for draft in (policy._drafts["Pick up the cube."], "Something else entirely.", expected[1][:3], "Next action:"):
        policy._drafts["Pick up the cube."] = draft
        actions, text = act(policy)
        assert relative_error(actions, expected[0]) < 1e-5 and text == expected[1]
    act(policy, reasoning="Given by somebody.")  # what was not written is no guess for what will be
    assert "Given" not in policy._drafts["Pick up the cube."]


def test_without_reasoning(policy, tiny_base, tmp_path):
    """As in training: the answer is the end alone."""
    silent = write_checkpoint(tmp_path, tiny_base, STATS, use_reasoning=False)
    silent = Qwen2VLAPolicy.from_pretrained(silent, "cpu")
    actions, text = act(silent)
    assert text == "" and np.array_equal(act(silent, reasoning="")[0], actions)
    data = EpisodicDataset(EPISODES, CAMERAS, STATS, T, image_size_stable=(84, 56), center_crop=True,
                           transform=silent.process, use_reasoning=False)  # fmt: skip
    batch = silent.collate([data[3]])
    condition = silent.model(**batch).condition
    noise = torch.from_numpy(NOISE[:1])
    trained = silent.model.policy_head.denoise(noise, condition, batch["states"])[0].numpy()
    got, _ = silent.predict(observed(3), open_episode(EPISODES[0]).instruction(3), noise=NOISE[0])
    assert relative_error(got, unnormalize_action(trained, STATS)) < 1e-4
    with pytest.raises(UserError, match="reasoning: expected none, .*trained without, found 'Reach.'"):
        act(silent, reasoning="Reach.")


@pytest.mark.parametrize("kind", ["tinyvla", "unet"])
def test_other_heads(tiny_base, tmp_path, kind):
    tiny = {"is_tinyvla": True, "using_film": False}
    unet = {"head_type": "unet_diffusion_policy", "depth": None, "width": None, "num_heads": None}
    folder = write_checkpoint(tmp_path, tiny_base, STATS, head=tiny if kind == "tinyvla" else unet)
    policy = Qwen2VLAPolicy.from_pretrained(folder, "cpu")
    actions, text = act(policy)
    again = act(policy, prefix=actions[:4], frozen=4)[0]
    assert actions.shape == (T, A) and relative_error(again[:4], actions[:4]) < 1e-4
    together, _ = policy.predict([observed(3), observed(5)], TEXTS[:2], 4, noise=NOISE[:2])
    assert relative_error(together[0], policy.predict(observed(3), TEXTS[0], 4, noise=NOISE[0])[0]) < 1e-4
    assert act(policy, reasoning="")[0].shape == (T, A)
    if kind == "unet":
        assert act(policy, reasoning="Reach.")[1] == "Reach."
    else:
        assert text == ""
        with pytest.raises(UserError, match="reasoning: expected none"):
            act(policy, reasoning="Reach.")


# ---- images, as in training ----


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("jpeg", [False, True])
def test_recorded_frames_become_the_inputs_of_validation(policy, tmp_path, monkeypatch, augment, history, jpeg):
    path = str(write_episode(tmp_path / "e.hdf5", size=(120, 90), jpeg=jpeg))
    data = EpisodicDataset(
        [path], CAMERAS, STATS, T, image_size_stable=(84, 56), center_crop=augment, history_images_length=history,
        transform=policy.process,
    )  # fmt: skip
    monkeypatch.setattr(policy, "history", history)
    monkeypatch.setitem(policy.model.config.data_config, "augment", augment)
    episode = open_episode(path)
    for t in (0, 7):
        frames = {camera: np.stack(episode.frames(camera, t, history)) for camera in CAMERAS}
        images = {camera: some if history > 1 else some[0] for camera, some in frames.items()}
        observation = {"images": images, "qpos": episode.qpos[t]}
        policy.check(observation)
        inputs, item = policy._inputs([observation], [episode.instruction(t)], [STATS]), data[t]
        for mine, its in zip(inputs["images"], item["images"], strict=True):
            assert mine.dtype == torch.uint8 and torch.equal(mine[0], its)
        prompt = inputs["input_ids"].shape[1]
        assert (item["labels"][:prompt] == -100).all() and item["labels"][prompt] != -100
        for key in ("input_ids", "mm_token_type_ids"):
            assert torch.equal(inputs[key][0], item[key][:prompt])
        assert torch.equal(inputs["position_ids"][:, 0], item["position_ids"][:, :prompt])
        grid = "image_grid_thw" if history == 1 else "video_grid_thw"
        assert torch.equal(inputs[grid], item[grid]) and torch.equal(inputs["states"][0], item["state"])


def test_large_jpegs(policy, tmp_path):
    """Training decodes them only as far as it needs; the policy gets them whole. They differ by less than a grey level
    on average."""
    path = str(write_episode(tmp_path / "e.hdf5", size=(168, 112), jpeg=True))
    data = EpisodicDataset([path], CAMERAS, STATS, T, image_size_stable=(84, 56), center_crop=True,
                           transform=policy.process)  # fmt: skip
    episode = open_episode(path)
    observation = {"images": {name: episode.frame(name, 4) for name in CAMERAS}, "qpos": episode.qpos[4]}
    assert observation["images"]["cam_high"].shape == (112, 168, 3)
    for mine, its in zip(policy._inputs([observation], ["Go."], [STATS])["images"], data[4]["images"], strict=True):
        assert (mine[0].float() - its.float()).abs().mean() < 0.5


def test_frames_as_cameras_hand_them_over(policy):
    """Mirrored, swapped and cut views of arrays, and tensors, are what they look like."""
    expected = observed(3)
    views = {
        name: np.ascontiguousarray(image[::-1, :, ::-1])[::-1, :, ::-1] for name, image in expected["images"].items()
    }
    tensors = {name: torch.from_numpy(image) for name, image in expected["images"].items()}
    for images in (views, tensors):
        got, _ = policy.predict(expected | {"images": images}, TEXTS[0], 4, noise=NOISE[0])
        assert np.array_equal(got, act(policy)[0])
