"""`python -m evaluate.open_loop --checkpoint C --task_name T`: GO or NO-GO, before a robot moves.

Held-out episodes are replayed: the policy sees their frames and predicts a chunk every `--query_every` frames, nothing
moves. What it predicts is measured against what was recorded; the report is CHECKPOINT/open_loop.html.
"""

import argparse
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_utils import Episode, UserError, load_data, open_episode, run_command, stored_camera
from data_utils.episodes import lerobot_folder
from data_utils.hdf5 import open_hdf5
from data_utils.lerobot import fps_of
from data_utils.tasks import get_task
from evaluate.judge import Check, Latency, is_go, judge, judge_latency, judge_recordings
from evaluate.measures import Measures, Replay, measure
from evaluate.report import plot_actions, write_report
from qwen2_vla import Qwen2VLAPolicy

MOST_EPISODES = 10
BATCH = 8  # queries answered at once
LATENCY_QUERIES, LATENCY_SECONDS = 30, 10.0  # whichever is reached first


def held_out_episodes(task_name: str) -> list[str]:
    """The episodes that training with this task leaves out for validation."""
    task = get_task(task_name)
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


class Replayer:
    """Asks a policy about recorded frames.

    Args:
        every: frames between two queries, at most a chunk. Default: the chunk.
        seed: of the noise that chunks are denoised from; the same for the same frame.
        options: of `policy.predict`.
    """

    def __init__(
        self,
        policy: Qwen2VLAPolicy,
        camera_map: dict[str, str | list[str]] | None = None,
        *,
        every: int | None = None,
        seed: int = 0,
        **options,
    ):
        self.policy, self.camera_map, self.options, self.seed = policy, camera_map, options, seed
        self.every = policy.chunk_size if every is None else every
        if not 1 <= self.every <= policy.chunk_size:
            raise UserError(f"--query_every: expected 1 .. {policy.chunk_size}, the chunk of the policy, found {every}")

    def replay(self, episode: Episode) -> Replay:
        """Queries the policy all over an episode.

        Raises:
            UserError: for an episode that does not fit the policy.
        """
        policy = self.policy
        cameras = self._cameras(episode)
        recorded = episode.action  # (N, A)
        hold = recorded
        if policy.delta_control:
            recorded = np.diff(recorded, axis=0, append=recorded[-1:])
            hold = np.zeros_like(recorded)
        frames = np.arange(0, len(episode), self.every)  # (Q,)
        # As in training: a real robot records the command it is still executing, one step late
        starts = frames if episode.sim else np.maximum(frames - 1, 0)  # (Q,)
        chunks, texts = [], []
        for at in tqdm(range(0, len(frames), BATCH), desc=Path(episode.path).name, leave=False):
            answers, written = self.ask(episode, cameras, frames[at : at + BATCH])
            chunks.append(answers)
            texts += written
        told = [None] * len(frames)
        if policy.use_reasoning and self.options.get("reasoning") is None:
            told = [episode.reasoning(int(t)) for t in frames]
        return Replay(
            path=episode.path,
            every=self.every,
            recorded=recorded,
            starts=starts,
            chunks=np.concatenate(chunks),  # (Q, T, A)
            hold=hold[np.maximum(starts - 1, 0)],  # (Q, A)
            reasonings=list(zip(told, texts)),
        )

    def time_queries(self, episode: Episode) -> Latency:
        """How long one query takes, over frames of an episode; the first includes what is made up only once."""
        cameras = self._cameras(episode)
        seconds = []
        for t in np.linspace(0, len(episode) - 1, LATENCY_QUERIES + 1).astype(int):
            began = time.perf_counter()
            self.ask(episode, cameras, [t])
            seconds.append(time.perf_counter() - began)
            if len(seconds) > 1 and sum(seconds) > LATENCY_SECONDS:
                break
        first, *others = (1000 * second for second in seconds)
        return Latency(first, *np.percentile(others, (50, 99)), len(others))

    def ask(self, episode: Episode, cameras: dict[str, str], frames: list[int]) -> tuple[np.ndarray, list[str]]:
        """(B, T, A) and B texts: the policy's answers to B frames."""
        policy = self.policy
        observations, noise = [], []
        for t in map(int, frames):
            images = {name: np.stack(episode.frames(stored, t, policy.history)) for name, stored in cameras.items()}
            if policy.history == 1:
                images = {name: image[0] for name, image in images.items()}
            observations.append({"images": images, "qpos": episode.qpos[t]})
            shape = (policy.chunk_size, policy.action_dim)
            noise.append(np.random.default_rng([self.seed, t]).standard_normal(shape, np.float32))
        instructions = [episode.instruction(int(t)) for t in frames]
        return policy.predict(observations, instructions, noise=np.stack(noise), **self.options)

    def _cameras(self, episode: Episode) -> dict[str, str]:
        policy, path = self.policy, episode.path
        cameras = {name: stored_camera(name, episode.camera_names, self.camera_map) for name in policy.camera_names}
        if None in cameras.values():
            raise UserError(f"{path}: expected cameras {', '.join(cameras)}, found {', '.join(episode.camera_names)}")
        for name, rows, dim in (
            ("action", episode.action, policy.action_dim),
            ("qpos", episode.qpos, policy.state_dim),
        ):
            if rows.shape[1:] != (dim,):
                raise UserError(f"{path}: {name}: expected {dim} dimensions, as the policy has, found {rows.shape[1]}")
            if not np.isfinite(rows).all():
                t = int(np.argwhere(~np.isfinite(rows))[0, 0])
                raise UserError(f"{path}: {name}: expected finite numbers, found others in frame {t}")
        return cameras


