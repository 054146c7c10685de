"""TFRecord files of tf.train.Example messages, read without TensorFlow.

A record is: length (uint64), masked CRC-32C of the length, bytes, masked CRC-32C of the bytes; little endian.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from ..errors import DatasetError

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
CASTAGNOLI = 0x82F63B78  # the polynomial of CRC-32C, bits reversed


@dataclass
class Record:
    """Where one record's bytes are."""

    path: Path
    number: int
    at: int
    length: int

    def read(self) -> bytes:
        """Raises DatasetError when the bytes do not match their checksum."""
        with open(self.path, "rb") as file:
            file.seek(self.at)
            data = file.read(self.length)
            (expected,) = FOOTER.unpack(file.read(FOOTER.size))
        _check(self.path, self.number, "bytes", data, expected)
        return data


def records(path: Path) -> Iterator[Record]:
    """The records of a file in order; their bytes are not read.

    Raises:
        DatasetError: naming file and record, when the file ends within one or a length is damaged.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        at = number = 0
        while at < size:
            file.seek(at)
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                raise _truncated(path, number, at + HEADER.size, size)
            length, crc = HEADER.unpack(header)
            _check(path, number, "length", header[:8], crc)
            end = at + HEADER.size + length + FOOTER.size
            if end > size:
                raise _truncated(path, number, end, size)
            yield Record(path, number, at + HEADER.size, length)
            at, number = end, number + 1


def _truncated(path: Path, number: int, end: int, size: int) -> DatasetError:
    return DatasetError(
        f"{path}: record {number}: expected it to end at byte {end}, found the file's end at {size}; copy it again"
    )


def _check(path: Path, number: int, what: str, data: bytes, expected: int):
    crc = crc32c(data)
    found = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF  # TFRecord's mask
    if found != expected:
        raise DatasetError(
            f"{path}: record {number}: {what}: expected the checksum {expected:08x}, found {found:08x}: "
            "the file is damaged; copy it again"
        )


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720).

    Strips of equal length are worked through side by side, since a loop over single bytes would take seconds per
    episode. The CRC is linear, so those of the strips are then joined in pairs: the left one's is what it would be
    after as many zero bytes as the right one is long.
    """
    if len(data) < 4:
        return _crc32c_of_few(data)
    bits = len(data).bit_length() // 2
    strip = 1 << bits  # bytes
    count = 1 << max(0, -(-len(data) // strip) - 1).bit_length()  # a power of two, to be joined in pairs
    # Without an initial value zeros in front change nothing; so they fill up, and the value goes into the data
    padded = np.zeros(strip * count, np.uint8)
    padded[len(padded) - len(data) :] = np.frombuffer(data, np.uint8)
    padded[len(padded) - len(data) :][:4] ^= 0xFF
    crcs = np.zeros(count, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(count, strip).T):
        crcs = _table()[(crcs ^ column) & 0xFF] ^ (crcs >> 8)
    while len(crcs) > 1:
        crcs = _apply(_zeros(bits), crcs[0::2]) ^ crcs[1::2]
        bits += 1
    return int(crcs[0]) ^ 0xFFFFFFFF


def _crc32c_of_few(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = int(_table()[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _table() -> np.ndarray:
    """(256,) uint32: what a byte does to the CRC."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(CASTAGNOLI), np.uint32(0))
    return table


@lru_cache(maxsize=64)
def _zeros(bits: int) -> np.ndarray:
    """(32,) uint32: what 2**bits zero bytes make of a CRC with one bit set, for each bit."""
    if bits:
        return _apply(_zeros(bits - 1), _zeros(bits - 1))
    ones = np.uint32(1) << np.arange(32, dtype=np.uint32)
    return _table()[ones & 0xFF] ^ (ones >> 8)


def _apply(matrix: np.ndarray, crcs: np.ndarray) -> np.ndarray:
    """Product over GF(2) of (32,) columns and (n,) vectors of 32 bits."""
    bits = (crcs[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(bits * matrix, axis=1)


@cache
def example_class() -> type[Message]:
    """tf.train.Example, under a name of its own, since TensorFlow may be there too. A map is, on the wire, a list of
    entries with key and value."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="dexvla_example.proto", package="dexvla", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, bool, int | str]):
        declared = file.message_type.add(name=name)
        for number, (field_name, repeated, kind) in enumerate(fields, start=1):
            new = declared.field.add(name=field_name, number=number)
            new.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            new.type = field.TYPE_MESSAGE if isinstance(kind, str) else kind
            if isinstance(kind, str):
                new.type_name = f".dexvla.{kind}"

    message("BytesList", ("value", True, field.TYPE_BYTES))
    message("FloatList", ("value", True, field.TYPE_FLOAT))
    message("Int64List", ("value", True, field.TYPE_INT64))
    kinds = {"bytes_list": "BytesList", "float_list": "FloatList", "int64_list": "Int64List"}
    message("Feature", *[(name, False, kind) for name, kind in kinds.items()])
    message("Entry", ("key", False, field.TYPE_STRING), ("value", False, "Feature"))
    message("Features", ("feature", True, "Entry"))
    message("Example", ("features", False, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("dexvla.Example"))


def parse_example(record: Record) -> dict[str, "list | Message"]:
    """Feature name -> its values: a sequence of bytes, floats or ints that can be sliced.

    Raises:
        DatasetError: when the bytes do not match their checksum, or are no tf.train.Example.
    """
    try:
        example = example_class().FromString(record.read())
    except DecodeError as error:
        raise DatasetError(
            f"{record.path}: record {record.number}: expected a tf.train.Example, found something else ({error})"
        ) from error
    values = {}
    for entry in example.features.feature:
        lists = (entry.value.bytes_list, entry.value.float_list, entry.value.int64_list)
        values[entry.key] = next((kind.value for kind in lists if len(kind.value)), [])
    return values
