"""Turn a config dataclass into the options of a Typer command: the one clever file of the command line.

A verb is written as ``def prep(session, config, raw="")``; `verb` gives it a signature that Typer understands:
its own parameters, one option for each config field, and the options that every verb has.
Precedence: default < the manifest named by ``--like`` < what was typed.
"""

from __future__ import annotations

import functools
import inspect
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from avrl.artifact import MANIFEST, load
from avrl.config import Field, fields_of, from_json, parse
from avrl.errors import ConfigError, NotFoundError
from avrl_cli.output import Session

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAKES, RUNS, HOUSE = "What it makes", "How it runs (not part of the cache key)", "Every verb"

COMMON: dict[str, tuple[Any, Any]] = {
    "cache": (
        Annotated[Path, typer.Option(help="Where artifacts live", envvar="AVRL_CACHE", rich_help_panel=HOUSE)],
        Path("cache"),
    ),
    "dry_run": (
        Annotated[bool, typer.Option("--dry-run", help="Say hit or miss, and why", rich_help_panel=HOUSE)],
        False,
    ),
    "json": (
        Annotated[bool, typer.Option("--json", help="One JSON document on stdout", rich_help_panel=HOUSE)],
        False,
    ),
    "verbose": (Annotated[bool, typer.Option("--verbose", "-v", help="Say more", rich_help_panel=HOUSE)], False),
    "quiet": (Annotated[bool, typer.Option("--quiet", "-q", help="Warnings only", rich_help_panel=HOUSE)], False),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show tracebacks", rich_help_panel=HOUSE)], False),
}
LIKE = Annotated[
    str | None,
    typer.Option(
        help="Take unnamed options from this artifact: its folder, or its name in the cache",
        metavar="ARTIFACT",
        rich_help_panel=HOUSE,
    ),
]
MADE = {"fetch": "raw", "prep": "frames", "pretrain": "checkpoints", "probe": "scores", "report": "tables"}  # by a verb


class _Named:
    """Mixed into commands: an error of their words names them, so that its line can name their help page."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `typer.core`; an option without its value raises an error that knows no context."""
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise


class Command(_Named, TyperCommand):
    """A verb."""


class Group(_Named, TyperGroup):
    """``avrl`` itself, or a verb with another below it."""


def verb(config: type[Any] | None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a Typer command of ``function(session, config, **own parameters)``; without a config it makes nothing."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[2 if config else 1 :]
        fields = [field for field in fields_of(config) if not field.opt.hidden] if config else []

        @functools.wraps(function)
        def command(ctx: typer.Context, **given: Any) -> None:
            if ctx.invoked_subcommand:
                _require_behind(ctx, ctx.invoked_subcommand)
                return
            common = {name: given.pop(name) for name in COMMON}
            told = {name: common[name] for name in ("cache", "dry_run", "json", "quiet")}  # the rest is read from argv
            session = Session(verb=ctx.command_path.partition(" ")[2] or str(ctx.info_name), **told)
            if config is None:
                function(session, **given)
                session.close()
                return
            like = given.pop("like")
            values = _saved(like, config, session) if like else {}
            for field in fields:
                value = given.pop(field.name)
                if not like or ctx.get_parameter_source(field.name).name == "COMMANDLINE":  # type: ignore[union-attr]
                    values[field.name] = _typed(field, value)
            function(session, from_json(config, values), **given)
            session.close()

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        parameters += [_option(field) for field in fields]
        parameters += [inspect.Parameter("like", context.kind, default=None, annotation=LIKE)] if config else []
        parameters += [
            inspect.Parameter(name, context.kind, default=default, annotation=annotation)
            for name, (annotation, default) in COMMON.items()
        ]
        command.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in [context, *parameters]}
        return command

    return decorate


def _require_behind(ctx: typer.Context, word: str) -> None:
    """Refuse options before the word of a second verb, which they would not reach."""
    known = {flag for one in ctx.command.commands[word].params for flag in one.opts}  # type: ignore[attr-defined]
    for one in ctx.command.params:
        if ctx.get_parameter_source(str(one.name)).name == "COMMANDLINE":  # type: ignore[union-attr]
            flag, value = one.opts[0], ctx.params[str(one.name)]
            typed = flag if value is True else f"{flag} {value}"
            step = f"type: {ctx.command_path} {word} {typed}" if flag in known else f"leave it out: {word} has none"
            raise ConfigError(f"{flag} stands before {word!r} and would not reach it", step)


def _saved(like: str, config: type[Any], session: Session) -> dict[str, Any]:
    """The identity fields in the manifest of an artifact that this verb made; a scores artifact has one of the gaps."""
    if (Path(like) / MANIFEST).is_file():  # else `load` would have the user remove that folder
        saved = load(Path(like)).manifest.config
    else:
        try:
            saved = session.store.resolve(MADE[session.verb], like, option="--like").manifest.config
        except NotFoundError as error:
            error.next_step = error.next_step or "see what there is: avrl report cache"
            raise
    wanted = [field for field in fields_of(config) if not field.opt.runtime]
    foreign = [field.name for field in wanted if field.name not in saved]
    if foreign:
        raise ConfigError(f"--like {like}: no artifact of this verb (it has no {foreign[0]!r})", "see avrl --help")
    values = {field.name: saved[field.name] for field in wanted if saved[field.name] != ""}  # "" is what has no part
    for field in wanted:
        if typing.get_origin(field.type) is tuple and not isinstance(saved[field.name], list):
            values[field.name] = [saved[field.name]]
    return values


def _option(field: Field) -> inspect.Parameter:
    """The Typer option of a config field. A tuple takes a repeated option or a comma-separated list."""
    opt, kind, default = field.opt, field.type, field.default
    if typing.get_origin(kind) is tuple:
        kind, default = list[str], [str(item) for item in default]
    elif typing.get_origin(kind) is Literal and not all(isinstance(one, str) for one in typing.get_args(kind)):
        kind = type(default)
    flag = opt.flag or "--" + field.name.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    # Rich takes [px] for markup and swallows it; round brackets survive.
    text = f"{opt.help} ({opt.unit})" if opt.unit else opt.help
    option = typer.Option(*names, help=text, rich_help_panel=RUNS if opt.runtime else MAKES)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _typed(field: Field, value: Any) -> Any:
    """What Typer gave, as the config wants it."""
    if typing.get_origin(field.type) is not tuple:
        return value
    inner = typing.get_args(field.type)[0]
    words = listed(value)
    try:
        return (
            [inner(word) for word in words] if inner in (int, float) else [parse(inner, w, field.name) for w in words]
        )
    except ValueError:
        raise ConfigError(f"{field.name}: {','.join(words)!r} is not a list of {inner.__name__}") from None


def listed(given: Iterable[object]) -> list[str]:
    """The words of a repeated option, each of which may be a comma-separated list."""
    return [word.strip() for item in given for word in str(item).split(",") if word.strip()]
