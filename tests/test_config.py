"""A config is declared once; parsing, identity and the key follow from the declaration."""

import dataclasses
import json
import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, Tiny

import avrl.stages
from avrl.config import Opt, as_json, fields_of, from_json, parse
from avrl.errors import ConfigError
from avrl.stage import Stage

STAGES = [
    one
    for module in pkgutil.iter_modules(avrl.stages.__path__)
    for one in vars(import_module(f"avrl.stages.{module.name}")).values()
    if isinstance(one, Stage)
]

tinies = st.builds(
    Tiny,
    lines=st.integers(-(2**53), 2**53),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    case=st.sampled_from(["lower", "upper"]),
    names=st.lists(st.text()).map(tuple),
    sizes=st.lists(st.integers()).map(tuple),
    ends=st.booleans(),
    limit=st.none() | st.integers(),
    workers=st.integers(),
    device=st.text(),
)


def saved(config):
    """All fields of a config, through a manifest's JSON and back."""
    return json.loads(json.dumps(as_json(config, runtime=False) | as_json(config, runtime=True)))


@given(tinies)
@settings(max_examples=50, deadline=None)
def test_a_saved_config_is_the_same_config(config):
    again = from_json(Tiny, saved(config))
    assert again == config
    assert TINY.key(again, {}) == TINY.key(config, {})


@given(tinies, tinies)
@settings(max_examples=50, deadline=None)
def test_equal_identity_is_equal_key(one, other):
    same = as_json(one, runtime=False) == as_json(other, runtime=False)
    assert (TINY.key(one, {}) == TINY.key(other, {})) == same


def test_fields_come_in_the_order_of_declaration():
    fields = fields_of(Tiny)
    assert [one.name for one in fields] == [one.name for one in dataclasses.fields(Tiny)]
    assert fields[0].opt == Opt("Lines a file", unit="lines")
    assert fields[0].type is int
    assert fields[0].default == 3


def test_a_field_without_opt_is_refused():
    @dataclass
    class Bare:
        size: Annotated[int, "no Opt"] = 1

    with pytest.raises(TypeError, match=r"Bare\.size has no Opt"):
        fields_of(Bare)


def test_runtime_fields_are_no_part_of_the_identity():
    identity, runtime = as_json(Tiny(), runtime=False), as_json(Tiny(), runtime=True)
    assert runtime == {"workers": 1, "device": "cpu"}
    assert not set(identity) & set(runtime)
    assert set(identity) | set(runtime) == {one.name for one in dataclasses.fields(Tiny)}


def test_an_unknown_field_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown field 'lnes' for Tiny; known: lines, scale") as caught:
        from_json(Tiny, {"lnes": 3})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lines", "3"),
        ("lines", 3.0),
        ("lines", True),
        ("lines", None),
        ("scale", "1"),
        ("scale", True),
        ("scale", None),
        ("case", "Lower"),
        ("case", ["lower"]),
        ("names", "abc"),
        ("names", [1]),
        ("names", None),
        ("sizes", [1, "2"]),
        ("sizes", [[1]]),
        ("sizes", {"1": 2}),
        ("ends", 1),
        ("ends", "yes"),
        ("limit", "none"),
        ("limit", 1.5),
        ("device", 0),
    ],
)
def test_a_wrong_type_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name}=") as caught:
        from_json(Tiny, {name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value", "meant"), [("scale", 2, 2.0), ("limit", None, None), ("sizes", [1], (1,))])
def test_json_spellings_are_taken(name, value, meant):
    found = getattr(from_json(Tiny, {name: value}), name)
    assert found == meant
    assert type(found) is type(meant)


def test_a_choice_says_what_there_is():
    with pytest.raises(ConfigError, match="case='both' is none of: lower, upper"):
        parse(Literal["lower", "upper"], "both", "case")
    with pytest.raises(ConfigError, match="n=True is none of: 1, 2"):
        parse(Literal[1, 2], True, "n")


@pytest.mark.parametrize("stage", STAGES, ids=lambda one: one.name)
def test_every_config_of_a_stage_comes_back_from_its_manifest(stage):
    values = {one.name: one.default for one in fields_of(stage.config)}
    if dataclasses.MISSING in values.values():
        pytest.skip("has required fields: made by a verb, not by a user")
    config = stage.config()
    assert from_json(stage.config, saved(config)) == config


@pytest.mark.parametrize("stage", STAGES, ids=lambda one: one.name)
def test_every_config_is_frozen_and_small(stage):
    assert stage.config.__dataclass_params__.frozen
    fields = fields_of(stage.config)
    assert len(fields) <= (40 if stage.name == "checkpoints" else 20)  # a run on rented machines has more to say
    for one in fields:
        assert one.opt.help
        assert not one.opt.help.endswith("."), one.name
