"""Records scripted demonstrations in simulation as ACT-style HDF5 episodes.

    python aloha_scripts/record_sim_episodes.py --task_name sim_transfer_cube_scripted --num_episodes 50

The file of one episode (N steps; action[t] is the command carried out at t, qpos[t] and the images are from before it):

    action (N, 14) f32                            joint positions in rad, grippers 0 (closed) .. 1 (open)
    observations/qpos, qvel (N, 14) f32           rad and rad/s, grippers 0 .. 1 and ranges/s
    observations/images/<camera>                  --jpeg True: (N, L) u8, JPEG bytes padded with zeros
                                                  --jpeg False: (N, H, W, 3) u8, RGB
    compress_len (K, N) i64                       with --jpeg True: bytes before the padding, cameras as in CAMERA_NAMES
    language_raw (1,), substep_reasonings (N,)    UTF-8 strings
    attributes: sim = True, compress (bool), seed (int), spread (float)
"""

import os
import sys

if __package__ in (None, ""):  # run as a script: make the clone importable, as `python -m` does
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import h5py
import numpy as np
from tqdm import tqdm

from aloha_scripts import flag_types
from aloha_scripts.constants import TASK_CONFIGS
from aloha_scripts.scripted_policy import ScriptedPolicy, instruction, substep_reasonings
from aloha_scripts.simulation import CAMERA_NAMES, MAX_REWARD, SIM_TASKS, AlohaSimulation, RenderingError

MAX_ATTEMPTS = 20  # per episode
RETRY_STRIDE = 1_000_000  # between the seeds of two attempts: no other episode's seed is used up by a retry


def encode_jpeg(image, quality):
    """(H, W, 3) u8 -> (bytes,) u8. The channels go in as they are, so cv2.imdecode(..., 1) gives RGB back."""
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise RuntimeError(f"OpenCV could not encode an image of shape {image.shape} as JPEG")
    return data.reshape(-1)


@functools.lru_cache(maxsize=1)
def _simulators(task_name, fast_rendering):
    """Built once per process: loading the models takes longer than a rollout."""
    return ScriptedPolicy(task_name), AlohaSimulation(task_name, fast_rendering=fast_rendering)


def replay(env, actions, seed, spread, image_size, keep_frame):
    """Carries out (N, 14) actions from the start that seed and spread give.

    `keep_frame(step, camera, image)` takes every image, (H, W, 3) u8 RGB, seen before the action of that step.
    Returns qpos (N, 14), qvel (N, 14), likewise from before, and the highest reward.
    """
    qpos, qvel = np.empty((2, len(actions), 14), np.float32)
    highest = 0
    env.reset(seed, spread)
    for step, action in enumerate(actions):
        qpos[step], qvel[step] = env.qpos(), env.qvel()
        for camera, image in env.render(CAMERA_NAMES, image_size).items():
            keep_frame(step, camera, image)
        highest = max(highest, env.step(action))
    return qpos, qvel, highest


def write_jpegs(root, frames):
    """Writes {camera: [(bytes,) u8 per step]} as images/<camera> (N, L), zero-padded, and compress_len (K, N)."""
    lengths = {camera: [len(data) for data in frames[camera]] for camera in CAMERA_NAMES}
    root["compress_len"] = np.array(list(lengths.values()))
    for camera, rows in frames.items():
        shape = (len(rows), max(lengths[camera]))
        # Short chunks: those that hold nothing but padding are never written and take no room on the disk.
        images = root.create_dataset(
            f"observations/images/{camera}", shape, "uint8", chunks=(1, min(2048, shape[1])), fillvalue=0
        )
        for step, data in enumerate(rows):
            images[step, : len(data)] = data


def write_episode(path, env, actions, seed, *, spread, language, reasonings, image_size, jpeg_quality):
    """Replays (N, 14) actions and records what is seen in `path`; jpeg_quality None keeps raw frames.

    Returns the highest reward.
    """
    width, height = image_size
    with h5py.File(path, "w") as root:
        if jpeg_quality is None:  # straight into the file, since an episode of raw frames may not fit in memory
            shape = (len(actions), height, width, 3)
            frames = {
                camera: root.create_dataset(f"observations/images/{camera}", shape, "uint8", chunks=(1, *shape[1:]))
                for camera in CAMERA_NAMES
            }
        else:
            frames = {camera: [None] * len(actions) for camera in CAMERA_NAMES}

        def keep_frame(step, camera, image):
            frames[camera][step] = image if jpeg_quality is None else encode_jpeg(image, jpeg_quality)

        qpos, qvel, highest = replay(env, actions, seed, spread, image_size, keep_frame)
        if jpeg_quality is not None:
            write_jpegs(root, frames)
        root["action"], root["observations/qpos"], root["observations/qvel"] = actions, qpos, qvel
        text = h5py.string_dtype("utf-8")
        root.create_dataset("language_raw", data=[language], dtype=text)
        root.create_dataset("substep_reasonings", data=reasonings, dtype=text)
        root.attrs.update(sim=True, compress=jpeg_quality is not None, seed=seed, spread=spread)
    return highest


