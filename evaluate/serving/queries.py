"""A client's message -> a query that the policy can answer, or a refusal that names the field."""

import logging
import re
from dataclasses import dataclass

import numpy as np

from data_utils import UserError
from evaluate.wire import RequestError
from qwen2_vla import Qwen2VLAPolicy

MAX_PROMPT, MAX_SESSION = 2000, 200  # characters
FIELDS = ("state", "images", "prompt", "unnorm_key", "prefix", "frozen", "session")
CONTROL_TOKEN = re.compile(r"<\|[^|]*\|>")  # an image token in the prompt would count as one more image

logger = logging.getLogger("evaluate.serve")


@dataclass
class Query:
    """What `Qwen2VLAPolicy.predict` takes. `prefix` (n, A) float32 in robot units; `reasoning` None: generated."""

    observation: dict
    instruction: str
    unnorm_key: str | None = None
    prefix: np.ndarray | None = None
    frozen: int = 0
    session: str | None = None
    reasoning: str | None = None


class RequestReader:
    """Turns messages into queries.

    Args:
        policy: knows cameras, shapes and robots.
        max_image: (width, height) in pixels; upright images may have as much.
        prompt, unnorm_key: the instruction and the robot for clients that send none (openpi's ALOHA robots do not).
    """

    def __init__(
        self,
        policy: Qwen2VLAPolicy,
        max_image: tuple[int, int] = (1920, 1080),
        prompt: str | None = None,
        unnorm_key: str | None = None,
    ):
        self.policy = policy
        self.max_image = sorted(max_image)
        self.prompt = prompt
        self.unnorm_key = unnorm_key
        self._ignored = set()

    def read(self, message: dict) -> Query:
        """Checks a message: `state` (S,) in robot units, `images` {camera: (H, W, 3) or (3, H, W) uint8 RGB; with
        history (F, …)}, `prompt`; optionally `unnorm_key`, `prefix` (n, A) with `frozen`, and `session`.

        Raises:
            RequestError: 400, or 413 for images above the limit.
        """
        self._note_ignored(message)
        images = message.get("images")
        if not isinstance(images, dict):
            names = ", ".join(self.policy.camera_names)
            raise RequestError(400, f"images: expected a map of cameras ({names}) to images, found {_kind(images)}")
        observation = {
            "images": images
            | {name: self._image(images[name], name) for name in self.policy.camera_names if name in images},
            "qpos": _float32(numbers(message.get("state"), "state")),
        }
        try:
            self.policy.check(observation)
        except UserError as error:
            text = str(error).removeprefix("observation: ")
            raise RequestError(400, re.sub(r"^qpos\b", "state", text)) from None
        prefix, frozen = self._prefix(message.get("prefix"), message.get("frozen"))
        return Query(
            observation,
            self._instruction(message.get("prompt", self.prompt)),
            self._unnorm_key(message.get("unnorm_key", self.unnorm_key)),
            prefix,
            frozen,
            self._session(message.get("session")),
        )

    def _image(self, value, camera: str) -> np.ndarray:
        """(…, H, W, 3) or (…, 3, H, W) -> (…, H, W, 3) uint8."""
        field = f"images[{camera!r}]"
        image = numbers(value, field)
        if isinstance(value, list):  # JSON knows no uint8
            if image.dtype.kind not in "iu" or image.size and (image.min() < 0 or image.max() > 255):
                raise RequestError(400, f"{field}: expected whole numbers from 0 to 255")
            image = image.astype(np.uint8)
        if image.ndim >= 3 and image.shape[-1] != 3 and image.shape[-3] == 3:
            image = np.ascontiguousarray(np.moveaxis(image, -3, -1))
        sides = sorted(image.shape[-3:-1])  # shorter, longer
        if image.ndim >= 3 and (sides[0] > self.max_image[0] or sides[1] > self.max_image[1]):
            limit = f"{self.max_image[1]}x{self.max_image[0]}"
            found = f"{image.shape[-2]}x{image.shape[-3]}"
            raise RequestError(413, f"{field}: expected at most {limit} pixels (--max_image), found {found}")
        if image.ndim >= 3 and not sides[0]:
            raise RequestError(400, f"{field}: expected an image, found none in shape {image.shape}")
        return image

    def _prefix(self, prefix, frozen) -> tuple[np.ndarray | None, int]:
        if prefix is None and (frozen is None or isinstance(frozen, int) and frozen == 0):
            return None, 0
        if prefix is None or frozen is None:
            missing = "prefix" if prefix is None else "frozen"
            raise RequestError(400, f"{missing}: expected it, because prefix and frozen come together, found none")
        prefix = _float32(numbers(prefix, "prefix"))  # (n, A)
        chunk, dim = self.policy.chunk_size, self.policy.action_dim
        if prefix.ndim != 2 or len(prefix) > chunk or prefix.shape[1] != dim:
            raise RequestError(
                400, f"prefix: expected shape (n, {dim}) with n up to {chunk}, found {tuple(prefix.shape)}"
            )
        if not np.isfinite(prefix).all():
            step, joint = np.argwhere(~np.isfinite(prefix))[0]
            raise RequestError(400, f"prefix[{step}][{joint}]: expected finite numbers, found {prefix[step, joint]}")
        if isinstance(frozen, bool) or not isinstance(frozen, int) or not 0 <= frozen <= len(prefix):
            raise RequestError(400, f"frozen: expected 0 to {len(prefix)}, the steps of prefix, found {frozen!r:.80}")
        return (prefix, frozen) if len(prefix) else (None, 0)

    def _instruction(self, prompt) -> str:
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError(400, f"prompt: expected the task in words, found {_kind(prompt)}")
        if len(prompt) > MAX_PROMPT:
            raise RequestError(400, f"prompt: expected at most {MAX_PROMPT} characters, found {len(prompt)}")
        if not _encodable(prompt):
            raise RequestError(400, "prompt: expected text, found half a surrogate pair")
        token = CONTROL_TOKEN.search(prompt)
        if token:
            raise RequestError(400, f"prompt: expected plain words, found the control token {token.group():.40}")
        return prompt

    def _unnorm_key(self, key) -> str | None:
        known = self.policy.unnorm_keys
        if key is None and len(known) <= 1 or isinstance(key, str) and key in known:
            return key
        raise RequestError(400, f"unnorm_key: expected one of {', '.join(known)}, found {_kind(key)}")

    def _session(self, session) -> str | None:
        if session is None or isinstance(session, str) and len(session) <= MAX_SESSION:
            return session
        raise RequestError(400, f"session: expected up to {MAX_SESSION} characters, found {_kind(session)}")

    def _note_ignored(self, message: dict):
        """Extra keys are no error, since robots send what they have; the log names each once."""
        for key in message.keys() - set(FIELDS) - self._ignored:
            if len(self._ignored) < 100:
                self._ignored.add(key)
                logger.warning("requests hold %.80r, which is ignored; known: %s", key, ", ".join(FIELDS))


def numbers(value, field: str) -> np.ndarray:
    """An array, or nested lists, of numbers.

    Raises:
        RequestError: 400.
    """
    if not isinstance(value, (np.ndarray, list)):
        raise RequestError(400, f"{field}: expected an array of numbers, found {_kind(value)}")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError):
        raise RequestError(400, f"{field}: expected an array of numbers, found lists of different lengths") from None
    if array.dtype.kind not in "iuf":
        found = "something else in it" if isinstance(value, list) else f"dtype {array.dtype}"
        raise RequestError(400, f"{field}: expected an array of numbers, found {found}")
    return array


def _float32(array: np.ndarray) -> np.ndarray:
    """What is beyond float32 becomes infinite, and is refused as that."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _kind(value) -> str:
    if value is None:
        return "none"
    return f"{value!r:.80}" if isinstance(value, (str, int, float)) else type(value).__name__


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