def recorded_rewards(sim_task: str, paths: list[str]) -> dict[str, int]:
    """Carries recorded actions out in the simulator: episode -> highest reward. Nothing is rendered.

    Episodes are left out that do not say where their objects stood: files of record_sim_episodes.py have `seed`.
    """
    from dm_control.rl.control import PhysicsError

    from aloha_scripts.simulation import MAX_REWARD, AlohaSimulation

    simulation = AlohaSimulation(sim_task)
    rewards = {}
    for path in paths:
        if lerobot_folder(path):
            continue
        with open_hdf5(path) as file:
            if "seed" not in file.attrs:
                continue
            simulation.reset(int(file.attrs["seed"]), float(file.attrs.get("spread", 1.0)))
            actions = file["action"][()]  # (N, 14)
        rewards[path] = 0
        try:
            for action in actions:
                rewards[path] = max(rewards[path], int(simulation.step(action)))
                if rewards[path] == MAX_REWARD:
                    break
        except PhysicsError:  # the actions drove the robot through the table: no more reward to come
            continue
    return rewards


def _check_recordings(sim_task: str | None, task_name: str, paths: list[str]) -> tuple[Check, dict[str, int]]:
    """sim_task: as --simulate."""
    name = "recorded actions in the simulator"
    if sim_task == "none":
        return Check(name, "skipped", "--simulate none", "all succeed"), {}
    try:
        from aloha_scripts.simulation import MAX_REWARD, SIM_TASKS, full_name
    except (ImportError, RuntimeError) as error:  # no simulator, or none that runs without a display
        return Check(name, "skipped", f"no simulator here: {error}", "all succeed"), {}
    try:
        full = full_name(sim_task or task_name)
    except ValueError:
        if sim_task:
            raise UserError(f"--simulate: expected none or one of {', '.join(SIM_TASKS)}, found {sim_task}") from None
        return Check(name, "skipped", f"{task_name} is not a simulated task", "all succeed"), {}
    rewards = recorded_rewards(full, paths)
    return judge_recordings(rewards, MAX_REWARD), rewards


def _check_writable(files: dict[str, str]):
    """Flag -> path: asked before minutes are spent on what goes there."""
    for flag, path in files.items():
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            is_new = not Path(path).exists()
            open(path, "ab").close()
            if is_new:
                Path(path).unlink()
        except OSError as error:
            raise UserError(f"--{flag} {path}: expected a file that can be written, found {error.strerror}") from error


