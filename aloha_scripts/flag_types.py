"""What the simulator's commands accept as values of their flags; argparse shows the messages with the flag's name."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable


def integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A parser of integers from `lowest` to `highest`, if there is such a limit."""
    expected = f"an integer >= {lowest}" if highest is None else f"an integer from {lowest} to {highest}"

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest or (highest is not None and int(text) > highest):
            raise ArgumentTypeError(f"expected {expected}, found {text!r}")
        return int(text)

    return parse


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return number


def image_size(text: str) -> tuple[int, int]:
    """ "(width,height)" in pixels, within what the simulator can render."""
    match = re.fullmatch(r"\(?\s*(\d+)\s*,\s*(\d+)\s*\)?", text)
    size = tuple(int(number) for number in match.groups()) if match else (0, 0)
    if not (16 <= size[0] <= 640 and 16 <= size[1] <= 480):  # 640x480 is the size of the models' render buffer
        raise ArgumentTypeError(f'expected "(width,height)" from (16,16) to (640,480), found {text!r}')
    return size
