"""``avrl report``: scores -> tables, pictures and one page. Takes everything that the cache holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avrl.errors import ConfigError, NotFoundError
from avrl.stages.report import PAGE, STAGE, SUMMARY, ReportConfig, inputs, only
from avrl.words import speaking
from avrl_cli import advice, holdings
from avrl_cli.options import listed, verb
from avrl_cli.output import Session
from avrl_cli.why import explain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avrl.artifact import Artifact

NAME = "report"
app = typer.Typer(invoke_without_command=True)

Format = Literal["html", "md", "csv", "tex", "json"]


@app.callback()
@verb(ReportConfig)
def command(
    session: Session,
    config: ReportConfig,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B", help="Two caches, or two runs of this cache: B minus A, paired; nothing is written"
        ),
    ] = None,
    some: Annotated[
        list[str] | None,
        typer.Option("--only", help="These probes, these encoders (and floors); with commas", show_default=False),
    ] = None,
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="On stdout: a summary, and a page in the cache (html); all tables (md, tex); all scores (csv, json)",
        ),
    ] = "html",
    why: Annotated[
        str | None,
        typer.Option(help="Say where one number is from, as in 'two-stream cls position R2'; makes no report"),
    ] = None,
) -> None:
    """Make tables, pictures and one self-contained page of all scores in the cache."""
    if session.json and form != "html":
        raise ConfigError(f"--json and --format {form} both want stdout", "leave out one")
    session.listing = form == "html"
    if compare:
        with speaking(config.lang):
            _contrast(session, config, compare, listed(some or []), form)
        return
    scores = session.store.artifacts("scores")
    if not scores:
        on = advice.SAMPLE if advice.only_sample(session.store) else ""
        raise NotFoundError(f"no scores in {session.cache}", f"make some with: {advice.probe('bridge', on)}")
    scores = only(scores, listed(some or []))
    if why is not None:
        explain(session, scores, why)
        return
    from avrl.lineage import Stock, ancestry, held

    checkpoints = session.store.artifacts("checkpoints")
    stock = Stock(held(session.store)[0])
    ancestors = [parent for parents in ancestry([*scores, *checkpoints], stock).values() for parent in parents]
    expect = f"{len(scores)} scores and {len(checkpoints)} checkpoints, some seconds, under 5 MB"
    made = session.run(STAGE, config, inputs(scores, checkpoints, ancestors), expect)
    if made is None or session.dry_run:
        return
    session.document["answer"] = made.manifest.facts["answer"]
    session.document["page"] = str(made.root / PAGE)
    session.tell(_told(made, scores, form))
    session.say(f"page: {made.root / PAGE}")


def _told(made: Artifact, scores: Sequence[Artifact], form: Format) -> str:
    """What a report says on stdout."""
    if form == "json":
        from avrl.comparison import read

        return str(read(scores)[0].write_json())
    names = {"html": [SUMMARY], "csv": ["scores.csv"]}.get(form)
    names = names or [f"{one}.{form}" for one in made.manifest.facts["tables"]]
    return "\n".join((made.root / name).read_text(encoding="utf-8") for name in names).removesuffix("\n")


def _contrast(session: Session, config: ReportConfig, compare: tuple[str, str], words: list[str], form: Format) -> None:
    """Two caches or two runs side by side, on stdout."""
    from avrl import contrast, typeset

    a, b = (contrast.side(session.store, name) for name in compare)
    if words:
        both = only([*a.scores, *b.scores], words)
        a, b = (one._replace(scores=[each for each in one.scores if each in both]) for one in (a, b))
    found = contrast.contrast(a, b, config.resamples, every=form in ("csv", "json"))
    session.document |= {"compared": [a.name, b.name], "said": found.said, "numbers": found.table.numbers.to_dicts()}
    if form == "html":
        session.tell(contrast.screen(found))
        return
    for one in found.said:
        session.say(one)
    numbers, as_text = found.table.numbers, {"md": typeset.markdown, "tex": typeset.latex}
    if form in as_text:
        session.tell(as_text[form](found.table).removesuffix("\n"))
    else:
        session.tell(numbers.write_csv().removesuffix("\n") if form == "csv" else numbers.write_json())


app.command(holdings.NAME)(holdings.command)
