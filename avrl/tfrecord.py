"""TFRecord files without TensorFlow: framing, checksums, and the one message that lies inside (tf.Example).

A record is: length (uint64 LE), masked crc32c of those 8 bytes, payload, masked crc32c of the payload.
Source: tensorflow/core/lib/io/record_writer.h and core/example/example.proto (the published formats).
An own reader of these few lines avoids protobuf's version pins and gives every record a byte offset.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from avrl.errors import IntegrityError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEADER, FOOTER = 12, 4
VARINT, LENGTH_DELIMITED, FIXED32 = 0, 2, 5
MASK_DELTA = 0xA282EAD8
VARINT_BITS = 64

Feature = list[bytes] | np.ndarray


def masked(data: bytes | memoryview) -> int:
    """TFRecord's masked crc32c."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def offsets(path: Path) -> Iterator[int]:
    """Byte offset of every record, by hopping from header to header.

    Raises:
        NotFoundError: the file is gone.
        IntegrityError: a length's checksum is wrong or the file ends inside a record; what came before stands.
    """
    size = _size(path)
    at = 0
    with path.open("rb") as handle:
        while at < size:
            handle.seek(at)
            at_next = at + HEADER + _length(handle.read(HEADER), path, at) + FOOTER
            if at_next > size:
                raise IntegrityError(f"{path}: the record at byte {at} is cut off", "fetch the shard again")
            yield at
            at = at_next


def read(path: Path, offset: int) -> bytes:
    """The payload of the record at an offset.

    Raises:
        NotFoundError: the file is gone.
        IntegrityError: a checksum is wrong, or the record is cut off.
    """
    size = _size(path)
    with path.open("rb") as handle:
        handle.seek(offset)
        length = _length(handle.read(HEADER), path, offset)
        if offset + HEADER + length + FOOTER > size:
            raise IntegrityError(f"{path}: the record at byte {offset} is cut off", "fetch the shard again")
        payload, footer = handle.read(length), handle.read(FOOTER)
    if len(footer) < FOOTER or struct.unpack("<I", footer)[0] != masked(payload):
        raise IntegrityError(f"{path}: the record at byte {offset} is damaged (crc32c)", "fetch the shard again")
    return payload


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise NotFoundError(
            f"{path.resolve()} is gone, or was moved", "fetch it again, --from DIR if it was local"
        ) from None


def _length(header: bytes, path: Path, offset: int) -> int:
    if len(header) < HEADER or struct.unpack("<I", header[8:])[0] != masked(header[:8]):
        raise IntegrityError(f"{path}: the length at byte {offset} is damaged (crc32c)", "fetch the shard again")
    return int(struct.unpack("<Q", header[:8])[0])


def parse_example(payload: bytes, name: str = "a record") -> dict[str, Feature]:
    """Feature name -> list of bytes, float32 array or int64 array.

    Args:
        payload: What `read` gave.
        name: What to call it in errors.

    Raises:
        IntegrityError: the payload is no tf.Example.
    """
    found: dict[str, Feature] = {}
    try:
        for number, features in _fields(memoryview(payload)):
            if number != 1:
                continue
            for _, entry in _fields(_bytes(features)):
                pair = dict(_fields(_bytes(entry)))
                found[bytes(_bytes(pair[1])).decode()] = _feature(_bytes(pair[2]))
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise IntegrityError(f"{name} is no tf.Example: {error}", "fetch the shard again") from error
    return found


def _feature(data: memoryview) -> Feature:
    """A Feature message: bytes_list = 1, float_list = 2, int64_list = 3; numbers packed or not."""
    for kind, values in _fields(data):
        items = [value for _, value in _fields(_bytes(values))]
        if kind == 1:
            return [bytes(_bytes(item)) for item in items]
        if kind == 2:
            return np.concatenate([np.frombuffer(_bytes(item), "<f4") for item in items] or [np.empty(0, "<f4")])
        numbers = [n for item in items for n in (_varints(item) if isinstance(item, memoryview) else [item])]
        return np.array([n - (1 << 64) if n >> 63 else n for n in numbers], np.int64)
    return []


def _bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise TypeError("a number where a message should be")
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Field number and value of a protobuf message; a fixed 32-bit value comes as its 4 bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == LENGTH_DELIMITED:
            length, at = _varint(data, at)
        elif wire == FIXED32:
            length = 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("a field reaches past the end")
        yield number, data[at : at + length]
        at += length


def _varints(data: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if shift >= VARINT_BITS:
            raise ValueError("a number of more than 64 bits")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value & (1 << VARINT_BITS) - 1, at  # the tenth byte has one bit to give
