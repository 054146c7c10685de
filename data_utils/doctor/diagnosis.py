"""A finding and its kind."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields

from ..errors import Finding

KINDS = {
    "unreadable": "Files that cannot be read",
    "layout": "Wrong or missing datasets, shapes, types, lengths",
    "numbers": "Numbers that are not finite",
    "cameras": "Missing or broken cameras",
    "frames": "Frames that cannot be decoded",
    "texts": "Instructions and reasonings",
    "range": "Dimensions that hardly move",
    "outlier": "Values far from all others",
    "jump": "Jumps",
    "lag": "Actions and states out of step",
    "black": "Black frames",
    "duplicates": "Repeated frames",
    "camera order": "Cameras that look exchanged",
    "short": "Short episodes",
    "mixed": "Episodes that differ from the others",
    "stats": "Statistics that do not fit",
}


@dataclass(frozen=True)
class Diagnosis(Finding):
    """A finding of one of KINDS."""

    kind: str = ""

    @classmethod
    def of(cls, finding: Finding, kind: str) -> "Diagnosis":
        """What start-up found, as a diagnosis. Unreadable files and numbers that are not finite have their own kind."""
        if finding.expected.startswith("a readable"):
            kind = "unreadable"
        elif finding.expected == "a finite number":
            kind = "numbers"
        return cls(**{field.name: getattr(finding, field.name) for field in fields(Finding)}, kind=kind)


def warning(kind: str, path: str, where: str, expected: str, found: str, advice: str = "") -> Diagnosis:
    return Diagnosis(path, where, expected, found, advice, is_error=False, kind=kind)


def common_folder(paths: Iterable[str]) -> str:
    """The folder that all episodes lie in: what a finding about the dataset names."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