def print_results(replays: list[Replay], measures: Measures, checks: list[Check], latency: Latency):
    """The reasonings of the first episode where they change, errors by joint, checks, verdict."""
    before = None
    for t, texts in zip(range(0, len(replays[0].recorded), replays[0].every), replays[0].reasonings):
        if texts != before and texts[0] is not None:
            print(f"frame {t:4d}  recorded: {texts[0]}\n            written: {texts[1]}")
        before = texts
    m = measures
    print(f"{'':22}{'error':>9}{'95 %':>9}{'of range':>10}{'holding still':>15}{'constant':>10}   in robot units")
    for i, joint in enumerate(m.joints):
        share = f"{m.error[i] / m.span[i]:.1%}" if m.moving[i] else "still"
        print(f"{joint:22}{m.error[i]:9.4f}{m.error_95[i]:9.4f}{share:>10}{m.holding[i]:15.4f}{m.constant[i]:10.4f}")
    print(f"latency: first {latency.first:.0f} ms, p50 {latency.p50:.0f} ms, p99 {latency.p99:.0f} ms a query\n")
    for check in checks:
        print(f"{check.level:8} {check.name}: {check.found}; expected {check.expected}")
        if check.advice:
            print(f"{'':9}-> {check.advice}")
    errors, warnings = (sum(check.level == level for check in checks) for level in ("error", "warning"))
    print(f"\n{'GO' if is_go(checks) else 'NO-GO'}: {errors} errors, {warnings} warnings in {len(checks)} checks")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder written by training")
    add("--task_name", required=True, help="entry of TASK_CONFIGS")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--episode", help="an episode's path (default: the held-out ones)")
    chosen.add_argument("--episodes", type=int, default=MOST_EPISODES, help="held-out ones at most (default: 10)")
    add("--report", help="page to write (default: CHECKPOINT/open_loop.html)")
    add("--output", help="picture of the first episode (default: CHECKPOINT/open_loop.png)")
    add("--query_every", type=int, help="frames between two queries (default: the chunk)")
    add("--fps", type=float, help="control steps a second, for the latency (default: the dataset's, or ALOHA's 50)")
    add("--no_reasoning", action="store_true", help="the policy writes none, which is faster")
    add("--max_new_tokens", type=int, default=256, help="of a reasoning, at most (default: 256)")
    add("--simulate", metavar="TASK", help="simulated task to replay the recordings in, or none (default: --task_name)")
    add("--unnorm_key", help="the robot, for a checkpoint trained on several")
    add("--ema", action="store_true", help="act with the averaged weights of --using_ema True")
    add("--bits", type=int, default=16, choices=(4, 8, 16), help="of the backbone's weights (default: 16)")
    add("--device", help="such as cuda:1 or cpu (default: the accelerator)")
    add("--seed", type=int, default=0, help="of the diffusion noise (default: 0)")
    add("--strict", action="store_true", help="exit with 1 on NO-GO")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    for name, least in (("episodes", 1), ("max_new_tokens", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: expected an integer >= {least}, found {getattr(args, name)}")
    if args.fps is not None and not 0 < args.fps < float("inf"):
        raise UserError(f"--fps: expected a number above 0, found {args.fps:g}")
    task = get_task(args.task_name)
    output = args.output or str(Path(args.checkpoint) / "open_loop.png")
    report = args.report or str(Path(args.checkpoint) / "open_loop.html")
    paths = [args.episode] if args.episode else held_out_episodes(args.task_name)[: args.episodes]
    recordings, rewards = _check_recordings(args.simulate, args.task_name, paths)

    policy = Qwen2VLAPolicy.from_pretrained(args.checkpoint, args.device, ema=args.ema, bits=args.bits)
    _check_writable({"output": output, "report": report})
    options = {"max_new_tokens": args.max_new_tokens, "unnorm_key": args.unnorm_key}
    options["reasoning"] = "" if args.no_reasoning else None
    replayer = Replayer(policy, task.get("camera_map"), every=args.query_every, seed=args.seed, **options)
    latency, replays = None, []
    for path in paths:
        with closing(open_episode(path)) as episode:
            latency = latency or replayer.time_queries(episode)
            replays.append(replayer.replay(episode))
    try:
        measures = measure(replays, policy.robot_stats[args.unnorm_key or policy.unnorm_keys[0]])
    except ValueError as error:
        raise UserError(f"{', '.join(paths)}: {error}") from None
    checks = [*judge(measures), judge_latency(latency, replayer.every, fps_of(paths[0], args.fps)), recordings]
    print_results(replays, measures, checks, latency)

    plot_actions(replays[0], output)
    write_report(report, f"{args.checkpoint}, {args.task_name}", replays, measures, checks, latency, rewards)
    print(f"wrote {output} and {report}")
    return int(args.strict and not is_go(checks))


if __name__ == "__main__":
    run_command(main)
