"""`python -m evaluate.rollout_sim --checkpoint C --task_name sim_transfer_cube`: a checkpoint acts in simulation.

Rollout i starts where seed + i places the objects. Success rate, reward by phase, one video per rollout; all of it in
OUTPUT/rollouts.json.
"""

import argparse
import time
from dataclasses import asdict, fields
from pathlib import Path

from aloha_scripts.flag_types import image_size, integer, share

# The simulator processes import this file too: what is large is imported where it is used.


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder written by training")
    add("--task_name", required=True, help="sim_transfer_cube or sim_insertion")
    add("--num_rollouts", type=integer(1), default=50, help="default: 50")
    add("--seed", type=integer(0), default=1000, help="rollout i places the objects by seed + i (default: 1000)")
    add("--noise_seed", type=integer(0), default=0, help="of the diffusion noise (default: 0)")
    add("--num_envs", type=integer(1), default=1, help="robots simulated at once, a process each (default: 1)")
    add("--query_frequency", type=integer(1), help="steps between two chunks (default: the chunk; with --ensemble 1)")
    add("--ensemble", action="store_true", help="temporal ensembling, as in ACT")
    add("--decay", type=float, default=0.01, help="of the ensemble's weights, from the oldest on (default: 0.01)")
    add("--smoothing", type=float, default=0.0, help="share of the last action that is kept, 0 .. <1 (default: 0)")
    add("--blend", type=integer(0), default=0, help="steps over which a new chunk fades in (default: 0)")
    add("--spread", type=share, default=1.0, help="share of the objects' area to start from, 0 .. 1 (default: 1)")
    add("--max_steps", type=integer(1), default=400, help="of 0.02 s (default: 400)")
    add("--image_size", type=image_size, default=(320, 240), help='rendered width and height (default: "(320,240)")')
    add("--output", type=Path, help="folder (default: CHECKPOINT/rollouts)")
    add("--no_video", action="store_true")
    add("--video_every", type=integer(1), default=10, help="steps between the frames of a video (default: 10)")
    add("--reasoning_every", type=integer(1), default=1, help="queries for which a reasoning is used (default: 1)")
    add("--no_reasoning", action="store_true", help="the policy writes none, which is faster")
    add("--max_new_tokens", type=integer(1), default=256, help="of a reasoning, at most (default: 256)")
    add("--unnorm_key", help="the robot, for a checkpoint trained on several")
    add("--ema", action="store_true", help="act with the averaged weights of --using_ema True")
    add("--bits", type=int, default=16, choices=(4, 8, 16), help="of the backbone's weights (default: 16)")
    add("--device", help="such as cuda:1 or cpu (default: the accelerator)")
    return parser.parse_args()


def simulation_for(policy, args: argparse.Namespace):
    """What the policy is to be rolled out in.

    Raises:
        UserError: naming the task, or what the checkpoint lacks for it.
    """
    from data_utils import UserError, stored_camera

    # isort: split
    from aloha_scripts.constants import TASK_CONFIGS
    from aloha_scripts.simulation import CAMERA_NAMES, SIM_TASKS, full_name
    from evaluate.simulated_robot import Simulation

    try:
        task_name = full_name(args.task_name)
    except ValueError:
        raise UserError(f"--task_name: expected one of {', '.join(SIM_TASKS)}, found {args.task_name!r}") from None
    camera_map = TASK_CONFIGS.get(task_name, {}).get("camera_map")
    cameras = {name: stored_camera(name, CAMERA_NAMES, camera_map) for name in policy.camera_names}
    if None in cameras.values():
        raise UserError(
            f"checkpoint {args.checkpoint}: expected the simulator's cameras {', '.join(CAMERA_NAMES)}, found "
            f"{', '.join(cameras)}; camera_map in TASK_CONFIGS[{task_name!r}] can name theirs"
        )
    if (policy.action_dim, policy.state_dim) != (14, 14):
        raise UserError(
            f"checkpoint {args.checkpoint}: expected the 14 actions and 14 joints of the simulated robot, found "
            f"{policy.action_dim} and {policy.state_dim}"
        )
    return Simulation(
        task_name, cameras, args.image_size, args.spread, args.max_steps, policy.history, args.video_every
    )


def run(args: argparse.Namespace):
    from qwen2_vla import Qwen2VLAPolicy

    # isort: split
    from data_utils import UserError

    try:
        from evaluate.closed_loop import ClosedLoop, Settings, summarize, write_results
    except RuntimeError as error:  # the simulator's RenderingError: this machine's OpenGL cannot be used
        raise UserError(str(error)) from error

    settings = Settings(**{setting.name: getattr(args, setting.name) for setting in fields(Settings)})
    try:
        settings.queue()
    except ValueError as error:
        raise UserError(f"--{error}") from None
    policy = Qwen2VLAPolicy.from_pretrained(args.checkpoint, args.device, ema=args.ema, bits=args.bits)
    simulation = simulation_for(policy, args)
    if (args.query_frequency or 1) > policy.chunk_size:
        raise UserError(
            f"--query_frequency: expected at most the chunk's {policy.chunk_size} actions, found {args.query_frequency}"
        )

    output = args.output or Path(args.checkpoint) / "rollouts"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: expected a folder that can be written, found {error.strerror}") from error
    described = {"checkpoint": args.checkpoint, "ema": args.ema, "bits": args.bits}
    described |= asdict(settings) | asdict(simulation) | {"chunk_size": policy.chunk_size}
    began, results = time.perf_counter(), []

    def write():
        loop_summary = summarize(simulation.task_name, results) | {"latency": loop.latency()}
        write_results(output / "rollouts.json", described, loop_summary, sorted(results, key=lambda r: r["rollout"]))

    def report(result: dict):
        results.append(result)
        write()
        after = result["steps_to_success"] or result["steps"]
        print(
            f"rollout {result['rollout']:3d}  seed {result['seed']}  {'success' if result['success'] else 'failed '}  "
            f"reward {result['highest_reward']}  {after:3d} steps  {len(results)}/{args.num_rollouts} done, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )

    loop = ClosedLoop(policy, simulation, settings, None if args.no_video else output, report)
    try:
        loop.run()
    except KeyboardInterrupt:
        print(f"stopped after {len(results)} of {args.num_rollouts} rollouts")
        if results:
            write()
            print_summary(summarize(simulation.task_name, results), loop.latency(), time.perf_counter() - began)
        raise
    print_summary(summarize(simulation.task_name, results), loop.latency(), time.perf_counter() - began)
    print(f"wrote {output / 'rollouts.json'}" + ("" if args.no_video else f" and {output / 'videos'}"))


def print_summary(summary: dict, latency: dict, seconds: float):
    low, high = summary["confidence_interval_95"]
    print(
        f"success rate {summary['success_rate']:.1%} ({summary['successes']} of {summary['rollouts']}), "
        f"95 % confidence interval {low:.1%} .. {high:.1%}"
    )
    for phase in summary["reached"]:
        print(f"  reward {phase['reward']}  {phase['share']:6.1%}  {phase['meaning']}")
    if summary["mean_steps_to_success"] is not None:
        print(f"mean steps to success {summary['mean_steps_to_success']:.1f}")
    print(
        f"policy: p50 {latency['p50_ms']:.1f} ms, p99 {latency['p99_ms']:.1f} ms a call for "
        f"{latency['mean_batch']:.1f} observations on average; {seconds / summary['rollouts']:.1f} s a rollout"
    )


def main():
    run(parse_arguments())


if __name__ == "__main__":
    from data_utils import run_command

    run_command(main)
