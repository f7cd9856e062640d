"""`avrl.tfrecord` against an independent writer (`clips.example`, `clips.framed`), and against every kind of damage."""

from __future__ import annotations

import contextlib
import random
import struct

import clips
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avrl import tfrecord
from avrl.errors import IntegrityError, NotFoundError

INTS = np.array([0, 1, -1, 127, 128, 300, -300, 2**63 - 1, -(2**63), 10**12], np.int64)
FLOATS = np.array([0, -0.0, 1.5, -2.25, 3e38, 1e-40, np.inf], np.float32)
FEATURES = {
    "steps/observation/image_0": [b"\xff\xd8jpeg", b"", b"\0" * 300],
    "steps/action": FLOATS,
    "steps/is_first": INTS,
    "caf\u00e9": [b"one"],
    "long": np.arange(-500, 500),
}


def same(found, wanted):
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        if isinstance(value, list):
            assert found[name] == value
        else:
            assert found[name].dtype == (np.float32 if value.dtype.kind == "f" else np.int64)
            assert np.array_equal(found[name], value)


@pytest.fixture
def shard(tmp_path):
    """A file of records with these payloads."""

    def written(*payloads):
        path = tmp_path / "x.tfrecord-00000-of-00001"
        path.write_bytes(b"".join(clips.framed(one) for one in payloads))
        return path

    return written


# Whole.


@pytest.mark.parametrize("packed", [True, False])
def test_what_another_wrote_is_read(packed):
    same(tfrecord.parse_example(clips.example(FEATURES, packed=packed)), FEATURES)


def test_empty_features():
    assert tfrecord.parse_example(b"") == {}
    found = tfrecord.parse_example(clips.example({"none": [], "no floats": np.empty(0), "no ints": np.empty(0, int)}))
    assert found["none"] == []
    assert found["no floats"].dtype == np.float32
    assert found["no ints"].dtype == np.int64
    assert len(found["no floats"]) == len(found["no ints"]) == 0


def test_fields_of_the_future_are_skipped():
    more = clips.field(9, b"what is this") + clips.varint(8 << 3) + clips.varint(5)
    same(tfrecord.parse_example(more + clips.example(FEATURES) + more), FEATURES)


numbers = st.lists(st.integers(-(2**63), 2**63 - 1)).map(lambda x: np.array(x, np.int64))
floats = st.lists(st.floats(width=32, allow_nan=False)).map(lambda x: np.array(x, np.float32))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=9), st.one_of(st.lists(st.binary(max_size=9)), numbers, floats)), st.booleans())
def test_round_trip(features, packed):
    same(tfrecord.parse_example(clips.example(features, packed=packed)), features)


def test_offsets_lead_to_every_record(shard):
    payloads = [b"", b"a", random.Random(0).randbytes(5000), clips.example(FEATURES)]
    path = shard(*payloads)
    found = list(tfrecord.offsets(path))
    assert found == list(np.cumsum([0, *(len(one) + 16 for one in payloads[:-1])]))
    assert [tfrecord.read(path, at) for at in found] == payloads


def test_an_empty_file_has_no_record(shard):
    assert list(tfrecord.offsets(shard())) == []


# Damaged.


def test_every_flipped_bit_of_a_record_is_refused(shard):
    path = shard(b"before", b"payload of the record", b"after")
    data, (_, start, end) = path.read_bytes(), tfrecord.offsets(path)
    for at in range(start, end):
        for bit in range(8):
            path.write_bytes(clips.flipped(data, at, bit))
            with pytest.raises(IntegrityError, match=rf"{path}: the (record|length) at byte {start} is damaged"):
                tfrecord.read(path, start)
            assert tfrecord.read(path, 0) == b"before"


