"""``avrl report``: scores -> tables, pictures and one page. Takes everything that the cache holds."""

from __future__ import annotations

from typing import Annotated

import typer

from avrl.errors import NotFoundError
from avrl.stages.report import PAGE, STAGE, SUMMARY, ReportConfig, inputs
from avrl_cli import holdings
from avrl_cli.options import verb
from avrl_cli.output import Session
from avrl_cli.why import explain

NAME = "report"
app = typer.Typer(invoke_without_command=True)


@app.callback()
@verb(ReportConfig)
def command(
    session: Session,
    config: ReportConfig,
    why: Annotated[
        str | None,
        typer.Option(help="Say where one number is from, as in 'two-stream cls position R2'; makes no report"),
    ] = None,
) -> None:
    """Make tables, pictures and one self-contained page of all scores in the cache."""
    scores = session.store.artifacts("scores")
    if not scores:
        raise NotFoundError(f"no scores in {session.cache}", "make some with: avrl probe bridge --encoder dinov2")
    if why is not None:
        explain(session, scores, why)
        return
    checkpoints = session.store.artifacts("checkpoints")
    expect = f"{len(scores)} scores and {len(checkpoints)} checkpoints, some seconds, under 5 MB"
    made = session.run(STAGE, config, inputs(scores, checkpoints), expect)
    if made is None or session.dry_run:
        return
    session.document["answer"] = made.manifest.facts["answer"]
    session.document["page"] = str(made.root / PAGE)
    session.tell((made.root / SUMMARY).read_text(encoding="utf-8"))
    session.say(f"page: {made.root / PAGE}")


app.command(holdings.NAME)(holdings.command)
