"""A checkpoint folder acts: every kind of it, alone and in batches, with the images of training."""

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


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_base, STATS)


@pytest.fixture(scope="module")
def policy(folder):
    return Qwen2VLAPolicy.from_pretrained(folder, device="cpu")


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


def test_a_moved_folder_is_enough(policy, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "moved")
    moved = Qwen2VLAPolicy.from_pretrained(str(tmp_path / "moved"), torch.device("cpu"))
    assert np.array_equal(act(moved)[0], act(policy)[0]) and act(moved)[1] == act(policy)[1]


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


def test_averaged_weights(policy, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "trained")
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
    assert np.array_equal(act(again)[0], act(averaged)[0])
    with pytest.raises(UserError, match="ema"):
        Qwen2VLAPolicy.from_pretrained(str(tmp_path / "trained"), "cpu", ema=True, bits=4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(policy, folder, bits):
    quantised = Qwen2VLAPolicy.from_pretrained(folder, "cpu", bits=bits)
    kinds = {type(layer).__name__ for layer in quantised.model.model.language_model.modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    expected, (actions, text) = act(policy, reasoning="Pick."), act(quantised, reasoning="Pick.")
    print(bits, relative_error(actions, expected[0]))
    assert 0 < relative_error(actions, expected[0]) < 0.2 and text == "Pick."
    assert act(quantised)[0].shape == (T, A)


def test_folders_that_cannot_act(folder, tiny_base, tmp_path):
    def broken(change) -> str:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "broken")
        change(tmp_path / "broken")
        return str(tmp_path / "broken")

    def rewrite(**stats):
        return lambda path: save_stats(STATS | stats, path)

    for path, message in (
        (str(tmp_path / "none"), "checkpoint: expected a folder, found none at"),
        (tiny_base, "expected a DexVLA checkpoint, found a model without a policy head"),
        (
            broken(lambda path: (path / "dataset_stats.json").unlink()),
            "no dataset_stats.json; python -m qwen2_vla.merge",
        ),
        (
            broken(lambda path: (path / "dataset_stats.json").write_text("[]")),
            "dataset_stats.json: expected statistics",
        ),
        (broken(lambda path: (path / "config.json").unlink()), "expected a DexVLA config.json"),
        (broken(rewrite(action_min=np.zeros(7))), r"action_min: expected 14 finite numbers.*found shape \(7,\)"),
        (broken(rewrite(qpos_std=np.full(14, np.nan))), "qpos_std: expected 14 finite numbers"),
    ):
        with pytest.raises(UserError, match=message):
            Qwen2VLAPolicy.from_pretrained(path, "cpu")
    for device in ("no_such_device", "cuda:99"):
        with pytest.raises(UserError, match=f"device: expected one of this machine, .*found {device}"):
            Qwen2VLAPolicy.from_pretrained(folder, device)


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


def test_drawn_noise_is_torchs(policy):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(policy.predict(observed(3), TEXTS[0], 4)[0])
    assert np.array_equal(drawn[0], drawn[1]) and not np.allclose(drawn[0], drawn[2], atol=1e-3)


def test_a_prefix_is_kept(policy):
    free, _ = act(policy)
    prefix = free[:5] + 0.05 * (STATS["action_max"] - STATS["action_min"])  # partly beyond what the data held
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


# ---- what is wrong is named ----

IMAGE = np.zeros((48, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qpos": np.zeros(7)}, r"observation: qpos: expected shape \(14,\), found \(7,\) of float64"),
        ({"qpos": np.r_[0, 0, 0, np.nan, np.zeros(10)]}, r"observation: qpos\[3\]: expected finite numbers, found nan"),
        ({"qpos": np.full(14, 1e300)}, r"observation: qpos\[0\]: expected finite numbers, found 1e\+300"),
        ({"qpos": ["a"] * 14}, r"observation: qpos: expected shape \(14,\), found \(14,\) of <U1"),
        ({"qpos": [[1], [1, 2]]}, "observation: qpos: expected an array, found list"),
        ({"qpos": None}, r"observation: qpos: expected shape \(14,\), found \(\) of object"),
        ({"images": [IMAGE] * 3}, "observation: images: expected a dict with cameras cam_high, .*, found list"),
        ({"images": {}}, "observation: images: expected cameras cam_high, .*missing cam_high, .*, found none"),
        ({"images": {"cam_high": IMAGE, "top": IMAGE}}, "missing cam_left_wrist, cam_right_wrist, found cam_high, top"),
        (
            {"cam_high": IMAGE / 255},
            r"images\['cam_high'\]: expected \(height, width, 3\) of uint8, found .* of float64",
        ),
        ({"cam_high": IMAGE[..., 0]}, r"images\['cam_high'\]: expected .*, found \(48, 64\) of uint8"),
        ({"cam_high": IMAGE.transpose(2, 0, 1)}, r"found \(3, 48, 64\) of uint8"),
        ({"cam_high": IMAGE[:0]}, r"found \(0, 64, 3\) of uint8"),
        ({"cam_high": np.stack([IMAGE, IMAGE])}, r"found \(2, 48, 64, 3\) of uint8"),
        ({"cam_high": "frame.jpg"}, r"images\['cam_high'\]: expected .*, found \(\) of <U9"),
    ],
)
def test_bad_observations_are_named(policy, change, message):
    good = {"images": dict.fromkeys(CAMERAS, IMAGE), "qpos": np.zeros(14)}
    bad = good | change if change.keys() <= good.keys() else good | {"images": good["images"] | change}
    for observations in (bad, [good, bad]):
        field = message.replace("observation:", "observation 1:") if observations is not bad else message
        with pytest.raises(UserError, match=field):
            policy.predict(observations, "Fold.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"observation": "frame.jpg"},
            "observation: expected a dict with images and qpos or a list of them, found str",
        ),
        ({"observation": []}, "observation: expected .*, found an empty list"),
        ({"observation": [None]}, "observation: expected a dict with images and qpos, found NoneType"),
        ({"observation": {"images": {}}}, "observation: expected images and qpos, found no qpos"),
        ({"instruction": 7}, "instruction: expected text, found int"),
        ({"instruction": ["Go."]}, "instruction: expected one, or a list of 2 .*found 1"),
        ({"instruction": "see <|image_pad|>"}, r"instruction: expected plain words, found .*<\|image_pad\|>"),
        ({"reasoning": "Go.<|im_end|>"}, r"reasoning: expected plain words, found .*<\|im_end\|>"),
        ({"reasoning": [None, 3]}, "reasoning: expected text or None, found int"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive number, found 0"),
        ({"unnorm_key": "franka"}, "unnorm_key: expected one of default, found franka"),
        ({"unnorm_key": [["a"], None]}, r"unnorm_key: expected one of default, found \['a'\]"),
        (
            {"prefix": np.zeros((T + 1, A))},
            r"prefix: expected finite numbers \(n, 14\), n at most 8, found shape \(9, 14\)",
        ),
        ({"prefix": np.zeros((2, 7))}, r"prefix: expected .*, found shape \(2, 7\)"),
        ({"prefix": np.full((2, A), np.inf)}, "prefix: expected finite numbers"),
        ({"prefix": [[[1], [1, 2]], None]}, "prefix: expected an array, found list"),
        ({"prefix": np.zeros((2, A)), "frozen": 3}, "frozen: expected 0 to 2, the length of prefix, found 3"),
        ({"prefix": np.zeros((2, A)), "frozen": 1.5}, "frozen: expected 0 to 2, the length of prefix, found 1.5"),
        ({"frozen": [1]}, "frozen: expected one, or a list of 2 .*found 1"),
        ({"noise": NOISE}, r"noise: expected finite numbers \(2, 8, 14\), found shape \(3, 8, 14\)"),
    ],
)
def test_bad_arguments_are_named(policy, change, message):
    arguments = {"observation": [observed(3), observed(4)], "instruction": "Go.", "max_new_tokens": 2} | change
    with pytest.raises(UserError, match=f"^{message}"):
        policy.predict(**arguments)
