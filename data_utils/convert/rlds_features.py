"""What an RLDS dataset (a tensorflow-datasets folder) says of itself: features and files, read without TensorFlow."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError, UserError

STEPS = "steps"
SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<number>\d+)-of-(?P<count>\d+)")


@dataclass(frozen=True)
class Feature:
    """A leaf of features.json.

    path: with slashes, `steps/observation/image`. kind: image, text, tensor, or what else the file calls it.
    shape: of one step's value; -1 where it varies. encoding: of a tensor: none, bytes or zlib.
    per_step: whether each step has a value, or the episode has one.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    per_step: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_number(self) -> bool:
        return self.kind == "tensor" and self.dtype != "string" and self.per_step

    @property
    def is_text(self) -> bool:
        return self.kind == "text" or (self.kind == "tensor" and self.dtype == "string" and self.size == 1)

    @property
    def is_rgb(self) -> bool:
        if not self.per_step or self.dtype != "uint8":
            return False
        if self.kind == "image":  # the decoder makes three channels of one, or of a number that is left open
            return not self.shape or self.shape[-1] in (3, 1, -1)
        return self.kind == "tensor" and len(self.shape) == 3 and self.shape[2] == 3

    def __str__(self) -> str:
        return f"{self.path} ({self.kind} {self.dtype}{list(self.shape) if self.shape else ''})".replace(" )", ")")


class RldsFeatures:
    """The features of a dataset by their paths. A name may be short, `image`, where that is not ambiguous."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "features.json"
        try:
            described = json.loads(path.read_text())
            self.features = {feature.path: feature for feature in _leaves(described, "", (), False)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = "the features of a tensorflow-datasets folder"
            raise DatasetError(f"{path}: expected {expected}, found something else ({error!r})") from error
        if not any(feature.per_step for feature in self.features.values()):
            raise DatasetError(f"{path}: expected an RLDS dataset, with features {STEPS}/…, found {self.listing()}")

    def listing(self) -> str:
        return ", ".join(map(str, self.features.values())) or "none"

    def named(self, name: str) -> list[Feature]:
        """The feature with that path, or all whose path ends with it."""
        if name in self.features:
            return [self.features[name]]
        return [feature for path, feature in self.features.items() if path.endswith(f"/{name}")]

    def one(self, flag: str, name: str, wanted: str, fits: Callable[[Feature], bool]) -> Feature:
        """The one feature called `name` for which `fits`.

        Raises:
            UserError: naming the flag and all features, when there is none or more than one.
        """
        found = self.named(name)
        if len(found) != 1:
            problem = " and ".join(feature.path for feature in found) or "none"
            raise UserError(
                f"{flag} {name}: expected the name of one feature of {self.folder}, found {problem}; "
                f"its features: {self.listing()}"
            )
        if not fits(found[0]):
            raise UserError(f"{flag} {name}: expected {wanted}, found {found[0]}; the features: {self.listing()}")
        return found[0]

    def guess(self, flag: str, names: tuple[str, ...], wanted: str, fits: Callable[[Feature], bool]) -> Feature:
        """The first of the usual `names` that stands for one fitting feature."""
        for name in names:
            fitting = [feature for feature in self.named(name) if fits(feature)]
            if len(fitting) == 1:
                return fitting[0]
        raise UserError(
            f"{flag}: expected {wanted} called {' or '.join(names)} in {self.folder}, found no single one; "
            f"name it with {flag} FEATURE; the features: {self.listing()}"
        )


def _leaves(described: dict, path: str, outer_shape: tuple[int, ...], per_step: bool) -> Iterator[Feature]:
    if "featuresDict" in described:
        for name, feature in described["featuresDict"].get("features", {}).items():
            yield from _leaves(feature, f"{path}/{name}" if path else name, outer_shape, per_step)
        return
    if "sequence" in described:
        inner = described["sequence"]
        if path == STEPS:
            yield from _leaves(inner["feature"], path, (), True)
        else:
            yield from _leaves(inner["feature"], path, (*outer_shape, int(inner.get("length", -1))), per_step)
        return
    kind = next(key for key in described if key not in ("pythonClassName", "description"))
    content = described[kind] or {}
    shape = content.get("shape", {}).get("dimensions", []) if isinstance(content, dict) else []
    yield Feature(
        path,
        kind,
        (*outer_shape, *(int(size) for size in shape)),
        content.get("dtype") or ("uint8" if kind == "image" else "string" if kind == "text" else ""),
        content.get("encoding", "none"),
        per_step,
    )


@dataclass(frozen=True)
class Shard:
    """One file of a split; `records` is how many it should hold, if the dataset says so."""

    path: Path
    split: str
    number: int
    records: int | None


def find_dataset(source: Path) -> Path:
    """The folder with features.json: `source`, or the only one below it.

    Raises:
        DatasetError: when there is none or more than one, or its files are no TFRecords.
    """
    found = sorted(path.parent for path in source.rglob("features.json"))
    if source in found:
        return source
    if len(found) != 1:
        what = ", ".join(map(str, found[:10])) or "none"
        raise DatasetError(f"SRC {source}: expected one folder with features.json (tensorflow-datasets), found {what}")
    return found[0]


def find_shards(folder: Path, split: str | None = None) -> list[Shard]:
    """The files of one split, or of all, in order.

    Raises:
        DatasetError: when there is no such split, a file is missing, or the format is another.
    """
    info = _dataset_info(folder)
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise DatasetError(f"{folder / 'dataset_info.json'}: fileFormat: expected tfrecord, found {info['fileFormat']}")
    lengths = {s.get("name"): [int(n) for n in s.get("shardLengths", [])] for s in info.get("splits", [])}
    matches = sorted(
        ((match, path) for path in folder.iterdir() if (match := SHARD.fullmatch(path.name))),
        key=lambda pair: (pair[0]["split"], int(pair[0]["number"])),
    )
    splits = list(dict.fromkeys(match["split"] for match, _ in matches))
    if not splits or (split and split not in splits):
        wanted = f"files *-{split or 'SPLIT'}.tfrecord-NUMBER-of-COUNT"
        raise DatasetError(f"{folder}: --split: expected {wanted}, found the splits {', '.join(splits) or '(none)'}")
    shards = []
    for name in [split] if split else splits:
        files = {int(match["number"]): (path, int(match["count"])) for match, path in matches if match["split"] == name}
        counts = {count for _, count in files.values()}
        if len(counts) > 1 or sorted(files) != list(range(min(counts))):
            missing = sorted(set(range(max(counts))) - set(files))
            raise DatasetError(
                f"{folder}: split {name}: expected {max(counts)} files, found {len(files)}; "
                f"missing are those numbered {missing[:10]}: download them, or move the others to a folder of their own"
            )
        known = lengths.get(name, [])
        for number, (path, count) in sorted(files.items()):
            shards.append(Shard(path, name, number, known[number] if len(known) == count else None))
    return shards


def _dataset_info(folder: Path) -> dict:
    path = folder / "dataset_info.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise DatasetError(f"{path}: expected JSON, found {error}") from error
