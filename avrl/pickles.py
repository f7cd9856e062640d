"""Pickles of strangers: numbers in numpy arrays and plain containers, and nothing else is ever made of them.

A pickle is a program. Here its opcodes are listed before it runs, the names that it may call are a table, and what
stands behind those names is not numpy but the stand-ins below, which check shape, type and size against the bytes
that are there. So no code of a stranger runs, and a claim of a terabyte allocates nothing.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from avrl.errors import IntegrityError

AGAIN = "fetch it again and open it with no other tool, or list it as dropped with --on-error drop"
NUMBERS = re.compile(r"[<>|=]?([fiu][1248]|b1)")  # floats, integers, booleans: what lies in an array is its bytes
BROKEN = (pickle.UnpicklingError, ValueError, TypeError, IndexError, KeyError, AttributeError, EOFError, MemoryError)


class Fixed(type):
    """A stand-in that a pickle cannot change: ``BUILD`` sets attributes of whatever it is pointed at."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name!r} of a class")


class Dtype(metaclass=Fixed):
    """Stands in for ``numpy.dtype``: a kind of number and a byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not (isinstance(code, str) and NUMBERS.fullmatch(code)):
            raise pickle.UnpicklingError(f"an array of type {code!r}, which is no number")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, fields = state[1], state[2:5]
        if order not in ("<", ">", "|", "=") or fields != (None, None, None):
            raise pickle.UnpicklingError("an array of structures")
        self.value = self.value.newbyteorder(order)


class Array(metaclass=Fixed):
    """Stands in for ``numpy.ndarray``: `value` is the array, empty until its bytes have come."""

    value: np.ndarray = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


class Reconstruct(metaclass=Fixed):
    """Stands in for numpy's function that makes an empty array to be filled."""

    def __new__(cls, kind: type, shape: Any, code: Any) -> Array:  # type: ignore[misc]
        """An array without bytes, whatever shape is claimed."""
        if kind is not Array:
            raise pickle.UnpicklingError("an array that is none")
        return Array()


class FromBuffer(metaclass=Fixed):
    """Stands in for numpy's function that makes an array of bytes (protocol 5)."""

    def __new__(cls, data: bytes, dtype: Dtype, shape: tuple[int, ...], order: str) -> Array:  # type: ignore[misc]
        """The array."""
        made = Array()
        made.value = _array(data, dtype, shape, order)
        return made


class Scalar(metaclass=Fixed):
    """Stands in for numpy's function that makes a single number."""

    def __new__(cls, dtype: Dtype, data: bytes) -> Any:
        """The number, as Python's own."""
        return _array(data, dtype, (), "C").item()


class Encode(metaclass=Fixed):
    """Stands in for ``_codecs.encode``: bytes, as protocol 2 writes them."""

    def __new__(cls, text: str, encoding: str) -> Any:
        """The bytes."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
        return text.encode("latin1")


class Empty(metaclass=Fixed):
    """Stands in for ``bytes``, which protocol 2 calls for none."""

    def __new__(cls) -> Any:
        """No bytes."""
        return b""


NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): Dtype,
    ("numpy", "ndarray"): Array,
    ("_codecs", "encode"): Encode,
    ("__builtin__", "bytes"): Empty,
    ("collections", "OrderedDict"): dict,
}
for _package in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
    NAMES[_package + ".multiarray", "_reconstruct"] = Reconstruct
    NAMES[_package + ".multiarray", "scalar"] = Scalar
    NAMES[_package + ".numeric", "_frombuffer"] = FromBuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array and no plain container")
        return NAMES[module, name]


def load(data: bytes, name: str) -> Any:
    """What a pickle holds, with an `Array` in the place of each numpy array.

    Args:
        data: The pickle.
        name: What to call it in errors.

    Raises:
        IntegrityError: it is damaged, or asks for anything but arrays of numbers and plain containers.
    """
    try:
        _list_opcodes(data)
        return _Unpickler(io.BytesIO(data)).load()
    except (*BROKEN, RecursionError, OverflowError) as error:
        raise IntegrityError(f"{name} is no pickle of plain numbers: {error}", AGAIN) from error


def _list_opcodes(data: bytes) -> None:
    """Refuse opcodes that reach outside, and memo numbers that would make a table of gigabytes."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"):
            raise pickle.UnpicklingError(f"it refers to something outside itself ({opcode.name})")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"it numbers an object {argument}, in {len(data)} bytes")


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not (isinstance(data, bytes | bytearray) and isinstance(dtype, Dtype) and isinstance(shape, tuple)):
        raise pickle.UnpicklingError("an array that is none")
    if not all(type(n) is int and n >= 0 for n in shape) or order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array of shape {shape!r:.60}")
    if math.prod(shape) * dtype.value.itemsize != len(data):
        raise pickle.UnpicklingError(f"an array of shape {shape!r:.60} in {len(data)} bytes")
    return np.frombuffer(bytes(data), dtype.value).reshape(shape, order=order)  # type: ignore[call-overload, no-any-return]
