"""What a policy is asked, looked at before it is used: every error names the field, what was expected and found."""

from collections.abc import Mapping

import numpy as np

from data_utils.errors import UserError


def check_observation(observation: Mapping, field: str, camera_names: list[str], state_dim: int, history: int):
    """Raises UserError unless there is an image of every camera, (H, W, 3) uint8 or (F, H, W, 3) with F = `history`
    > 1, and `qpos` (S,), finite in float32."""
    for key in ("images", "qpos"):
        if not isinstance(observation, Mapping):
            raise UserError(f"{field}: expected a dict with images and qpos, found {kind_of(observation)}")
        if key not in observation:
            raise UserError(f"{field}: expected images and qpos, found no {key}")
    images, qpos = observation["images"], as_array(observation["qpos"], f"{field}: qpos")
    if qpos.dtype.kind not in "fiu":
        raise UserError(f"{field}: qpos: expected numbers, found {qpos.dtype}")
    if qpos.shape != (state_dim,):
        raise UserError(f"{field}: qpos: expected shape ({state_dim},), found {qpos.shape} of {qpos.dtype}")
    bad = np.flatnonzero(~np.isfinite(as_float32(qpos)))
    if len(bad):
        raise UserError(f"{field}: qpos[{bad[0]}]: expected finite numbers, found {qpos[bad[0]]}")
    cameras = ", ".join(camera_names)
    if not isinstance(images, Mapping):
        raise UserError(f"{field}: images: expected a dict with cameras {cameras}, found {kind_of(images)}")
    missing = [name for name in camera_names if name not in images]
    if missing:
        found = ", ".join(map(str, images)) or "none"
        raise UserError(f"{field}: images: expected cameras {cameras}, missing {', '.join(missing)}, found {found}")
    expected = "(height, width, 3)"
    if history > 1:
        expected = f"{history} frames ({history}, height, width, 3)"
    for name in camera_names:
        image = as_array(images[name], f"{field}: images[{name!r}]")
        shape = image.shape if history > 1 else (1, *image.shape)
        if len(shape) != 4 or shape[0] != history or shape[3] != 3 or 0 in shape or image.dtype != np.uint8:
            raise UserError(
                f"{field}: images[{name!r}]: expected {expected} of uint8, found {image.shape} of {image.dtype}"
            )


def plain_texts(
    texts: str | list[str], name: str, batch: int, control_tokens: list[str], optional: bool = False
) -> list[str | None]:
    """B texts without the tokenizer's control tokens, which would be read as such."""
    texts = one_each(texts, name, batch)
    for text in texts:
        if optional and text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"{name}: expected text{' or None' if optional else ''}, found {kind_of(text)}")
        control = [token for token in control_tokens if token in text]
        if control:
            raise UserError(f"{name}: expected plain words, found the control token {control[0]}")
    return texts


def one_each(value, name: str, batch: int) -> list:
    """One value for all, or a list of B -> a list of B."""
    values = list(value) if isinstance(value, list | tuple) else [value] * batch
    if len(values) != batch:
        raise UserError(f"{name}: expected one, or a list of {batch} for as many observations, found {len(values)}")
    return values


def as_array(value, field: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of several lengths, tensors of a device
        raise UserError(f"{field}: expected an array, found {kind_of(value)} ({error})") from error


def as_float32(array: np.ndarray) -> np.ndarray:
    """Numbers that are too large become infinite, and what is no number NaN: both are looked for afterwards."""
    if array.dtype.kind not in "fiu":
        return np.full(array.shape, np.nan, np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def is_count(value, least: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least


def kind_of(value) -> str:
    return f"an empty {type(value).__name__}" if isinstance(value, list | tuple) and not value else type(value).__name__
