"""`python benchmarks/serve_load.py --url ws://127.0.0.1:8000` (or `--checkpoint C`): does a policy server keep up?

Each client is a robot of its own: a WebSocket, camera images of `--image_size`, the next query as soon as the answer
is there. Every query fixes the first actions of its answer (`prefix`, `frozen`) to numbers of its own, so an answer
that belongs to another query is found out. Prints

    requests, lost (sent, and neither answered nor refused), foreign (answers of other queries), errors (refusals)
    latency p50, p99, highest: from sending a query to having its answer, ms
    requests/s, and the mean number of queries that the server answered together
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from evaluate.client import PolicyClient, PolicyError  # noqa: E402

TOLERANCE = 1e-3  # of the frozen actions, which are normalised and back on their way
FROZEN = 2


@dataclass
class Robot:
    """One client's record. `latencies` in s; `broken`: what ended it early."""

    sent: int = 0
    foreign: int = 0
    broken: str = ""
    latencies: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    errors: Counter = field(default_factory=Counter)

    def work(self, url: str, api_key: str | None, image_size: tuple[int, int], until: float, seed: int):
        rng = np.random.default_rng(seed)
        try:
            with PolicyClient(url, api_key) as client:
                observation = random_observation(client.metadata, image_size, rng)
                last = None  # (T, A) of the previous answer
                while time.perf_counter() < until:
                    last = self._query(client, observation, last, rng)
        except PolicyError as error:  # this robot is out; the report says why
            self.broken = str(error)

    def _query(self, client: PolicyClient, observation: dict, last: np.ndarray | None, rng) -> np.ndarray | None:
        prefix = None
        if last is not None:
            share = rng.random((FROZEN, 1))
            prefix = (share * last[:1] + (1 - share) * last[-1:]).astype(np.float32)  # (FROZEN, A)
            observation = observation | {"prefix": prefix, "frozen": FROZEN}
        self.sent += 1
        began = time.perf_counter()
        try:
            reply = client.infer(observation)
        except PolicyError as error:
            if error.status == 0:  # no answer at all
                raise
            self.errors[str(error)] += 1
            return last
        self.latencies.append(time.perf_counter() - began)
        self.batch_sizes.append(reply["server_timing"]["batch_size"])
        actions = reply["actions"]
        shape = (client.metadata["chunk_size"], client.metadata["action_dim"])
        is_own = actions.shape == shape and np.isfinite(actions).all()
        if prefix is not None:
            is_own = is_own and np.abs(actions[:FROZEN] - prefix).max() < TOLERANCE
        self.foreign += not is_own
        return actions


def random_observation(metadata: dict, image_size: tuple[int, int], rng: np.random.Generator) -> dict:
    """An observation of noise, for a server with this metadata; image_size (width, height)."""
    frames = (metadata["history_images_length"],) if metadata["history_images_length"] > 1 else ()
    shape = (*frames, image_size[1], image_size[0], 3)
    observation = {
        "state": rng.normal(size=metadata["state_dim"]).astype(np.float32),
        "images": {name: rng.integers(0, 256, shape, dtype=np.uint8) for name in metadata["camera_names"]},
        "prompt": "Transfer the red cube to the other arm.",
    }
    robots = metadata["unnorm_keys"]
    return observation | ({"unnorm_key": robots[0]} if len(robots) > 1 else {})


@contextmanager
def server(checkpoint: str, flags: list[str]):
    """A policy server of its own; yields its url, and stops it with SIGTERM.

    Raises:
        PolicyError: when it does not start, or does not end by itself.
    """
    command = [sys.executable, "-m", "evaluate.serve", "--checkpoint", checkpoint, "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        found = next((match for line in process.stdout if (match := re.search(r" on (ws://\S+)", line))), None)
        if not found:
            raise PolicyError("the server did not start; see above")
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    if code:
        raise PolicyError(f"the server ended with code {code}")


def measure(url: str, clients: int, seconds: float, api_key: str | None, image_size: tuple[int, int]) -> str:
    """Lets the clients work, and returns the report.

    Raises:
        PolicyError: when something was lost, foreign or refused; the report is in the message.
    """
    robots = [Robot() for _ in range(clients)]
    began = time.perf_counter()
    threads = [
        threading.Thread(target=robot.work, args=(url, api_key, image_size, began + seconds, seed))
        for seed, robot in enumerate(robots)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began

    latencies = 1000 * np.concatenate([robot.latencies for robot in robots])  # (requests,)
    errors = sum((robot.errors for robot in robots), Counter())
    sent, foreign = (sum(getattr(robot, name) for robot in robots) for name in ("sent", "foreign"))
    broken = Counter(robot.broken for robot in robots if robot.broken)
    lost = sent - len(latencies) - errors.total()
    counts = f"{lost} lost, {foreign} foreign, {errors.total()} errors"
    lines = [f"{sent} requests of {clients} clients in {took:.1f} s: {counts}"]
    lines += [f"  {count} x {message}" for message, count in (errors + broken).most_common(5)]
    if len(latencies):
        p50, p99 = np.percentile(latencies, [50, 99])
        together = np.mean(np.concatenate([robot.batch_sizes for robot in robots]))
        fewest, most = (pick(len(robot.latencies) for robot in robots) for pick in (min, max))
        lines.append(f"latency p50 {p50:.1f} ms, p99 {p99:.1f} ms, highest {latencies.max():.1f} ms")
        rate = f"{len(latencies) / took:.1f} requests/s, {fewest} to {most} a client"
        lines.append(f"{rate}, {together:.1f} answered together")
    if lost or foreign or errors or broken:
        raise PolicyError("\n".join(lines))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--url", help="of a server that runs")
    target.add_argument("--checkpoint", help="start a server with this one; further flags are handed on to it")
    parser.add_argument("--clients", type=int, default=8, help="robots at once")
    parser.add_argument("--seconds", type=float, default=60, help="how long they ask")
    parser.add_argument("--image_size", type=int, nargs=2, default=(640, 480), help="width and height of the images")
    parser.add_argument("--api_key", default=os.environ.get("DEXVLA_API_KEY"), help="the server's")
    args, flags = parser.parse_known_args()
    if args.clients < 1 or args.seconds <= 0:
        raise PolicyError("--clients, --seconds: expected at least one client and more than 0 s")
    if flags and args.url:
        raise PolicyError(f"expected further flags with --checkpoint only, found {' '.join(flags)}")
    settings = (args.clients, args.seconds, args.api_key, tuple(args.image_size))
    if args.url:
        print(measure(args.url, *settings))
        return
    if args.api_key:
        flags += ["--api_key", args.api_key]
    with server(args.checkpoint, flags) as url:
        print(measure(url, *settings))


if __name__ == "__main__":
    try:
        main()
    except PolicyError as error:
        raise SystemExit(f"error: {error}") from None
