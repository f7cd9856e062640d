"""Config: one frozen dataclass a stage, the only place where an option is declared.

A field is ``name: Annotated[T, Opt("help", unit="px")] = default``. Command line, manifest, key and help text
all derive from it. Fields marked ``runtime=True`` say how to run (workers, device); they are recorded in the
manifest but are not part of the key. T is int, float, str, bool, Literal, ``X | None`` or ``tuple[X, ...]``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from avrl.errors import ConfigError

C = TypeVar("C")


@dataclass(frozen=True)
class Opt:
    """What a user needs to know of an option.

    Attributes:
        help: One sentence without a full stop.
        unit: Unit of the value, shown in the help ("px", "steps").
        runtime: True if the value cannot change what is made.
        flag: The option's name where it is not the field's.
        hidden: True for a field that the command line fills in another way.
    """

    help: str
    unit: str = ""
    runtime: bool = False
    flag: str = ""
    hidden: bool = False


@dataclass(frozen=True)
class Field:
    """One declared option: its name, its type without the annotation, its default and its `Opt`."""

    name: str
    type: Any
    default: Any
    opt: Opt


def fields_of(config: type[Any]) -> list[Field]:
    """The options of a config class, in the order of declaration.

    Raises:
        TypeError: a field has no `Opt` (a test walks every config, so this cannot reach a user).
    """
    hints = typing.get_type_hints(config, include_extras=True)
    found = []
    for field in dataclasses.fields(config):
        bare, *extras = typing.get_args(hints[field.name]) or (hints[field.name],)
        opt = next((extra for extra in extras if isinstance(extra, Opt)), None)
        if opt is None:
            raise TypeError(f"{config.__name__}.{field.name} has no Opt")
        found.append(Field(field.name, bare, field.default, opt))
    return found


def as_json(config: object, *, runtime: bool) -> dict[str, Any]:
    """The runtime fields of a config, or (``runtime=False``) the identity fields, as JSON values."""
    wanted = [field for field in fields_of(type(config)) if field.opt.runtime is runtime]
    return {field.name: plain(getattr(config, field.name)) for field in wanted}


Ranges = Mapping[str, tuple[Callable[[float], bool], str]]  # field -> what fits, and what is said of the rest
AT_LEAST_0, AT_LEAST_1 = (lambda n: n >= 0, "is less than 0"), (lambda n: n >= 1, "is less than 1")


def require_ranges(config: object, ranges: Ranges) -> None:
    """Refuse numbers that make no sense, by the names of their options.

    Raises:
        ConfigError: one is out of its range.
    """
    for name, (fits, words) in ranges.items():
        if not fits(getattr(config, name)):
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)} {words}")


def seconds(text: str, name: str) -> float:
    """A time as people type it, in seconds: ``90s``, ``10m``, ``2h``; a bare number is minutes.

    Raises:
        ConfigError: it is no time above zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not found or not float(found[1]):
        raise ConfigError(f"--{name.replace('_', '-')} {text!r} is no time", "write 90s, 10m or 2h")
    return float(found[1]) * {"s": 1, "": 60, "m": 60, "h": 3600}[found[2]]


def plain(value: Any) -> Any:
    """A config value as JSON would give it back: tuples become lists."""
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def from_json(config: type[C], values: Mapping[str, Any]) -> C:
    """Make a config from JSON values (a saved manifest's), checking every type.

    Raises:
        ConfigError: an unknown field, or a value of the wrong type.
    """
    known = {field.name: field for field in fields_of(config)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown field {unknown[0]!r} for {config.__name__}", f"known: {', '.join(known)}")
    return config(**{name: parse(known[name].type, value, name) for name, value in values.items()})


def parse(kind: Any, value: Any, name: str) -> Any:
    """Check a JSON value against a declared type and return the Python value.

    Raises:
        ConfigError: the value is not of that type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise ConfigError(f"{name}={value!r} is none of: {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        rest = next(arg for arg in args if arg is not type(None))
        return None if value is None else parse(rest, value, name)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(parse(args[0], item, name) for item in value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    wanted = "finite number" if kind is float else getattr(kind, "__name__", kind)
    raise ConfigError(f"{name}={value!r} is not a {wanted}")
