"""A checkpoint folder -> robot observations in, un-normalised action chunks out."""

import os
from collections.abc import Mapping

import cv2
import numpy as np
import torch
from safetensors import SafetensorError

from data_utils import (
    Qwen2VLADataCollatorForSupervisedDataset,
    center_crop,
    load_robot_stats,
    normalize_action,
    normalize_state,
    unnormalize_action,
)
from data_utils.errors import UserError
from data_utils.normalization import STATS_JSON, STATS_PKL, check_stats

from .configuration_qwen2_vla import Qwen2VLAConfig
from .loading import load_model, load_processor
from .modeling_qwen2_vla import Qwen2VLForConditionalGenerationForVLA
from .observations import as_array, as_float32, check_observation, is_count, kind_of, one_each, plain_texts
from .processing_qwen2_vla import ANSWER_MARK, END, Qwen2VLAProcess

TOKEN_STEP = 32  # prompts are padded to a multiple of it on CUDA, so that few lengths are captured
MOST_DRAFTS = 1000
# of a configuration's data_config; what came later has a default
DATA_CONFIG = ("camera_names", "image_size_stable", "image_size_wrist", "use_reasoning", "delta_control")


class Qwen2VLAPolicy:
    """Acts with a trained checkpoint. The folder alone is enough: it knows cameras, image sizes and statistics.

    Args:
        stats: robot -> its statistics, as in `dataset_stats.json`. Every observation is one robot's: `unnorm_key`.

    Attributes: camera_names; chunk_size T, action_dim A, state_dim S; history, frames per camera; delta_control,
    whether actions are differences; use_reasoning; unnorm_keys, the robots it was trained on.
    """

    def __init__(
        self,
        model: Qwen2VLForConditionalGenerationForVLA,
        process: Qwen2VLAProcess,
        stats: dict[str, dict[str, np.ndarray]],
    ):
        head, data = model.config.policy_head_config, model.config.data_config
        self.model = model.eval()
        self.process = process
        self.robot_stats = stats
        self.unnorm_keys = list(stats)
        self.camera_names = process.camera_names
        self.image_size = tuple(data["image_size_stable"])
        self.history = data.get("history_images_length", 1)
        self.delta_control = data["delta_control"]
        self.use_reasoning = data["use_reasoning"]
        self.chunk_size, self.action_dim, self.state_dim = head.prediction_horizon, head.input_dim, head.state_dim
        self.collate = Qwen2VLADataCollatorForSupervisedDataset(
            process.tokenizer.pad_token_id, TOKEN_STEP if model.device.type == "cuda" else 1
        )
        self._control_tokens = list(process.tokenizer.added_tokens_encoder)
        self._drafts: dict[str, str] = {}  # instruction -> what was written to it last

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        device: str | torch.device | None = None,
        *,
        ema: bool = False,
        bits: int = 16,
        base: str | None = None,
    ) -> "Qwen2VLAPolicy":
        """Loads a checkpoint folder written by training: full, merged, or LoRA adapters (merged while loading). One of
        the reference has to be made complete first: `python -m qwen2_vla.merge --help`.

        Args:
            device: defaults to the accelerator, else the CPU.
            ema: act with the averaged weights of training with `--using_ema True`.
            bits: 4 or 8 quantises the backbone's Linear layers. base: the adapters' base model, if it has moved.

        Raises:
            UserError: when the folder lacks what acting needs, or there is no such device.
        """
        config, stats = read_settings(folder)
        if bits not in (4, 8, 16):
            raise UserError(f"bits: expected 4, 8 or 16, found {bits}")
        if ema and bits < 16:  # the average is of weights as they were trained
            raise UserError(
                f"bits {bits}: expected 16 with averaged weights; python -m qwen2_vla.merge {folder} --output FOLDER "
                "--ema makes a plain folder of them"
            )
        device = _device(device)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        try:
            model = load_model(folder, dtype=dtype, ema=ema, bits=bits, compute_dtype=dtype, device=device, base=base)
        except UserError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"checkpoint {folder}: expected whole weights of its config.json, found {error}") from error
        model = model.to(device) if bits == 16 else model  # a quantised model is where it was loaded to
        data = config.data_config
        processor = load_processor(folder, base)
        if processor.tokenizer.convert_tokens_to_ids(processor.image_token) != config.image_token_id:
            raise UserError(  # transformers makes an empty one where there are no files of it
                f"checkpoint {folder}: expected its tokenizer (tokenizer.json), found none that knows "
                f"{processor.image_token}"
            )
        process = Qwen2VLAProcess(
            processor,
            data["camera_names"],
            image_size_wrist=tuple(data["image_size_wrist"]),
            use_reasoning=data["use_reasoning"],
        )
        return cls(model, process, stats)

    @property
    def stats(self) -> dict[str, np.ndarray]:
        """Statistics of the robot, if there is one only."""
        return self._stats(None)

    def metadata(self) -> dict:
        """What a client has to know, as JSON has it."""
        return {
            "camera_names": self.camera_names,
            "image_size": list(self.image_size),
            "state_dim": self.state_dim,
            "action_dim": self.action_dim,
            "chunk_size": self.chunk_size,
            "history_images_length": self.history,
            "delta_control": self.delta_control,
            "use_reasoning": self.use_reasoning,
            "unnorm_keys": self.unnorm_keys,
        }

    def check(self, observation: Mapping, field: str = "observation"):
        """Raises UserError that names what is wrong with an observation, see `predict`."""
        check_observation(observation, field, self.camera_names, self.state_dim, self.history)

    def predict(
        self,
        observation: Mapping | list[Mapping],
        instruction: str | list[str],
        max_new_tokens: int = 256,
        *,
        unnorm_key: str | list[str | None] | None = None,
        reasoning: str | list[str | None] | None = None,
        prefix: np.ndarray | list[np.ndarray | None] | None = None,
        frozen: int | list[int | None] = 0,
        noise: np.ndarray | None = None,
    ) -> tuple[np.ndarray, str] | tuple[np.ndarray, list[str]]:
        """One observation, or a list of B -> what to do next.

        Args:
            observation: `{"images": {camera: (H, W, 3) uint8 RGB}, "qpos": (S,)}` in the robot's units. A policy
                trained with `--history_images_length` F > 1 takes (F, H, W, 3), the current frame last.
            instruction: the task in words. For B observations, this and what follows is one for all or a list of B.
            unnorm_key: which robot it is, for a checkpoint trained on several.
            reasoning: a sub-step taken as it is instead of being written, which saves the decoding; "" for none. A
                policy trained without reasoning needs none.
            prefix: (n, A) actions as they are returned, n <= T: what the chunk should begin with, usually the rest of
                the one being executed. The first `frozen` of them are kept exactly, the others with decreasing weight.
            noise: (T, A) or (B, T, A), standard normal: what the chunk is denoised from; drawn if None.

        Returns:
            actions (T, A) float32 in the robot's units (differences, if trained with delta_control) and the reasoning;
            for a list (B, T, A) and the B texts.

        Raises:
            UserError: naming the argument, or the field of an observation, that is missing or is not as it has to be.
        """
        if isinstance(observation, Mapping):
            noise = None if noise is None else as_array(noise, "noise")[None]
            actions, texts = self.predict(
                [observation], [instruction], max_new_tokens, unnorm_key=[unnorm_key], reasoning=[reasoning],
                prefix=[prefix], frozen=[frozen], noise=noise,
            )  # fmt: skip
            return actions[0], texts[0]
        if not isinstance(observation, list | tuple) or not observation:
            raise UserError(
                f"observation: expected a dict with images and qpos or a list of them, found {kind_of(observation)}"
            )
        if not is_count(max_new_tokens, least=1):
            raise UserError(f"max_new_tokens: expected a positive number, found {max_new_tokens!r}")
        batch = len(observation)
        for i, one in enumerate(observation):
            self.check(one, "observation" if batch == 1 else f"observation {i}")
        instructions = plain_texts(instruction, "instruction", batch, self._control_tokens)
        reasonings = plain_texts(reasoning, "reasoning", batch, self._control_tokens, optional=True)
        stats = [self._stats(key) for key in one_each(unnorm_key, "unnorm_key", batch)]
        inputs = self._inputs(observation, instructions, stats)
        known, weights = self._known(one_each(prefix, "prefix", batch), one_each(frozen, "frozen", batch), stats)
        actions, written = self.model.predict_action(
            **inputs,
            tokenizer=self.process.tokenizer,
            max_new_tokens=max_new_tokens,
            answers=self._answers(reasonings),
            drafts=[self._drafts.get(text, "") for text in instructions],
            noise=None if noise is None else self._noise(noise, batch),
            known=known,
            known_weights=weights,
        )
        actions = actions.cpu().numpy()
        if len(self._drafts) > MOST_DRAFTS:
            self._drafts.clear()
        self._drafts |= {asked: text for asked, text, given in zip(instructions, written, reasonings) if given is None}
        texts = [text.removesuffix(ANSWER_MARK).removesuffix(END) for text in written]
        return np.stack([unnormalize_action(rows, one) for rows, one in zip(actions, stats)]), texts

    def _answers(self, reasonings: list[str | None]) -> list[str | None] | None:
        """As in training, without the end that follows; but a model trained without reasoning saw nothing else, and
        one in TinyVLA mode not even that."""
        if not self.use_reasoning or self.model.config.is_tinyvla:
            for text in filter(None, reasonings):
                raise UserError(f"reasoning: expected none, for the checkpoint was trained without, found {text!r:.80}")
            return None if self.model.config.is_tinyvla else [END] * len(reasonings)
        return [None if text is None else f"{text}{ANSWER_MARK}" for text in reasonings]

    def _stats(self, unnorm_key: str | None) -> dict[str, np.ndarray]:
        if unnorm_key is None and len(self.robot_stats) == 1:
            return next(iter(self.robot_stats.values()))
        if unnorm_key not in self.unnorm_keys:
            raise UserError(f"unnorm_key: expected one of {', '.join(self.unnorm_keys)}, found {unnorm_key}")
        return self.robot_stats[unnorm_key]

    def _inputs(self, observations: list[Mapping], instructions: list[str], stats: list[dict]) -> dict:
        items = [
            self.process(
                {
                    "images": [self._prepare(np.asarray(one["images"][name])) for name in self.camera_names],
                    "state": torch.from_numpy(normalize_state(np.asarray(one["qpos"], np.float32), its_stats)),
                    "raw_lang": text,
                }
            )
            for one, text, its_stats in zip(observations, instructions, stats, strict=True)
        ]
        device = self.model.device
        batch = self.collate(items)
        images = [image.to(device, non_blocking=True) for image in batch.pop("images")]
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()} | {"images": images}

    def _prepare(self, image: np.ndarray) -> torch.Tensor:
        """(H, W, 3), or (F, H, W, 3) with history -> (F, 3, h, w) uint8, as the validation set sees it."""
        frames = [cv2.resize(frame, self.image_size) for frame in (image[None] if image.ndim == 3 else image)]
        if self.model.config.data_config.get("augment", True):
            frames = [center_crop(frame) for frame in frames]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)

    def _known(
        self, prefixes: list[np.ndarray | None], frozen: list[int | None], stats: list[dict]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What is to be inpainted, (B, T, A) normalised, and with which weights (B, T)."""
        if all(prefix is None for prefix in prefixes):
            if any(frozen):
                raise UserError("frozen: expected prefix too, which it counts the actions of, found none")
            return None, None
        known = np.zeros((len(prefixes), self.chunk_size, self.action_dim), np.float32)
        weights = np.zeros(known.shape[:2], np.float32)
        for i, (prefix, fixed, its_stats) in enumerate(zip(prefixes, frozen, stats, strict=True)):
            if prefix is None:
                continue
            prefix, fixed = as_float32(as_array(prefix, "prefix")), fixed or 0
            count = len(prefix) if prefix.ndim == 2 else -1
            if not 0 <= count <= self.chunk_size or prefix.shape[1] != self.action_dim or not np.isfinite(prefix).all():
                raise UserError(
                    f"prefix: expected finite numbers (n, {self.action_dim}), n at most {self.chunk_size}, found "
                    f"shape {prefix.shape}"
                )
            if not is_count(fixed, least=0) or fixed > count:
                raise UserError(f"frozen: expected 0 to {count}, the length of prefix, found {fixed!r}")
            known[i, :count] = normalize_action(prefix, its_stats)
            weights[i, :fixed] = 1
            weights[i, fixed:count] = np.linspace(1, 0, count - fixed + 2)[1:-1]
        return self._on_device(known), self._on_device(weights)

    def _noise(self, noise: np.ndarray, batch: int) -> torch.Tensor:
        noise = as_float32(as_array(noise, "noise"))
        expected = (batch, self.chunk_size, self.action_dim)
        if noise.shape != expected or not np.isfinite(noise).all():
            raise UserError(f"noise: expected finite numbers {expected}, found shape {noise.shape}")
        return self._on_device(noise)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self.model.device)


def read_settings(folder: str) -> tuple[Qwen2VLAConfig, dict[str, dict[str, np.ndarray]]]:
    """Configuration, and statistics by robot, looked at before any weight is loaded.

    Raises:
        UserError: when the folder lacks what acting needs.
    """
    if not os.path.isdir(folder or ""):
        raise UserError(f"checkpoint: expected a folder, found none at {folder}")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError(f"checkpoint {folder}: expected config.json, found none")
    try:
        config = Qwen2VLAConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: expected a DexVLA config.json, found {error}") from error
    head = config.policy_head_config
    if head is None:
        raise UserError(f"checkpoint {folder}: expected a DexVLA checkpoint, found a model without a policy head")
    has_stats = os.path.isfile(os.path.join(folder, STATS_JSON))
    if not has_stats or not config.data_config:
        lacking = [] if has_stats else [STATS_JSON]
        lacking += [] if config.data_config else ["data_config (cameras, image sizes) in config.json"]
        raise UserError(
            f"checkpoint {folder}: expected {STATS_JSON} and data_config as training writes them, found no "
            f"{' and no '.join(lacking)}; python -m qwen2_vla.merge {folder} --output FOLDER --task_name TASK "
            f"--stats {STATS_PKL} makes a complete folder"
        )
    missing = [key for key in DATA_CONFIG if key not in config.data_config]
    if missing:
        raise UserError(f"checkpoint {folder}: config.json: data_config: expected {', '.join(missing)} too, found none")
    stats = load_robot_stats(folder)
    check_stats(stats, head.input_dim, head.state_dim, os.path.join(folder, STATS_JSON))
    return config, stats


def _device(name: str | torch.device | None) -> torch.device:
    """The one that is meant; the accelerator, else the CPU, for None."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return torch.empty(0, device=name or accelerator).device
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: PyTorch was built without it
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device: expected one of this machine, such as {accelerator}, found {name}: {reason}"
        ) from error
