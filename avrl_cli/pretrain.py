"""``avrl pretrain``: frame store -> checkpoint.

With ``--frames s3://...`` even ``--dry-run`` writes into the cache: the store's tables, for the counts that it tells.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from avrl.artifact import Artifact
from avrl.errors import ConfigError
from avrl.launch_script import SCRIPTS, Launch, without
from avrl.stages.prep import whole
from avrl.stages.pretrain import STAGE, PretrainConfig, follow
from avrl_cli.options import verb
from avrl_cli.output import Session

NAME = "pretrain"


@verb(PretrainConfig)
def command(
    session: Session,
    config: PretrainConfig,
    objective: Annotated[Literal["two-stream", "single-stream", "videomae"], typer.Argument(help="Objective")],
    frames: Annotated[str, typer.Option(help="Which frame store, if several; or s3://BUCKET/PREFIX/NAME")] = "",
    launch_script: Annotated[
        Literal["slurm", "skypilot"] | None,
        typer.Option(help="Print an sbatch script or a SkyPilot task for exactly this run, and do nothing else"),
    ] = None,
) -> None:
    """Pretrain an encoder on frame pairs. No action label is read."""
    config = replace(config, objective=objective)
    if frames.startswith("s3://"):
        from avrl.remotestore import mirrored

        found = mirrored(frames, session.store, int(config.frames_cap * 1e9))
        if not whole(found):
            share = found.manifest.config["shard"]
            raise ConfigError(
                f"{frames} is a share ({share})", "join the shares: avrl prep --mirror s3://BUCKET/PREFIX"
            )
    else:
        found = session.store.resolve(
            "frames",
            frames,
            where=lambda one: whole(one) and (bool(frames) or one.manifest.facts["source"] == "egodex"),
            what="frames of egodex",
            make="avrl prep",
            option="--frames",
        )
    if launch_script:
        script = SCRIPTS[launch_script](_launch(session, config, frames, found))
        session.document["launch_script"] = script
        session.tell(script.rstrip("\n"))
    elif session.dry_run or not follow(config, {"frames": found}, session.store):
        expect = f"{config.epochs} epochs of {config.pairs_per_episode} pairs x {found.manifest.facts['episodes']}"
        session.run(STAGE, config, {"frames": found}, expect + " episodes")


def _launch(session: Session, config: PretrainConfig, frames: str, found: Artifact) -> Launch:
    """This run, with the words that were typed for it."""
    return Launch(
        name=f"avrl-{config.objective}-{config.size}",
        words=without(sys.argv[1:], "--launch-script", "--cache"),
        gpus=config.gpus,
        workers=config.workers,
        on_gpu=config.device != "cpu",
        cache=session.cache.resolve(),
        folder=Path.cwd(),
        frames=None if frames.startswith("s3://") else found.root.resolve(),
        frames_gb=found.bytes / 1e9,
    )
