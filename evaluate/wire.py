"""What travels between robot and policy server: messages with numpy arrays, in msgpack or JSON. It needs no torch.

In msgpack an array is openpi's `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 14]}`. In JSON it
is nested lists, or, for images, `{"__ndarray__": "<base64 of the bytes>", "dtype": "uint8", "shape": [480, 640, 3]}`.
"""

import base64
import binascii
import json
import math

import msgpack
import numpy as np

MAX_DIMENSIONS = 8
MAX_MESSAGE = 500  # characters of a refusal, which may quote the request
NUMBER_TYPES = [f"{kind}{8 * size}" for kind in ("int", "uint") for size in (1, 2, 4, 8)]
NUMBER_TYPES += ["bool", "float16", "float32", "float64"]
# Every spelling of a plain number type; anything else (objects, text, structures) never reaches numpy
DTYPES = {spelling: np.dtype(spelling) for spelling in NUMBER_TYPES}
DTYPES |= {d.newbyteorder(order).str: d.newbyteorder(order) for d in list(DTYPES.values()) for order in "<>"}


class RequestError(Exception):
    """A request that is refused: an HTTP status, and one message that names the field."""

    def __init__(self, status: int, message: str):
        super().__init__(message[:MAX_MESSAGE])
        self.status = status


class PolicyError(Exception):
    """The server cannot be used, or refuses: one message that says why. `status` as in HTTP, 0 without an answer."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


def pack(message: dict) -> bytes:
    """A message with numpy arrays and scalars anywhere in it -> msgpack.

    Raises:
        TypeError: for what msgpack does not know, arrays of objects included.
    """
    return msgpack.packb(message, default=_pack_array)


def unpack(data: bytes) -> dict:
    """msgpack -> message; arrays are read-only views of `data`.

    Raises:
        RequestError: 400, naming the field that is broken.
    """
    try:
        message = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise RequestError(400, f"body: expected one msgpack map, found broken msgpack ({_line(error)})") from None
    return _decode_message(message, "msgpack map")


def unpack_json(data: bytes) -> dict:
    """JSON -> message; arrays are lists where they came as lists.

    Raises:
        RequestError: 400, naming the field that is broken.
    """
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"body: expected a JSON object, found broken JSON ({_line(error)})") from None
    return _decode_message(message, "JSON object")


def to_json(value):
    """The same value with arrays as nested lists and numpy scalars as numbers, for `json.dumps`."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _pack_array(value) -> dict:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.str in DTYPES:
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"expected numbers, text, lists, dictionaries or numpy arrays of numbers, found {type(value)}")


def _decode_message(message, expected: str) -> dict:
    if not isinstance(message, dict):
        raise RequestError(400, f"body: expected one {expected}, found {type(message).__name__}")
    decoded = {}
    for key, value in message.items():
        field = _text(key)
        decoded[field] = _decode(value, field)
        if isinstance(decoded[field], dict):  # cameras
            decoded[field] = {_text(name): _decode(part, f"{field}[{_text(name)!r}]") for name, part in value.items()}
    return decoded


def _decode(value, field: str):
    """The array or scalar that a map stands for; everything else as it is."""
    if not isinstance(value, dict):
        return value
    value = {_text(key): part for key, part in value.items()} if len(value) <= 4 else value
    if "__npgeneric__" in value:
        if not isinstance(value.get("data"), (bool, int, float)):
            raise RequestError(400, f"{field}: expected a numpy number, found {type(value.get('data')).__name__}")
        return value["data"]
    return _array(value, field) if "__ndarray__" in value else value


def _array(parts: dict, field: str) -> np.ndarray:
    data, dtype, shape = parts.get("data"), parts.get("dtype"), parts.get("shape")
    if isinstance(parts["__ndarray__"], str):  # JSON
        try:
            data = base64.b64decode(parts["__ndarray__"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(400, f"{field}: __ndarray__: expected base64, found {_line(error)}") from None
    if not isinstance(data, bytes):
        raise RequestError(400, f"{field}: data: expected bytes, found {type(data).__name__}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RequestError(400, f"{field}: dtype: expected a number type such as '|u1' or '<f4', found {dtype!r:.80}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise RequestError(
            400, f"{field}: shape: expected a list of up to {MAX_DIMENSIONS} sizes, 0 or more, found {shape!r:.80}"
        )
    takes = math.prod(shape) * DTYPES[dtype].itemsize
    if takes != len(data):
        raise RequestError(400, f"{field}: data: shape {shape} of {dtype} takes {takes} bytes, found {len(data)}")
    try:
        return np.ndarray(shape, DTYPES[dtype], data)
    except ValueError as error:  # sizes beyond numpy's, beside a 0
        raise RequestError(400, f"{field}: shape: {_line(error)}") from None


def _text(key) -> str:
    """Map keys come as text or bytes; others are not expected, and shown as they are."""
    return key.decode(errors="replace") if isinstance(key, bytes) else str(key)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
