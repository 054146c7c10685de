"""`python -m evaluate.vla_eval_server --args.checkpoint C`: a checkpoint for the benchmarks of the harness vla-eval.

The harness's LIBERO, CALVIN, SimplerEnv, RoboTwin and so on connect to it; docs/vla_eval.md shows how.
"""

import errno
import json
import logging
import sys
import zlib
from collections import deque
from typing import Any

import numpy as np
from vla_eval import specs
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import run_server
from vla_eval.specs import IMAGE_RGB, LANGUAGE, DimSpec
from vla_eval.types import Action, Observation

from data_utils import UserError, run_command
from evaluate.execution import ActionQueue, DeltaIntegrator
from qwen2_vla import Qwen2VLAPolicy

logger = logging.getLogger(__name__)

STATE_KEYS = ("states", "state", "joint_state")  # how the harness's benchmarks call it
KNOWN_SPECS = [value for value in vars(specs).values() if isinstance(value, DimSpec)]


class Session:
    """One episode of one client: what is left of its chunk, its last frames, its noise, and with differences for
    actions what they are added to."""

    def __init__(self, queue: ActionQueue, history: int, noise: np.random.Generator):
        self.queue = queue
        self.frames: deque[dict[str, np.ndarray]] = deque(maxlen=history)
        self.noise = noise
        self.command: DeltaIntegrator | None = None

    def restart(self):
        self.queue.reset()
        self.frames.clear()

    def next_action(self) -> np.ndarray:
        """(A,) float32"""
        action = self.queue.pop()
        return (self.command(action) if self.command else action).astype(np.float32)


