"""`python -m evaluate.open_loop --checkpoint C --task_name T`: predicted against recorded actions.

A held-out episode is replayed: the policy sees its frames and predicts a chunk every `chunk` frames, nothing moves.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from aloha_scripts.constants import JOINT_NAMES, TASK_CONFIGS
from data_utils import Episode, UserError, load_data, open_episode, stored_camera
from qwen2_vla import Qwen2VLAPolicy


def held_out_episodes(task_name: str) -> list[str]:
    """The episodes that training with this task leaves out for validation."""
    if task_name not in TASK_CONFIGS:
        raise UserError(f"--task_name: expected one of {', '.join(sorted(TASK_CONFIGS))}, found {task_name}")
    task = TASK_CONFIGS[task_name]
    _, validation, _, _ = load_data(
        task["dataset_dir"],
        task.get("name_filter"),
        task["camera_names"],
        1,
        camera_map=task.get("camera_map"),
        train_ratio=task.get("train_ratio", 0.999),
        use_reasoning=False,
    )
    if validation is None:
        raise UserError(
            f"TASK_CONFIGS[{task_name!r}]: train_ratio leaves no episode for validation; name one with --episode"
        )
    return validation.episode_paths


def replay(
    policy: Qwen2VLAPolicy, episode: Episode, camera_map: dict[str, str | list[str]] | None = None
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str, str]]]:
    """Queries the policy once per chunk of an episode of N frames.

    Returns:
        recorded and predicted actions (N, A) in robot units, NaN where nothing was predicted; for each query the
        frame, the recorded and the written reasoning.
    """
    cameras = {name: stored_camera(name, episode.camera_names, camera_map) for name in policy.process.camera_names}
    if None in cameras.values():
        raise UserError(
            f"{episode.path}: expected cameras {', '.join(cameras)}, found {', '.join(episode.camera_names)}"
        )
    recorded = episode.action  # (N, A)
    if policy.model.config.data_config["delta_control"]:
        recorded = np.diff(recorded, axis=0, append=recorded[-1:])
    predicted = np.full_like(recorded, np.nan)
    texts = []
    chunk = policy.model.config.policy_head_config.prediction_horizon
    for t in tqdm(range(0, len(episode), chunk), desc=Path(episode.path).name):
        images = {name: np.stack(episode.frames(stored, t, policy.history)) for name, stored in cameras.items()}
        actions, text = policy.predict({"images": images, "qpos": episode.qpos[t]}, episode.instruction(t))  # (T, A)
        start = t if episode.sim else max(0, t - 1)
        predicted[start : start + chunk] = actions[: len(recorded) - start]
        texts.append((t, episode.reasoning(t) or "", text))
    return recorded, predicted, texts


def plot_actions(recorded: np.ndarray, predicted: np.ndarray, title: str, output: str):
    """One panel per action dimension; both arrays (N, A)."""
    dims = recorded.shape[1]
    names = [f"action {i}" for i in range(dims)]
    if dims == 14:
        names = [f"{side} {joint}" for side in ("left", "right") for joint in [*JOINT_NAMES, "gripper"]]
    columns = 7 if dims == 14 else min(dims, 4)
    rows = -(-dims // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.4 * rows), squeeze=False, layout="constrained")
    for i, axis in enumerate(axes.flat):
        axis.set_visible(i < dims)
        if i < dims:
            axis.plot(recorded[:, i], label="recorded", color="tab:gray", linewidth=2)
            axis.plot(predicted[:, i], label="predicted", color="tab:orange", linewidth=1)
            axis.set_title(names[i], fontsize=9)
            axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    fig.suptitle(title)
    fig.supxlabel("frame")
    fig.savefig(output, dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="folder written by training")
    parser.add_argument("--task_name", required=True, help="entry of TASK_CONFIGS")
    parser.add_argument("--episode", help="an episode's path (default: the first held-out one)")
    parser.add_argument("--output", help="picture to write (default: CHECKPOINT/open_loop.png)")
    parser.add_argument("--ema", action="store_true", help="act with the averaged weights of --using_ema True")
    parser.add_argument("--seed", type=int, default=0, help="of the diffusion noise")
    args = parser.parse_args()

    episode = open_episode(args.episode or held_out_episodes(args.task_name)[0])
    policy = Qwen2VLAPolicy.from_pretrained(args.checkpoint, ema=args.ema)
    torch.manual_seed(args.seed)
    recorded, predicted, texts = replay(policy, episode, TASK_CONFIGS[args.task_name].get("camera_map"))
    for t, expected, written in texts:
        print(f"frame {t:4d}  recorded: {expected}\n            written: {written}")
    error = np.nanmean(np.abs(predicted - recorded), axis=0)  # (A,)
    spread = recorded.max(axis=0) - recorded.min(axis=0)
    print(
        f"mean absolute error {error.mean():.4f} in robot units; recorded actions span {spread.mean():.4f} on average"
    )
    output = args.output or str(Path(args.checkpoint) / "open_loop.png")
    plot_actions(recorded, predicted, f"{Path(episode.path).name}: predicted against recorded actions", output)
    print(f"wrote {output}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
