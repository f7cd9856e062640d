"""The report's fixed words in English and Korean. English is written where it is said; ``korean.toml`` says the same.

Names that people gave (encoders, tasks, artifacts) and the field's own terms (R², cls, gap) are never translated.
"""

from __future__ import annotations

import contextlib
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LANGUAGES = ("en", "ko")
KOREAN: dict[str, str] = tomllib.loads(Path(__file__).with_name("korean.toml").read_text(encoding="utf-8"))
_language: ContextVar[str] = ContextVar("language", default="en")


@contextlib.contextmanager
def speaking(language: str) -> Iterator[None]:
    """Say everything inside in one of `LANGUAGES`."""
    before = _language.set(language)
    try:
        yield
    finally:
        _language.reset(before)


def spoken() -> str:
    """The language that is spoken now."""
    return _language.get()


def say(text: str, /, **fields: object) -> str:
    """A sentence in the language spoken; `fields` fill its braces. What has no Korean (a name) stays as it is."""
    template = KOREAN.get(text, text) if _language.get() == "ko" else text
    return template.format(**fields) if fields else template
