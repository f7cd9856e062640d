"""`avrl.pickles`: what numpy writes is read to the bit; whatever else a pickle asks for is refused and never run."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import pickletools
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avrl import pickles
from avrl.errors import IntegrityError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def told(found):
    """The same thing with plain arrays in the place of the stand-ins."""
    if isinstance(found, pickles.Array):
        return found.value
    if isinstance(found, dict):
        return {key: told(one) for key, one in found.items()}
    return [told(one) for one in found] if isinstance(found, list) else found


# What is admitted.


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.arange(14.0).reshape(2, 7),
        np.asfortranarray(np.arange(14, dtype=np.float32).reshape(2, 7)),
        np.arange(6, dtype=">i4"),
        np.array([True, False]),
        np.zeros((0, 7)),
        np.array(1.5),
        np.arange(20.0)[::3],
    ],
    ids=str,
)
def test_arrays_come_out_as_they_went_in(array, protocol):
    data = pickle.dumps({"a": array}, protocol)
    for one in (data, data.replace(b"numpy._core", b"numpy.core") if protocol < 4 else data):
        found = told(pickles.load(one, "x"))["a"]
        assert np.array_equal(found, array)
        assert found.dtype == array.dtype
        assert found.shape == array.shape


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_things_come_out_as_they_went_in(protocol):
    thing = {
        "list": [1, 2.5, None, True, "caf\xe9", b"\x00\xff", (1, 2), {3}],
        "scalar": np.float32(0.1),
        "many": [{"actions": np.ones(7)}] * 3,
        "long": 2**70,
        "ordered": collections.OrderedDict(a=1),
    }
    thing["list"].pop()  # a set is a builtin function's work before protocol 4
    found = told(pickles.load(pickle.dumps(thing, protocol), "x"))
    assert found["scalar"] == np.float32(0.1)
    assert [one["actions"].tolist() for one in found["many"]] == [[1.0] * 7] * 3
    assert {key: found[key] for key in ("list", "long")} == {key: thing[key] for key in ("list", "long")}
    assert dict(found["ordered"]) == {"a": 1}


# What is refused.


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Outside(pickle.Pickler):
    def persistent_id(self, obj):
        return "somewhere" if obj == "outside" else None


def outside():
    buffer = io.BytesIO()
    Outside(buffer).dump(["outside"])
    return buffer.getvalue()


def array_with(**changed):
    """A pickled array with other words in the place of its own."""
    state = {"version": 1, "shape": (2,), "dtype": np.dtype("f8"), "fortran": False, "data": bytes(16), **changed}
    return pickle.dumps(Filled(tuple(state.values())), 2)


class Filled:
    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), self.state


GLOBAL = b"cnumpy._core.multiarray\n_reconstruct\n"
MARKER = Path(tempfile.mkdtemp(), "was-here")  # the pickles must name it before any fixture is
HOSTILE = {
    "os.system": pickle.dumps(Call(os.system, f"touch {MARKER}")),
    "by hand": f"cos\nsystem\n(S'touch {MARKER}'\ntR.".encode(),
    "eval": pickle.dumps(Call(eval, "1+1")),
    "exec": b"c__builtin__\nexec\n(S'1'\ntR.",
    "getattr": pickle.dumps(Call(getattr, "a", "b")),
    "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
    "numpy's loader": pickle.dumps(Call(np.load, "/etc/passwd")),
    "numpy's runner": b"cnumpy.testing._private.utils\nrunstring\n(S'1'\nS''\ntR.",
    "frombuffer of numpy": pickle.dumps(Call(np.frombuffer, b"12345678")),
    "an object array": pickle.dumps(np.array([Call(os.system, f"touch {MARKER}")], object)),
    "a plain object array": pickle.dumps(np.array([1, None], object)),
    "strings in an array": pickle.dumps(np.array(["a"])),
    "a structure": pickle.dumps(np.zeros(2, [("a", "f8")])),
    "a date": pickle.dumps(np.array(["2021-07-23"], "datetime64[s]")),
    "a subclass": pickle.dumps(np.ma.masked_array([1.0], [False])),
    "something outside": outside(),
    "the extension registry": b"\x82\x01.",
    "a buffer outside": b"\x80\x05\x97.",
    "a huge shape": array_with(shape=(10**15,)),
    "a shape that wraps round": array_with(shape=(2**62, 4)),
    "a negative shape": array_with(shape=(-2, -1)),
    "a shape of floats": array_with(shape=(2.0,)),
    "a shape that is none": array_with(shape=None),
    "bytes that are none": array_with(data=[0.0, 1.0]),
    "a type that is none": array_with(dtype="f8"),
    "a filled dtype": b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nN(S'a'\ntNNI-1\nI-1\nI0\ntb.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
    "a huge string": b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b".",
    "a huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
    "a huge memo": b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
    "a huge memo in words": b"]p4000000000\n.",
    "a number of a million digits": b"I" + b"9" * 10**6 + b"\n.",
    "a changed stand-in": GLOBAL + b"}S'__new__'\nI1\ns\x86b.",
    "a changed stand-in in two": GLOBAL + b"N}S'__new__'\nI1\ns\x86b.",
    "a built class": b"cnumpy\nndarray\n}S'value'\nI1\nsb.",
    "nothing": b"",
    "no end": pickle.dumps(np.ones(3))[:-1],
    "text": b"hello",
    "bytes of a number": b"c__builtin__\nbytes\n(I1000000000000\ntR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_by_name_and_never_run(name):
    with pytest.raises(IntegrityError, match=r"^a.zip:obs_dict.pkl is no pickle of plain numbers: "):
        pickles.load(HOSTILE[name], "a.zip:obs_dict.pkl")
    assert not MARKER.exists()
    array = np.arange(3.0)
    assert np.array_equal(told(pickles.load(pickle.dumps(array), "x")), array)  # the next one is as good as before


def test_every_name_has_been_seen_in_what_numpy_writes():
    """A name that nobody writes is a door without a house."""
    seen = set()
    for protocol in PROTOCOLS:
        things = [np.arange(3.0), np.float64(1), collections.OrderedDict(), b"\xff", b""]
        data = pickle.dumps(things, protocol)
        strings = []
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                seen.add(tuple(argument.split(" ")))
            elif isinstance(argument, str):
                strings.append(argument)
            elif opcode.name == "STACK_GLOBAL":
                seen |= {(a, b) for a in strings for b in strings}
    old = {(module.replace("numpy._core", "numpy.core"), name) for module, name in seen}
    assert set(pickles.NAMES) <= seen | old


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7), st.integers(0, 5))
def test_a_flipped_bit_is_read_or_refused(at, bit, protocol):
    clean = pickle.dumps(
        {"full_state": np.arange(21.0).reshape(3, 7), "b": [np.float64(2), "x", {"y": None}]}, protocol
    )
    data = bytearray(clean)
    data[at % len(data)] ^= 1 << bit
    with contextlib.suppress(IntegrityError):
        pickles.load(bytes(data), "x")