def record_episode(episode, *, task_name, dataset_dir, seed, spread, image_size, jpeg_quality, fast_rendering):
    """Records episode_<episode>.hdf5; returns the seeds tried, of which the last succeeded."""
    policy, env = _simulators(task_name, fast_rendering)
    path = episode_path(dataset_dir, episode)
    unfinished = path.with_name(f"{path.name}.part")  # renamed when whole: there is never a half-written *.hdf5
    tried = []
    try:
        for attempt in range(MAX_ATTEMPTS):
            start = seed + episode + attempt * RETRY_STRIDE
            tried.append(start)
            # Single precision first: the replay has to succeed with the actions as they are stored.
            actions = policy.rollout(start, spread=spread).astype(np.float32)
            highest = write_episode(
                unfinished,
                env,
                actions,
                start,
                spread=spread,
                language=instruction(task_name, start),
                reasonings=substep_reasonings(task_name, len(actions)),
                image_size=image_size,
                jpeg_quality=jpeg_quality,
            )
            if highest == MAX_REWARD:
                os.replace(unfinished, path)
                return tried
    finally:
        unfinished.unlink(missing_ok=True)
    raise RuntimeError(f"episode {episode} of {task_name} failed with each of the seeds {tried}")


def episode_path(dataset_dir, episode):
    return Path(dataset_dir) / f"episode_{episode}.hdf5"


def record(task_name, dataset_dir, num_episodes, *, num_workers=1, **options):
    """Records the missing ones of episodes 0 .. num_episodes-1 and says so; `options` are record_episode's."""
    Path(dataset_dir).mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(num_episodes) if not episode_path(dataset_dir, number).exists()]
    if not missing:
        print(f"{task_name}: all {num_episodes} episodes are in {dataset_dir} already, nothing to record")
        return
    if len(missing) < num_episodes:
        print(f"{task_name}: keeping {num_episodes - len(missing)} episodes that are in {dataset_dir} already")
    began = time.perf_counter()
    job = functools.partial(record_episode, task_name=task_name, dataset_dir=dataset_dir, **options)
    progress = functools.partial(tqdm, total=len(missing), desc=task_name, unit="episode")
    num_workers = min(num_workers, len(missing))
    if num_workers > 1:
        # spawn, because a renderer does not survive a fork
        pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            tried = list(progress(pool.map(job, missing)))
        finally:
            pool.shutdown(cancel_futures=True)
    else:
        tried = [job(number) for number in progress(missing)]
    failed = [seed for seeds in tried for seed in seeds[:-1]]
    kept = ", ".join(str(seeds[-1]) for seeds in tried)
    size = sum(episode_path(dataset_dir, number).stat().st_size for number in missing) / 1e6
    print(
        f"{task_name}: kept {len(tried)} of {len(tried) + len(failed)} attempts in {dataset_dir}, "
        f"{size:.1f} MB, {time.perf_counter() - began:.1f} s\n"
        f"seeds: {kept}" + (f"; failed: {failed}" if failed else "")
    )


def _boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return text.lower() == "true"


def _task_name(text):
    if text not in SIM_TASKS:
        raise argparse.ArgumentTypeError(f"unknown simulated task {text!r}; known: {', '.join(SIM_TASKS)}")
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description="Record scripted demonstrations in simulation as HDF5 episodes.")
    add = parser.add_argument
    add("--task_name", type=_task_name, required=True, help=" or ".join(SIM_TASKS))
    add("--dataset_dir", type=Path, help="default: the task's folder in TASK_CONFIGS")
    add("--num_episodes", type=flag_types.integer(1, 10**6), default=50, help="those already there count (default: 50)")
    add("--seed", type=flag_types.integer(0, 10**9), default=0, help="episode i starts from seed + i (default: 0)")
    help_spread = "share of the objects' area, about its middle, that starts are drawn from; 0: one start (default: 1)"
    add("--spread", type=flag_types.share, default=1.0, help=help_spread)
    add("--jpeg", type=_boolean, default=True, help="store frames as JPEG, else raw (default: True)")
    add("--jpeg_quality", type=flag_types.integer(1, 100), default=90, help="default: 90")
    add("--image_size", type=flag_types.image_size, default=(640, 480), help='default: "(640,480)", width and height')
    add("--fast_rendering", type=_boolean, default=True, help="no shadows, no smoothed edges (default: True)")
    cores = min(4, os.cpu_count() or 1)
    add("--num_workers", type=flag_types.integer(1, 256), default=cores, help=f"processes (default here: {cores})")
    args = parser.parse_args(argv)
    try:
        record(
            args.task_name,
            args.dataset_dir or Path(TASK_CONFIGS[args.task_name]["dataset_dir"]),
            args.num_episodes,
            num_workers=args.num_workers,
            seed=args.seed,
            spread=args.spread,
            image_size=args.image_size,
            jpeg_quality=args.jpeg_quality if args.jpeg else None,
            fast_rendering=args.fast_rendering,
        )
    except RenderingError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # the same command goes on with what is missing


if __name__ == "__main__":
    main()
