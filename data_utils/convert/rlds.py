"""RLDS datasets (tensorflow-datasets folders) -> HDF5 episodes, without TensorFlow."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ..errors import DatasetError
from .files import Report, check_places, partial_file, size_of
from .hdf5_files import write_hdf5_episode
from .rlds_features import Feature, RldsFeatures, Shard, find_dataset, find_shards
from .tfrecord import Record, parse_example, records

STATE_NAMES = ("state", "proprio", "robot_state", "qpos", "joint_position", "joint_positions")
ACTION_NAMES = ("action", "actions")
LANGUAGE_NAMES = ("language_instruction", "natural_language_instruction", "instruction", "task")
NUMBERS = "numbers of every step"


@dataclass(frozen=True)
class Mapping:
    """Which features become what of an HDF5 episode."""

    qpos: list[Feature]
    action: list[Feature]
    cameras: dict[str, Feature]
    language: Feature
    reasoning: Feature | None

    @classmethod
    def of(
        cls,
        features: RldsFeatures,
        qpos: list[str] | None = None,
        action: list[str] | None = None,
        cameras: dict[str, str] | None = None,
        language: str | None = None,
        reasoning: str | None = None,
    ) -> "Mapping":
        """From (short) names of features; what is None is guessed.

        Raises:
            UserError: for a name that fits no feature or several, and when there is nothing to guess from.
        """

        def numbers(flag: str, names: list[str] | None, usual: tuple[str, ...]) -> list[Feature]:
            if not names:
                return [features.guess(flag, usual, NUMBERS, lambda feature: feature.is_number)]
            return [features.one(flag, name, NUMBERS, lambda feature: feature.is_number) for name in names]

        def is_text(feature: Feature) -> bool:
            return feature.is_text

        if cameras:
            what = "images of every step, 8 bits, colour"
            chosen = {
                name: features.one("--camera", path, what, lambda feature: feature.is_rgb)
                for name, path in cameras.items()
            }
        else:
            chosen = _all_cameras(features)
        return cls(
            qpos=numbers("--qpos", qpos, STATE_NAMES),
            action=numbers("--action", action, ACTION_NAMES),
            cameras=chosen,
            language=features.one("--language", language, "a text", is_text)
            if language
            else features.guess("--language", LANGUAGE_NAMES, "a text", is_text),
            reasoning=features.one("--reasoning", reasoning, "a text", is_text) if reasoning else None,
        )

    def __str__(self) -> str:
        lines = {
            "qpos": " + ".join(map(str, self.qpos)),
            "action": " + ".join(map(str, self.action)),
            **{f"camera {name}": str(feature) for name, feature in self.cameras.items()},
            "language": str(self.language),
            **({"reasoning": str(self.reasoning)} if self.reasoning else {}),
        }
        return "\n".join(f"{name} <- {value}" for name, value in lines.items())

    def used(self) -> set[str]:
        features = [*self.qpos, *self.action, *self.cameras.values(), self.language, self.reasoning]
        return {feature.path for feature in features if feature}


def _all_cameras(features: RldsFeatures) -> dict[str, Feature]:
    found = [feature for feature in features.features.values() if feature.is_rgb]
    short = [feature.path.rpartition("/")[2] for feature in found]
    return {
        name if short.count(name) == 1 else feature.path.replace("/", "_"): feature
        for name, feature in zip(short, found)
    }


class RldsEpisode:
    """One record: an episode of N steps, in memory as it was stored; images are decoded one by one."""

    def __init__(self, record: Record, mapping: Mapping):
        self.record = record
        self.values = parse_example(record)
        self.mapping = mapping
        first = mapping.action[0]
        stored = self._stored(first)
        per_step = first.size if first.encoding == "none" else 1
        self.length = len(stored) // max(per_step, 1)
        if not self.length:
            raise self._error(first, "values of at least one step", f"{len(stored)} values")

    def _error(self, feature: Feature, expected: str, found: object) -> DatasetError:
        where = f"{self.record.path}: record {self.record.number}: {feature.path}"
        return DatasetError(f"{where}: expected {expected}, found {found}")

    def _stored(self, feature: Feature):
        if feature.kind == "tensor" and min(feature.shape, default=0) < 0:
            raise self._error(feature, "a fixed shape", list(feature.shape))
        return self.values.get(feature.path, [])

    def _step_values(self, feature: Feature, as_type: str) -> Iterator[np.ndarray]:
        """Each step's tensor, in `feature.shape`."""
        stored = self._stored(feature)
        packed = feature.encoding != "none"
        expected = self.length if packed else self.length * feature.size
        if len(stored) != expected:
            raise self._error(feature, f"{expected} values for {self.length} steps", len(stored))
        for t in range(self.length):
            if packed:
                values = self._unpacked(feature, t, stored[t])
            else:
                values = np.array(stored[t * feature.size : (t + 1) * feature.size])
            if values.size != feature.size:
                raise self._error(feature, f"{feature.size} values at step {t}", values.size)
            yield values.astype(as_type).reshape(feature.shape)

    def _unpacked(self, feature: Feature, step: int, data: bytes) -> np.ndarray:
        try:
            return np.frombuffer(zlib.decompress(data) if feature.encoding == "zlib" else data, feature.dtype)
        except (zlib.error, ValueError) as error:
            raise self._error(feature, f"{feature.dtype} values ({feature.encoding}) at step {step}", error) from error

    def numbers(self, features: list[Feature]) -> np.ndarray:
        """(N, D) float32: the features' values side by side."""
        columns = []
        for feature in features:
            values = np.stack([step.reshape(-1) for step in self._step_values(feature, "float64")]).astype(np.float32)
            if not np.isfinite(values).all():
                step, column = np.argwhere(~np.isfinite(values))[0]
                raise self._error(feature, f"a finite number at step {step}, dimension {column}", values[step, column])
            columns.append(values)
        return np.concatenate(columns, axis=1)

    def texts(self, feature: Feature) -> list[str]:
        """One text per step; a text of the whole episode is repeated."""
        stored = list(self._stored(feature))
        if len(stored) != (self.length if feature.per_step else 1):
            raise self._error(feature, f"{self.length if feature.per_step else 1} texts", len(stored))
        try:
            texts = [text.decode("utf-8") for text in stored]
        except (UnicodeDecodeError, AttributeError) as error:
            raise self._error(feature, "UTF-8 text", error) from error
        return texts if feature.per_step else texts * self.length

    def instruction(self) -> str:
        texts = self.texts(self.mapping.language)
        for step, text in enumerate(texts):
            if text != texts[0]:
                expected = "one text for the whole episode, since HDF5 keeps one instruction"
                found = f'"{texts[0]}" at step 0 and "{text}" at step {step}'
                raise self._error(self.mapping.language, expected, found)
        return texts[0]

    def frames(self, feature: Feature) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB for every step."""
        if feature.kind == "tensor":
            yield from self._step_values(feature, "uint8")
            return
        stored = self._stored(feature)
        if len(stored) != self.length:
            raise self._error(feature, f"{self.length} images", len(stored))
        for step, data in enumerate(stored):
            pixels = np.frombuffer(data, np.uint8) if isinstance(data, bytes) and data else None
            image = None if pixels is None else cv2.imdecode(pixels, cv2.IMREAD_COLOR_RGB)
            if image is None:
                raise self._error(feature, f"an encoded image at step {step}", "something else")
            yield image


def convert_rlds(
    source: Path,
    out: Path,
    *,
    split: str | None = None,
    sim: bool = True,
    jpeg_quality: int | None = None,
    **names,
) -> Report:
    """Writes OUT/<split>/episode_000012.hdf5 for every episode of a tensorflow-datasets folder.

    Args:
        split: one of the dataset's; None takes all. sim: the episodes' attribute, see `Episode`.
        jpeg_quality: of JPEG frames, 1..100; None stores raw ones.
        names: `qpos`, `action`, `cameras`, `language`, `reasoning` of `Mapping.of`.

    Raises:
        UserError: for names that fit no feature. DatasetError: naming file and record that are damaged.
    """
    check_places(source, out)
    folder = find_dataset(source)
    features = RldsFeatures(folder)
    mapping = Mapping.of(features, **names)
    print(mapping)
    if left_out := [path for path in features.features if path not in mapping.used()]:
        print(f"left out: {', '.join(left_out)}")
    shards = find_shards(folder, split)
    report = Report(out, before=size_of(shard.path for shard in shards))
    known = [shard.records for shard in shards]
    number: dict[str, int] = {}  # split -> episodes so far
    with tqdm(total=None if None in known else sum(known), desc="converting", unit="episode") as bar:
        for shard in shards:
            for record in _records_of(shard):
                index = number[shard.split] = number.get(shard.split, -1) + 1
                target = out / shard.split / f"episode_{index:06d}.hdf5"
                if target.exists():
                    report.skipped += 1
                else:
                    _write(record, mapping, target, sim, jpeg_quality)
                    report.converted += 1
                report.after += target.stat().st_size
                bar.update()
    return report


def _records_of(shard: Shard) -> Iterator[Record]:
    count = 0
    for record in records(shard.path):
        yield record
        count += 1
    if shard.records is not None and count != shard.records:
        raise DatasetError(
            f"{shard.path}: expected {shard.records} records, as dataset_info.json says, found {count}; copy it again"
        )


def _write(record: Record, mapping: Mapping, target: Path, sim: bool, jpeg_quality: int | None):
    episode = RldsEpisode(record, mapping)
    with partial_file(target) as unfinished:
        write_hdf5_episode(
            unfinished,
            source=f"{record.path}: record {record.number}",
            action=episode.numbers(mapping.action),
            qpos=episode.numbers(mapping.qpos),
            language=episode.instruction(),
            reasonings=episode.texts(mapping.reasoning) if mapping.reasoning else None,
            sim=sim,
            cameras={name: episode.frames(feature) for name, feature in mapping.cameras.items()},
            jpeg_quality=jpeg_quality,
        )
