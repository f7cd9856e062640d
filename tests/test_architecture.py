"""DESIGN 2 as code: which module may import which, what stays free of actions, how long things may be."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import avrl.stages
from avrl.config import fields_of
from avrl.stage import Stage

ROOT = Path(__file__).parent.parent
PACKAGES = ("avrl", "avrl_cli")

# From the top down: a module may import its own layer and those below. Every module has its place here.
LAYERS = {
    "command line": """
        avrl_cli avrl_cli.__main__ avrl_cli.app avrl_cli.errors avrl_cli.options avrl_cli.output
        avrl_cli.fetch avrl_cli.prep avrl_cli.pretrain avrl_cli.probe avrl_cli.report avrl_cli.holdings avrl_cli.why
        avrl_cli.advice avrl_cli.entries
    """,
    "stages": """
        avrl.stages avrl.stages.features avrl.stages.flow avrl.stages.fetch avrl.stages.prep avrl.stages.pretrain
        avrl.stages.probe avrl.stages.report
    """,
    "hops": """
        avrl.averaging avrl.checkpoint avrl.cost avrl.curve avrl.devices avrl.export avrl.launch_script avrl.looks
        avrl.pace avrl.ranks avrl.training avrl.watch avrl.machine avrl.remoterun avrl.sync
        avrl.features avrl.vectors avrl.probing avrl.flow avrl.flow_labels avrl.flow_verdict avrl.order avrl.clusters
        avrl.words avrl.comparison avrl.tables avrl.effects avrl.convergence avrl.hypotheses avrl.budgets avrl.leaders
        avrl.verdicts avrl.answers avrl.drawing avrl.pictures avrl.gallery avrl.typeset avrl.page avrl.contrast
        avrl.lineage avrl.cells avrl.holdings avrl.spread avrl.report
    """,
    "nouns": """
        avrl.episodes avrl.frames avrl.plan avrl.packing avrl.workers avrl.pairs avrl.augment avrl.store
        avrl.labels avrl.hand_motion avrl.lerobot_motion avrl.scratch
        avrl.codec avrl.video avrl.stills avrl.claims avrl.lerobot avrl.pickles
        avrl.http avrl.server avrl.s3 avrl.mirror avrl.zips avrl.remotezip avrl.members avrl.locks avrl.remotestore
        avrl.addresses avrl.copies avrl.remotetensors
        avrl.tfrecord avrl.intervals avrl.outcome avrl.splits avrl.torchvision_ops
        avrl.correctness avrl.stillness avrl.camera_motion avrl.subsets
        avrl.sources avrl.sources.bridge avrl.sources.bridge_lerobot avrl.sources.bridge_raw avrl.sources.bridge_rlds
        avrl.sources.egodex avrl.sources.lerobot
        avrl.encoders avrl.encoders.efficientnet_lite0 avrl.encoders.pixels avrl.encoders.r3m
        avrl.encoders.timm_image avrl.encoders.transformers_layout avrl.encoders.weights avrl.encoders.mae
        avrl.encoders.vip avrl.encoders.openvla avrl.encoders.pi0 avrl.encoders.towers avrl.encoders.video
        avrl.encoders.videomae_k400 avrl.encoders.vjepa2 avrl.encoders.vjepa2_1 avrl.encoders.pins avrl.encoders.hub
        avrl.objectives avrl.objectives.channels avrl.objectives.prediction avrl.objectives.single_stream
        avrl.objectives.two_stream avrl.objectives.videomae avrl.objectives.vit
        avrl.probes avrl.probes.attentive avrl.probes.ridge avrl.ridge avrl.meters avrl.alarms avrl.trackers
    """,
    "spine": "avrl avrl.errors avrl.config avrl.artifact avrl.cache avrl.stage avrl.progress",
}
RANK = {name: rank for rank, layer in enumerate(reversed(LAYERS.values())) for name in layer.split()}
SPINE = LAYERS["spine"].split()

# Scripts that made the bundled sample: beside the layers, nobody imports them and they import nobody.
SCRIPTS = {"avrl.sample.containers", "avrl.sample.render"}

# What pretraining is made of, and what knows actions. The scientific claim hangs on these two lines.
ACTION_FREE = (
    *("pairs", "augment", "objectives", "encoders", "checkpoint", "training", "curve", "ranks", "averaging", "cost"),
    *("watch", "looks", "meters", "alarms", "trackers", "sync", "export"),
)
KNOWS_ACTIONS = ("labels", "hand_motion", "lerobot_motion", "outcome", "probes", "probing", "sources")

HEAVY = {"torch", "torchvision", "timm", "zarr", "boto3", "polars", "numpy"}
MAX_LINES, MAX_FUNCTION_LINES = 300, 60
EMPTY_NAMES = {"utils", "helpers", "common", "manager", "base", "v2", "misc"}


class Import(NamedTuple):
    """One import: what, in which line, and when it happens."""

    target: str
    line: int
    when: str  # "load", "call" (inside a function), "typing" (never at run time)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@cache
def imports(name: str) -> tuple[Import, ...]:
    """Every import of a module; a name of one of our modules in a string (a table's) counts as an import."""
    found: list[Import] = []

    def walk(node: ast.AST, when: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = when
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = "call" if when == "load" else when
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                inner = "typing"
            if isinstance(child, ast.Import):
                found.extend(Import(one.name, child.lineno, when) for one in child.names)
            if isinstance(child, ast.ImportFrom):
                assert not child.level, f"{name}:{child.lineno}: relative import"
                whole = (f"{child.module}.{one.name}" for one in child.names)
                found.extend(Import(one if one in FILES else str(child.module), child.lineno, when) for one in whole)
            if isinstance(child, ast.Constant) and child.value in FILES and "." in child.value:
                found.append(Import(child.value, child.lineno, "call"))
            walk(child, inner)

    walk(tree(name), "load")
    return tuple(found)


def ours(name: str, *when: str) -> set[str]:
    """The modules of ours that a module imports, with the packages that come along."""
    targets = {one.target for one in imports(name) if one.target in FILES and (not when or one.when in when)}
    return {".".join(one.split(".")[:n]) for one in targets for n in range(1, one.count(".") + 2)} - {name}


def reachable(name: str, *when: str) -> dict[str, str]:
    """Module -> the one that brought it in, for everything that a module imports in the end."""
    by, todo = {}, [name]
    while todo:
        here = todo.pop()
        for one in ours(here, *when):
            if one not in by:
                by[one] = here
                todo.append(one)
    return by


def foreign(name: str, *when: str) -> set[str]:
    """Top-level names of the packages of others that a module imports."""
    found = {one.target.split(".")[0] for one in imports(name) if not when or one.when in when}
    return found - set(PACKAGES)


def is_part(name: str, parts: tuple[str, ...]) -> bool:
    return name.split(".")[1] in parts if "." in name else False


# Who imports whom.


def test_every_module_has_its_place():
    assert set(FILES) - SCRIPTS == set(RANK), "place the module in LAYERS, or take it out"


@pytest.mark.parametrize("name", RANK)
def test_imports_point_down(name):
    up = [f"{FILES[name].name} imports {one}" for one in ours(name) if RANK.get(one, 99) > RANK[name]]
    assert not up


def test_no_module_needs_itself():
    """Not even through others, when it is loaded."""
    for name in RANK:
        packages = {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)}
        # A module's own package is always loaded first; it is only a cycle if that package imports the module.
        assert name not in {one for other in ours(name, "load") - packages for one in reachable(other, "load")}, name


def test_the_spine_is_standard_library_only():
    for name in SPINE:
        assert foreign(name, "load", "typing") <= sys.stdlib_module_names, name
        assert foreign(name, "call") - sys.stdlib_module_names <= {"tqdm"}, name


def test_the_samples_scripts_stand_alone():
    for name in FILES:
        assert not SCRIPTS & ours(name)
    for name in SCRIPTS:
        assert not ours(name)


# Free of actions.


@pytest.mark.parametrize("name", [one for one in RANK if is_part(one, ACTION_FREE)])
def test_pretraining_cannot_see_an_action(name):
    """Neither at load, nor inside a function, nor through others, nor for a type."""
    by = reachable(name)
    seen = {f"{one} (by {by[one]})" for one in by if is_part(one, KNOWS_ACTIONS)}
    assert not seen


def test_a_checkpoints_only_input_is_frames():
    stage = tree("avrl.stages.pretrain")
    roles = {
        node.slice.value if isinstance(node.slice, ast.Constant) else ast.unparse(node)
        for node in ast.walk(stage)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "inputs"
    }
    assert roles == {"frames"}
    uses = [node for node in ast.walk(stage) if isinstance(node, ast.Name) and node.id == "inputs"]
    handed = [node for node in ast.walk(stage) if isinstance(node, ast.Call) and any(one in node.args for one in uses)]
    assert {ast.unparse(one.func) for one in handed} <= {"STAGE.key", "STAGE.slug"}
    given = [ast.unparse(node) for node in ast.walk(tree("avrl_cli.pretrain")) if isinstance(node, ast.Dict)]
    assert given
    assert set(given) == {"{'frames': found}"}


# What is not loaded for a help page.


@pytest.mark.parametrize("package", ["avrl.stages", "avrl_cli"])
def test_declarations_load_nothing_heavy(package):
    for name in FILES:
        if f"{name}.".startswith(f"{package}."):
            for one in (name, *reachable(name, "load")):
                assert not foreign(one, "load") & HEAVY, f"{name} loads {one}"


@pytest.mark.parametrize("module", ["avrl_cli.app", "avrl"])
def test_nothing_heavy_is_loaded_at_run_time(module):
    unwanted = HEAVY | ({"typer"} if module == "avrl" else set())
    code = f"import sys, pkgutil, {module}; print(*sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_only_the_command_line_knows_typer_and_nobody_click():
    for name in FILES:
        if not name.startswith("avrl_cli"):
            assert "typer" not in foreign(name), name
        assert "click" not in foreign(name), name
        assert not [one for one in imports(name) if one.target.startswith("typer._click")], name


def test_timm_and_torchvision_come_from_one_place():
    """Else it hangs on the order of imports whether a CPU-only torch can load torchvision."""
    cure = "avrl.torchvision_ops"
    for name in FILES:
        assert not foreign(name) & {"timm", "torchvision"}, name
        called = [
            node.args[0].value
            for node in ast.walk(tree(name))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
            if node.args and isinstance(node.args[0], ast.Constant)
        ]
        assert name == cure or not [one for one in called if one.split(".")[0] in ("timm", "torchvision")], name


# How long, what it is called, what is said.


@pytest.mark.parametrize("name", FILES)
def test_modules_are_short(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    functions = (one for one in ast.walk(tree(name)) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {one.name: one.end_lineno - one.lineno + 1 for one in functions}
    assert not {one: lines for one, lines in lengths.items() if lines > MAX_FUNCTION_LINES}


def test_modules_are_named_for_what_they_hold():
    for name in FILES:
        assert not set(name.split(".")) & EMPTY_NAMES, name


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_holds(name):
    text = ast.get_docstring(tree(name))
    assert text
    assert text.splitlines()[0].endswith((".", ":")), "its first line is a sentence"


# Stages.

STAGES = [
    one
    for module in pkgutil.iter_modules(avrl.stages.__path__)
    for one in vars(import_module(f"avrl.stages.{module.name}")).values()
    if isinstance(one, Stage)
]


def test_the_cache_has_a_noun_a_stage():
    names = sorted({stage.name for stage in STAGES})  # optical flow is a label too
    assert names == ["checkpoints", "features", "frames", "labels", "raw", "scores", "tables"]


def test_every_field_of_every_config_has_an_opt():
    configs = {stage.config for stage in STAGES}
    for module in pkgutil.iter_modules(avrl.stages.__path__):
        named = vars(import_module(f"avrl.stages.{module.name}")).items()
        configs |= {one for name, one in named if name.endswith("Config") and isinstance(one, type)}
    for config in configs:
        fields_of(config)  # raises where there is none


@pytest.mark.parametrize("stage", STAGES, ids=lambda one: one.name)
def test_the_changelog_names_every_stage_version(stage):
    """A bumped version makes users build again: its Cache section says so."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.split(r"^(?:#+ +|\*\*)(?=\w)", text, flags=re.MULTILINE)
    told = "\n".join(one for one in sections if one.startswith("Cache"))
    assert re.search(rf"`{stage.name}` v{stage.version}\b", told), f"say in **Cache**: `{stage.name}` v{stage.version}"
