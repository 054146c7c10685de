"""`python -m evaluate.client --url ws://127.0.0.1:8000`: the robot's side of `evaluate.serve`, here a simulator.

    with PolicyClient("ws://127.0.0.1:8000") as client:
        reply = client.infer({"state": qpos, "images": {"top": frame}, "prompt": "Transfer the cube."})
        reply["actions"]  # (T, A) float32, robot units

Needs numpy, msgpack and websockets, no torch. For a robot of your own write a class like `SimulatedAloha`: `reset`,
`observe` and `step` are all that `run` asks of it.
"""

import argparse
import os
import time
from collections import deque

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import connect

from aloha_scripts.constants import FPS
from evaluate.chunking import AsyncChunks, Chunks
from evaluate.execution import DeltaIntegrator
from evaluate.wire import PolicyError, RequestError, pack, unpack


class PolicyClient:
    """A connection to a policy server; for one thread at a time.

    Args:
        url: such as "ws://192.168.0.7:8000". api_key: the server's, if it asks for one.
        timeout: s to wait for the connection, and for an answer.

    Attributes:
        metadata: what the server serves: camera_names, chunk_size, action_dim, state_dim, …

    Raises:
        PolicyError: naming the url, when nobody answers there or the key is refused.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 30.0):
        self.url, self.timeout = url, timeout
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        try:
            # entered here and left in close(), as newer versions of websockets want it
            self._connection = connect(
                url, additional_headers=headers, compression=None, max_size=None, open_timeout=timeout
            ).__enter__()
        except InvalidStatus as error:
            status = error.response.status_code
            reason = "refuses the API key" if status == 401 else f"answers with status {status} instead of a WebSocket"
            raise PolicyError(f"{url}: the server {reason}", status) from None
        except InvalidURI:
            raise PolicyError(f"{url}: expected a url such as ws://127.0.0.1:8000") from None
        except (OSError, TimeoutError, InvalidHandshake, EOFError) as error:
            raise PolicyError(f"{url}: expected a policy server, found none ({error})") from None
        try:
            self.metadata = self._receive()
        except PolicyError:
            self.close()
            raise

    def infer(self, observation: dict) -> dict:
        """An observation -> "actions" (T, A) float32 in robot units, "reasoning", "server_timing" (ms).

        Args:
            observation: `{"state": (S,), "images": {camera: (H, W, 3) or (3, H, W) uint8 RGB}, "prompt": str}`;
                optionally "unnorm_key", and "prefix" (n, A) with "frozen" (see `AsyncChunks`).

        Raises:
            PolicyError: the server's message, when it refuses; or why it does not answer.
        """
        try:
            self._connection.send(pack(observation))
        except ConnectionClosed as error:
            raise self._closed(error) from None
        return self._receive()

    def close(self):
        self._connection.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_):
        self.close()

    def _receive(self) -> dict:
        try:
            reply = self._connection.recv(timeout=self.timeout)
        except ConnectionClosed as error:
            raise self._closed(error) from None
        except TimeoutError:
            self.close()  # or the late answer would be taken for the next one
            raise PolicyError(f"{self.url}: no answer within {self.timeout:g} s") from None
        if isinstance(reply, str):
            status, _, message = reply.partition(" ")
            raise PolicyError(message, int(status)) if status.isdigit() else PolicyError(reply)
        try:
            return unpack(reply)
        except RequestError as error:
            raise PolicyError(f"{self.url}: expected a policy server's answer; {error}") from None

    def _closed(self, error: ConnectionClosed) -> PolicyError:
        reason = f"{error.rcvd.code} {error.rcvd.reason}".strip() if error.rcvd else "without a word"
        return PolicyError(f"{self.url}: the server has closed the connection ({reason})")


class SimulatedAloha:
    """The robot, here ALOHA in simulation: the place to put your own robot's drivers.

    Args:
        task_name: such as "sim_transfer_cube". cameras: those that the policy wants.
        image_size: (width, height) in pixels.

    Raises:
        PolicyError: for a task or cameras that the simulator does not have.
    """

    def __init__(self, task_name: str, cameras: list[str], image_size: tuple[int, int] = (640, 480)):
        # here, since robots of your own need no MuJoCo
        from dm_control.rl.control import PhysicsError

        try:
            from aloha_scripts.scripted_policy import instruction
            from aloha_scripts.simulation import CAMERA_NAMES, GL_BACKEND, GL_MISSING, AlohaSimulation, full_name
        except RuntimeError as error:  # there is no such MUJOCO_GL, or nothing to render with
            raise PolicyError(str(error)) from None

        if GL_BACKEND == "off":
            raise PolicyError(GL_MISSING.format(backend=GL_BACKEND))
        unknown = set(cameras) - set(CAMERA_NAMES)
        if unknown:
            known = ", ".join(CAMERA_NAMES)
            raise PolicyError(f"the policy's cameras: expected some of {known}, found {', '.join(sorted(unknown))}")
        try:
            self.task_name = full_name(task_name)
        except ValueError as error:
            raise PolicyError(f"--task_name: {error}") from None
        self.cameras, self.image_size = cameras, image_size
        self._instruction, self._physics_error = instruction, PhysicsError
        self.env = AlohaSimulation(self.task_name)

    def reset(self, seed: int):
        """Moves to the start of an episode."""
        self.env.reset(seed)
        self.prompt = self._instruction(self.task_name, seed)

    def observe(self) -> dict:
        """What `PolicyClient.infer` takes: "state" (14,) in rad, grippers 0 .. 1, "images" (H, W, 3) RGB, "prompt"."""
        images = self.env.render(self.cameras, self.image_size)
        return {"state": self.env.qpos().astype(np.float32), "images": images, "prompt": self.prompt}

    def step(self, action: np.ndarray) -> float:
        """Commands joint positions (14,), and returns the reward so far (0 .. 4); a real robot may return 0."""
        try:
            return self.env.step(action)
        except self._physics_error:
            raise PolicyError("the policy's actions are so wild that the simulation broke off") from None


class RecentFrames:
    """A robot whose observations hold the last `history` frames of every camera, (F, H, W, 3), the newest last; before
    the first one there was no other. `look` at every control step."""

    def __init__(self, robot, history: int):
        self.robot = robot
        self.seen: deque[dict] = deque(maxlen=history)

    def look(self):
        self.seen.append(self.robot.observe())

    def observe(self) -> dict:
        frames = [seen["images"] for seen in self.seen]
        frames = frames[:1] * (self.seen.maxlen - len(frames)) + frames
        return self.seen[-1] | {"images": {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}}


def run(
    robot,
    chunks: Chunks | AsyncChunks,
    steps: int,
    fps: float = FPS,
    delta_control: bool = False,
    history: int = 1,
) -> float:
    """Lets a robot act for some control steps, `fps` of them a second (0: as fast as it can); the highest reward.

    With `delta_control` the policy's actions are differences between commands, and `robot` gets their sum. For a policy
    that takes a `history` of frames the robot observes at every step, else only when the policy is asked.
    """
    to_command = DeltaIntegrator(robot.observe()["state"]) if delta_control else np.asarray
    recent = RecentFrames(robot, history) if history > 1 else None
    highest, due = 0.0, time.perf_counter()
    for _ in range(steps):
        if recent:
            recent.look()
        action = chunks.next_action((recent or robot).observe)  # (A,)
        if fps:
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(due, time.perf_counter() - 1 / fps) + 1 / fps  # a step that was late does not hurry the next
        highest = max(highest, robot.step(to_command(action)))
    return highest


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="ws://127.0.0.1:8000", help="of the policy server")
    add("--api_key", help="the server's; the environment variable DEXVLA_API_KEY does not show in `ps`")
    add("--task_name", default="sim_transfer_cube", help="task of the simulator")
    add("--steps", type=int, default=400, help="control steps")
    add("--fps", type=float, default=FPS, help="control steps a second; 0: as fast as it can")
    add("--seed", type=int, default=0, help="where the objects lie")
    add("--query_frequency", type=int, help="steps between queries (default: the chunk, or half with --asynchronous)")
    add("--asynchronous", action="store_true", help="compute the next chunk while the running one is executed")
    args = parser.parse_args()
    if args.steps < 1 or not 0 <= args.fps < float("inf"):
        raise PolicyError(f"--steps, --fps: expected at least 1 and 0, found {args.steps} and {args.fps:g}")
    if not 0 <= args.seed < 2**32:
        raise PolicyError(f"--seed: expected 0 to 2^32 - 1, found {args.seed}")
    if args.asynchronous and not args.fps:
        raise PolicyError("--fps: expected the robot's control rate with --asynchronous, found 0")

    with PolicyClient(args.url, args.api_key or os.environ.get("DEXVLA_API_KEY")) as client:
        chunk, delta_control = client.metadata["chunk_size"], client.metadata["delta_control"]
        query_frequency = args.query_frequency
        if query_frequency is None:
            query_frequency = max(1, chunk // 2) if args.asynchronous else chunk
        if not 1 <= query_frequency <= chunk:
            raise PolicyError(f"--query_frequency: expected 1 to the chunk's {chunk} actions, found {query_frequency}")
        robot = SimulatedAloha(args.task_name, client.metadata["camera_names"])
        robot.reset(args.seed)
        if args.asynchronous:
            chunks = AsyncChunks(client.infer, query_frequency, 1 / args.fps, delta_control)
        else:
            chunks = Chunks(client.infer, query_frequency)
        began = time.perf_counter()
        try:
            history = client.metadata["history_images_length"]
            reward = run(robot, chunks, args.steps, args.fps, delta_control, history)
        finally:
            chunks.close()
        rate = args.steps / (time.perf_counter() - began)
    p50, p99 = 1000 * np.percentile(chunks.latencies, [50, 99])
    print(f"highest reward {reward:g} of 4, {args.steps} steps at {rate:.1f} a second")
    print(f"{len(chunks.latencies)} queries, latency p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    if args.asynchronous:
        print(f"{chunks.late} late replies, {chunks.held} steps held")


if __name__ == "__main__":
    try:
        main()
    except PolicyError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
