from collections.abc import Callable
from dataclasses import dataclass


class UserError(ValueError):
    """Something a user can put right: shown as one message, without a traceback."""


class DatasetError(UserError):
    """A dataset that cannot be trained on. The message names file, dataset, frame, what was expected and found."""


def run_command(main: Callable[[], int | None]):
    """Runs a command and exits: with one line for what its user can put right, without a traceback for Ctrl-C."""
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what a shell makes of SIGINT


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or looks wrong, in a dataset. As text it is one line.

    path: of the episode (or folder). where: dataset and frame in it. advice: what to do about it.
    is_error: training on it is impossible or senseless; otherwise it is a warning.
    """

    path: str
    where: str
    expected: str
    found: str
    advice: str = ""
    is_error: bool = True

    def __str__(self) -> str:
        where = f" {self.where}:" if self.where else ""
        advice = f"; {self.advice}" if self.advice else ""
        return " ".join(f"{self.path}:{where} expected {self.expected}, found {self.found}{advice}".split())