def test_a_bad_length_ends_the_list_and_a_bad_payload_does_not(shard):
    path = shard(b"one" * 50, b"two" * 50, b"three" * 50)
    data, (first, second, third) = path.read_bytes(), tfrecord.offsets(path)
    path.write_bytes(clips.flipped(data, second + 20))
    assert list(tfrecord.offsets(path)) == [first, second, third]
    path.write_bytes(clips.flipped(data, second + 3))
    found = tfrecord.offsets(path)
    assert next(found) == first
    with pytest.raises(IntegrityError, match=f"the length at byte {second} is damaged"):
        next(found)


def test_a_cut_tail_is_refused_at_every_length(shard):
    path = shard(b"one" * 9, b"two" * 9)
    data, (_, second) = path.read_bytes(), tfrecord.offsets(path)
    for kept in range(second + 1, len(data)):
        path.write_bytes(data[:kept])
        found = tfrecord.offsets(path)
        assert next(found) == 0
        with pytest.raises(IntegrityError, match=f"at byte {second} is (cut off|damaged)"):
            next(found)
        with pytest.raises(IntegrityError, match=f"at byte {second} is (cut off|damaged)"):
            tfrecord.read(path, second)
    with pytest.raises(IntegrityError):
        tfrecord.read(path, len(data) + 5)


@pytest.mark.parametrize("length", [10**6, 2**40, 2**63 - 1, 2**64 - 1])
def test_a_length_that_lies_with_a_right_checksum(shard, length):
    path = shard(b"x" * 100)
    head = struct.pack("<Q", length)
    path.write_bytes(head + struct.pack("<I", tfrecord.masked(head)) + path.read_bytes()[12:])
    with pytest.raises(IntegrityError, match="at byte 0 is cut off"):
        tfrecord.read(path, 0)
    with pytest.raises(IntegrityError, match="at byte 0 is cut off"):
        list(tfrecord.offsets(path))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=120))
def test_random_bytes_are_refused_or_read_as_something(payload):
    with contextlib.suppress(IntegrityError):
        assert isinstance(tfrecord.parse_example(payload), dict)


SMALL = clips.example({"a": [b"xyz", b""], "b": np.array([1.5, 2]), "c": INTS})


def test_every_flipped_bit_of_an_unprotected_message_is_an_integrity_error_or_read():
    for packed in (SMALL, clips.example({"b": np.array([1.5, 2]), "c": INTS}, packed=False)):
        for at in range(len(packed)):
            for bit in range(8):
                with contextlib.suppress(IntegrityError):
                    tfrecord.parse_example(clips.flipped(packed, at, bit))
        for kept in range(len(packed)):
            with contextlib.suppress(IntegrityError):
                tfrecord.parse_example(packed[:kept])


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff" * 100,  # a tag of more than 64 bits
        b"\xff" * 10**6,
        clips.field(
            1, clips.field(1, clips.field(1, b"a") + clips.field(2, clips.field(3, clips.field(1, b"\xff" * 9))))
        ),
        clips.field(1, clips.field(1, clips.field(1, b"a") + clips.field(2, clips.field(2, clips.field(1, b"123"))))),
        clips.field(1, clips.field(1, clips.field(1, b"\xff") + clips.field(2, clips.field(1, b"")))),
        clips.field(1, clips.field(1, clips.field(1, b"no value"))),
        b"\x80" * 10 + b"\x08\x05",  # so long a tag, though small
        b"\x08\x05",  # a number where the features should be
        b"\x0b",  # a group
        b"\x0a\x7fshort",
        b"GIF89a",
    ],
)
def test_messages_that_are_no_example(payload):
    with pytest.raises(IntegrityError, match=r"^shard#0 is no tf.Example: "):
        tfrecord.parse_example(payload, "shard#0")


def test_a_shard_that_is_gone_is_named(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "moved")
    for reading in (lambda: list(tfrecord.offsets(tmp_path / "a")), lambda: tfrecord.read(tmp_path / "a", 0)):
        with pytest.raises(NotFoundError, match=r"moved is gone, or was moved; fetch it again"):
            reading()
