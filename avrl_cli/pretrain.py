"""``avrl pretrain``: frame store -> checkpoint.

With ``--frames s3://...`` even ``--dry-run`` writes into the cache: the store's tables, for the counts that it tells.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from avrl.artifact import Artifact
from avrl.errors import AvrlError, ConfigError, NotFoundError, SyncError
from avrl.launch_script import SCRIPTS, Launch, source, without
from avrl.stages.prep import whole
from avrl.stages.pretrain import STAGE, PretrainConfig, arrive, follow, is_first, leave, network, recipe, settled
from avrl_cli import advice
from avrl_cli.options import verb
from avrl_cli.output import Session

NAME = "pretrain"


@verb(PretrainConfig)
def command(
    session: Session,
    config: PretrainConfig,
    objective: Annotated[Literal["two-stream", "single-stream", "videomae"], typer.Argument(help="Objective")],
    on: Annotated[
        Literal["egodex", "bridge", "lerobot", "sample"], typer.Option(help="Whose frames to train on")
    ] = "egodex",
    frames: Annotated[str, typer.Option(help="Which frame store, if several; or s3://BUCKET/PREFIX/NAME")] = "",
    launch_script: Annotated[
        Literal["slurm", "skypilot"] | None,
        typer.Option(help="Print an sbatch script or a SkyPilot task for exactly this run, and do nothing else"),
    ] = None,
) -> None:
    """Pretrain an encoder on frame pairs. No action label is read."""
    config = settled(replace(config, objective=objective))
    if frames.startswith("s3://"):
        from avrl.remotestore import mirrored

        found = mirrored(frames, session.store, int(config.frames_cap * 1e9))
        if not whole(found):
            share = found.manifest.config["shard"]
            raise ConfigError(
                f"{frames} is a share ({share})", "join the shares: avrl prep --mirror s3://BUCKET/PREFIX"
            )
    else:
        found = _stored(session, on, frames)
    if launch_script:
        session.document["launch_script"] = SCRIPTS[launch_script](_launch(session, config, frames, found))
        session.tell(session.document["launch_script"].rstrip("\n"))
        return
    expect = ""
    if session.dry_run and not session.store.find(STAGE.name, STAGE.key(config, {"frames": found})):
        from avrl.cost import cost, sentence

        asked = network(vars(config))
        session.document["cost"] = cost(asked)
        session.say(sentence(asked, cost(asked)))
        session.say(recipe(config).sentence())
        expect = _expected(config, found)
    if session.dry_run or not follow(config, {"frames": found}, session.store):
        if not session.dry_run:
            arrive(config, {"frames": found}, session.store)
        _leave(session, config, session.run(STAGE, config, {"frames": found}, expect))


def _stored(session: Session, on: str, frames: str) -> Artifact:
    """The frame store in the cache that is asked for."""
    try:
        return session.store.resolve(
            "frames",
            frames,
            where=lambda one: whole(one) and (bool(frames) or _is_of(one, on)),
            what=f"frames of {on}",
            make="avrl prep" if on == "egodex" else advice.prep(on),
            option="--frames",
        )
    except NotFoundError as error:
        if is_first():
            raise
        raise NotFoundError(
            f"{error.cause}, on {os.uname().nodename}", "let all nodes see one cache, and name it with --cache"
        ) from error


def _launch(session: Session, config: PretrainConfig, frames: str, found: Artifact) -> Launch:
    """This run, with the words that were typed for it."""
    return Launch(
        name=f"avrl-{network(vars(config)).name}-{config.size}",
        words=without(sys.argv[1:], "--launch-script", "--cache"),
        gpus=config.gpus,
        workers=config.workers,
        on_gpu=config.device != "cpu",
        cache=session.cache.resolve(),
        folder=Path.cwd(),
        frames=None if frames.startswith("s3://") else found.root.resolve(),
        frames_gb=found.bytes / 1e9,
        source=source(),
    )


def _expected(config: PretrainConfig, frames: Artifact) -> str:
    """What the run comes to, in steps, and the episodes that it draws from: without those held out.

    Raises:
        ConfigError: the episodes are too few or too short for it.
    """
    from avrl.pairs import Pairs
    from avrl.store import FrameStore

    store = FrameStore(frames.root)
    pairs = Pairs(store, recipe(config).sampling, config.batch_size)
    used = pairs.indices // config.pairs_per_episode
    told = (
        f"{config.epochs} epochs of {pairs.steps_per_epoch} steps: {config.pairs_per_episode} pairs x {used} episodes"
    )
    return f"{told} ({len(store.episodes) - used} more are held out or too short)"


def _is_of(frames: Artifact, source: str) -> bool:
    """Whether a store has the frames of a source; those of the bundled sample's clips are in EgoDex's layout."""
    if source == "sample":
        return frames.ref.startswith("egodex-sample-")
    return bool(frames.manifest.facts["source"] == source)


def _leave(session: Session, config: PretrainConfig, artifact: Artifact | None) -> None:
    """With ``--sync``: the checkpoint goes to S3, and with ``--shutdown`` the machine is powered off after that."""
    if artifact and config.sync and not session.dry_run:
        try:
            session.mirror(artifact, config.sync)
        except AvrlError as error:
            stays = ", shutdown withheld" if config.shutdown else ""
            raise SyncError(f"{artifact.ref} is done, but not on S3{stays}: {error.cause}", error.next_step) from error
        leave(config, artifact)