class DexVLAModelServer(PredictModelServer):
    """Answers each observation of a benchmark with one action (A,), in the units that the checkpoint was trained on.

    Args:
        checkpoint: folder that `Qwen2VLAPolicy.from_pretrained` takes.
        device: as there.
        ema: as there.
        bits: as there.
        camera_map: the checkpoint's cameras -> the benchmark's images, `{"top": "agentview"}`. By default images of the
            same name, and the others in order; their number must be the same then.
        state_keys: names of the observation's state, put together in this order (default: the first there is of
            states, state, joint_state).
        zero_state: the benchmark sends no state and the checkpoint was trained on zeros.
        query_frequency: steps between two chunks (default: the whole chunk; 1 with `ensemble`).
        ensemble: execute the mean of all chunks' predictions for a step, as ACT does.
        smoothing: share in [0, 1) of the last action that is kept.
        unnorm_key: the robot whose statistics are used, of a checkpoint that was trained on several.
        max_new_tokens: limit of the reasoning.
        no_reasoning: skip the reasoning, the action head sees an empty one.
        action_spec: what the actions are, `{"position": "delta_xyz", "rotation": "axis_angle", "gripper":
            "binary_close_positive"}`; the harness then warns where the benchmark expects something else.
        observation_params: more settings that the benchmark is asked for, `{"absolute_action": True}`.
        seed: an episode's noise is drawn from this and the task's name and number, whatever else is running.
        max_batch_size: clients that are answered together.
        max_wait_time: seconds that a batch waits for more of them.

    Raises:
        UserError: for a checkpoint that cannot act, or arguments that do not fit it.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str | None = None,
        ema: bool = False,
        bits: int = 16,
        camera_map: dict[str, str] | None = None,
        state_keys: list[str] | None = None,
        zero_state: bool = False,
        query_frequency: int | None = None,
        ensemble: bool = False,
        smoothing: float = 0.0,
        unnorm_key: str | None = None,
        max_new_tokens: int = 256,
        no_reasoning: bool = False,
        action_spec: dict[str, str] | None = None,
        observation_params: dict[str, Any] | None = None,
        seed: int = 0,
        max_batch_size: int = 1,
        max_wait_time: float = 0.01,
    ):
        if max_batch_size < 1:
            raise UserError(f"max_batch_size: expected at least 1, found {max_batch_size}")
        # no chunk_size: the harness's buffer would be filled only when empty, so that nothing could be averaged in it
        super().__init__(max_batch_size=max_batch_size, max_wait_time=max_wait_time)
        self.policy = Qwen2VLAPolicy.from_pretrained(checkpoint, device, ema=ema, bits=bits)
        self.camera_map = camera_map or {}
        self.state_keys = state_keys
        self.zero_state = zero_state
        self.queue_options = {"query_frequency": query_frequency, "ensemble": ensemble, "smoothing": smoothing}
        self.unnorm_key = unnorm_key
        self.max_new_tokens = max_new_tokens
        self.reasoning = "" if no_reasoning else None
        self.observation_params = observation_params or {}
        self.seed = seed
        self.action_spec = self._read_action_spec(action_spec)
        self.sessions: dict[str, Session] = {}
        self.guessed = {camera: camera for camera in self.policy.camera_names}  # camera -> the benchmark's image
        self._check_arguments()

    def _check_arguments(self):
        policy, frequency = self.policy, self.queue_options["query_frequency"]
        if self.camera_map and sorted(self.camera_map) != sorted(policy.camera_names):
            raise UserError(
                f"camera_map: expected the checkpoint's cameras {', '.join(policy.camera_names)}, "
                f"found {', '.join(self.camera_map)}"
            )
        if frequency is not None and not 1 <= frequency <= policy.chunk_size:
            raise UserError(f"query_frequency: expected 1 .. {policy.chunk_size} (the chunk), found {frequency}")
        if self.unnorm_key not in policy.unnorm_keys and (self.unnorm_key or len(policy.unnorm_keys) > 1):
            raise UserError(f"unnorm_key: expected one of {', '.join(policy.unnorm_keys)}, found {self.unnorm_key}")
        try:
            ActionQueue(**self.queue_options)
        except ValueError as error:
            raise UserError(str(error)) from None
        # differences of joint positions add up to joint positions; of other actions nothing is known to add them to
        self.integrates = policy.delta_control and policy.action_dim == policy.state_dim and not self.zero_state
        if policy.delta_control and not self.integrates:
            logger.warning(
                "The checkpoint was trained with --delta_control True: the benchmark gets differences of actions"
            )

    def _read_action_spec(self, components: dict[str, str] | None) -> dict[str, DimSpec]:
        if components is None:
            return {"actions": DimSpec("actions", self.policy.action_dim, "robot_units")}
        known = {(spec.name, spec.format): spec for spec in KNOWN_SPECS if spec.accepts is None}
        for name, format_ in components.items():
            if (name, format_) not in known:
                formats = [spec.format for spec in known.values() if spec.name == name]
                expected = f"one of {', '.join(formats)}" if formats else f"no component {name}"
                raise UserError(f"action_spec: {name}: expected {expected}, found {format_}")
        found = {name: known[name, format_] for name, format_ in components.items()}
        dims = sum(spec.dims for spec in found.values())
        if dims != self.policy.action_dim:
            raise UserError(
                f"action_spec: expected the checkpoint's {self.policy.action_dim} numbers, found {dims} of "
                f"{', '.join(f'{name} ({spec.dims})' for name, spec in found.items())}"
            )
        return found

    # What the harness asks for, at the beginning of a run

    def get_action_spec(self) -> dict[str, DimSpec]:
        return self.action_spec

    def get_observation_spec(self) -> dict[str, DimSpec]:
        cameras = [self.camera_map.get(camera, camera) for camera in self.policy.camera_names]
        spec = dict.fromkeys(cameras, IMAGE_RGB) | {"language": LANGUAGE}
        if not self.zero_state:
            dim = self.policy.state_dim
            fitting = frozenset(known.format for known in KNOWN_SPECS if known.dims in (0, dim))
            spec["state"] = DimSpec("state", dim, "qpos", accepts=fitting)
        return spec

    def get_observation_params(self) -> dict[str, Any]:
        params = {} if self.zero_state else {"send_state": True}
        if len(self.policy.camera_names) > 1:
            params["send_wrist_image"] = True
        return params | self.observation_params

    # An episode

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext):
        task = json.dumps(config.get("task", {}), sort_keys=True, default=str)
        noise = np.random.default_rng([self.seed, zlib.crc32(task.encode())])
        self.sessions[ctx.session_id] = Session(ActionQueue(**self.queue_options), self.policy.history, noise)
        await super().on_episode_start(config, ctx)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext):
        self.sessions.pop(ctx.session_id, None)
        await super().on_episode_end(result, ctx)

    async def on_observation(self, obs: Observation, ctx: SessionContext):
        session = self.sessions.get(ctx.session_id)
        if session is None:
            raise UserError("observation: expected EPISODE_START first, found none")
        if obs.get("episode_restart"):  # CALVIN goes on to the next instruction without a new episode
            session.restart()
        asked = session.queue.needs_chunk()
        if session.frames.maxlen > 1 or asked:
            session.frames.append(self._images(obs))
        if asked:
            # translated here, so that an observation that is wrong fails alone and not the batch that it is in
            await super().on_observation(self._translate(obs, session), ctx)
        else:
            await ctx.send_action({"actions": session.next_action()})

    def predict_batch(self, obs_batch: list[Observation], ctx_batch: list[SessionContext]) -> list[Action]:
        """Translated observations -> the first action (A,) of each one's chunk, and the reasoning."""
        shape = (self.policy.chunk_size, self.policy.action_dim)
        sessions = [self.sessions[ctx.session_id] for ctx in ctx_batch]
        chunks, texts = self.policy.predict(
            [{"images": obs["images"], "qpos": obs["qpos"]} for obs in obs_batch],
            [obs["instruction"] for obs in obs_batch],
            self.max_new_tokens,
            unnorm_key=self.unnorm_key,
            reasoning=self.reasoning,
            noise=np.stack([session.noise.standard_normal(shape, np.float32) for session in sessions]),  # (B, T, A)
        )
        actions = []
        for session, chunk, text in zip(sessions, chunks, texts):
            session.queue.push(chunk)
            actions.append({"actions": session.next_action(), "reasoning": text})
        return actions

    # A benchmark's observation -> the policy's

    def _images(self, obs: Observation) -> dict[str, np.ndarray]:
        """The checkpoint's cameras (H, W, 3)."""
        found, cameras = obs.get("images") or {}, self.policy.camera_names
        others = [key for key in found if key not in cameras]
        keys = self.camera_map
        if not keys and len(found) == len(cameras):
            keys = {camera: camera if camera in found else others.pop(0) for camera in cameras}
            if keys != self.guessed:
                self.guessed = keys
                logger.warning(
                    "The benchmark's images are taken in order: %s; camera_map says it otherwise",
                    ", ".join(f"{camera} = {key}" for camera, key in keys.items()),
                )
        if not keys or any(key not in found for key in keys.values()):
            wanted = [f"{camera} ({key})" if key != camera else camera for camera, key in keys.items()] or cameras
            raise UserError(
                f"observation: images: the checkpoint expects {', '.join(wanted)}, the benchmark sends "
                f"{', '.join(found) or 'none'}; camera_map tells which is which"
            )
        return {camera: np.asarray(found[key]) for camera, key in keys.items()}

    def _state(self, obs: Observation) -> np.ndarray:
        """(S,) float32"""
        dim = self.policy.state_dim
        if self.zero_state:
            return np.zeros(dim, np.float32)
        keys = self.state_keys or [key for key in STATE_KEYS if key in obs][:1] or [STATE_KEYS[0]]
        missing = [key for key in keys if obs.get(key) is None]
        if missing:
            raise UserError(
                f"observation: {', '.join(missing)}: the checkpoint expects a state of {dim} numbers, the benchmark "
                f"sends {', '.join(obs)}; state_keys names it"
            )
        parts = [list(obs[key].values()) if isinstance(obs[key], dict) else [obs[key]] for key in keys]
        state = np.concatenate([np.ravel(np.asarray(value, np.float32)) for part in parts for value in part])
        if len(state) != dim:
            raise UserError(
                f"observation: {', '.join(keys)}: the checkpoint expects a state of {dim} numbers, the benchmark sends "
                f"{len(state)}"
            )
        return state

    def _translate(self, obs: Observation, session: Session) -> dict:
        """`{"images": {camera: (H, W, 3), or (F, H, W, 3)}, "qpos": (S,), "instruction": str}`, checked."""
        frames = list(session.frames)
        frames = [frames[0]] * (self.policy.history - len(frames)) + frames  # before the first one there was none
        images = {camera: np.stack([frame[camera] for frame in frames]) for camera in self.policy.camera_names}
        if self.policy.history == 1:
            images = {camera: image[0] for camera, image in images.items()}
        instruction = obs.get("task_description")
        if not isinstance(instruction, str) or not instruction:
            raise UserError(f"observation: task_description: expected the instruction, found {instruction!r}")
        translated = {"images": images, "qpos": self._state(obs)}
        self.policy.check(translated)
        if self.integrates and session.command is None:
            session.command = DeltaIntegrator(translated["qpos"])
        return translated | {"instruction": instruction}


if __name__ == "__main__":
    # The harness's default is all interfaces; here whoever wants that says so: --host 0.0.0.0
    sys.argv.insert(1, "--host=127.0.0.1")
    try:
        run_command(lambda: run_server(DexVLAModelServer))
    except BaseExceptionGroup as group:
        if not group.subgroup(lambda error: isinstance(error, OSError) and error.errno == errno.EADDRINUSE):
            raise
        raise SystemExit("error: --port: expected a free port, found one in use") from None
