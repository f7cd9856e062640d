"""A whole line of artifacts, from raw to scores, made through `avrl.stage.run` in no time."""

from dataclasses import dataclass
from typing import Annotated

from scored import SCORES, Row

from avrl.config import Opt
from avrl.stage import Built, Stage, run


@dataclass(frozen=True, kw_only=True)
class Made:
    """What is in it, and what it is called."""

    text: Annotated[str, Opt("Content, a file a word")] = "one"
    origin: Annotated[str, Opt("Where it is from")] = ""
    source: Annotated[str, Opt("Data set")] = ""
    luck: Annotated[str, Opt("Comes out different, as training on a GPU does", runtime=True)] = ""


def _build(config, inputs, folder):
    for name in config.text.split():
        (folder / name).write_text(name + config.luck)
    return Built({"files": len(config.text.split()), "device": "cpu"}, ["CC0"])


def stage(name):
    """A stage of this name that does hardly anything."""
    return Stage(name, 1, Made, lambda config, _: name, _build)


def family(cache, raw=None, row=None, luck=""):
    """Name -> artifact: scores of features of a checkpoint and of frames, all of one raw artifact."""
    made = {"raw": run(stage("raw"), raw or Made(text="a.zip b.zip", source="egodex"), {}, cache)[0]}
    made["frames"] = run(stage("frames"), Made(), {"raw": made["raw"]}, cache)[0]
    own = {"frames": made["frames"]}
    made["checkpoint"] = run(stage("checkpoints"), Made(text="weights", luck=luck), own, cache)[0]
    seen = own | {"checkpoint": made["checkpoint"]}
    made["features"] = run(stage("features"), Made(text="vectors", luck=luck), seen, cache)[0]
    given = own | {"features": made["features"]}
    return made | {"scores": run(SCORES, row or Row(), given, cache)[0]}
