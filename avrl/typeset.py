"""Tables as text: markdown, LaTeX and plain columns. Every string is escaped for the format it goes into."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from avrl.words import say

if TYPE_CHECKING:
    import polars as pl

    from avrl.tables import Table

# Characters that start markup somewhere in CommonMark or GitHub's dialect; < > & for the HTML inside it.
_MARKDOWN = {**{char: "\\" + char for char in "\\`*_{}[]|#~$"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"}
_LATEX = {
    **{char: "\\" + char for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "²": r"\textsuperscript{2}",
    "·": r"\textperiodcentered{}",
    "−": r"\textminus{}",
}


def markdown(table: Table) -> str:
    """A pipe table under a heading. Interval brackets are escaped too: they would open a link."""
    head, *body = _rows(table.view)
    lines = [head, ["---"] * table.view.width, *body]
    rows = ["| " + " | ".join(one if one == "---" else escape_markdown(one) for one in row) + " |" for row in lines]
    return f"## {escape_markdown(table.title)}\n\n{escape_markdown(table.caption)}\n\n" + "\n".join(rows) + "\n"


def latex(table: Table) -> str:
    """A booktabs table; Korean needs a document that loads a font for it (kotex with XeLaTeX)."""
    head, *body = [" & ".join(escape_latex(one) for one in row) + r" \\" for row in _rows(table.view)]
    spec = "".join("l" for _ in table.view.columns)
    inner = "\n".join([r"\toprule", head, r"\midrule", *body, r"\bottomrule"])
    return (
        f"% needs \\usepackage{{booktabs}}\n\\begin{{table}}\n\\caption{{{escape_latex(table.caption)}}}\n"
        f"\\begin{{tabular}}{{{spec}}}\n{inner}\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def plain(view: pl.DataFrame, limit: int, width: int) -> str:
    """Aligned columns for a terminal: at most `limit` rows, as many columns as `width` holds; Korean counts double."""
    rows = [[_one_line(one) for one in row] for row in _rows(view)]
    shown = rows[: limit + 1]
    widths = [max(_cells(row[i]) for row in shown) for i in range(view.width)]
    kept = max(1, sum(sum(widths[: i + 1]) + 2 * i <= width for i in range(view.width)))
    lines = [
        "  ".join(one + " " * (w - _cells(one)) for one, w in zip(row, widths[:kept], strict=False)) for row in shown
    ]
    more = {say("rows"): len(rows) - len(shown), say("columns"): view.width - kept}
    left = [f"{count} {what}" for what, count in more.items() if count]
    lines += [say("... and {what} more on the page", what=", ".join(left))] * bool(left)
    return "\n".join(line.rstrip() for line in lines)


def escape_markdown(text: str) -> str:
    """Text that markdown shows as it is."""
    return "".join(_MARKDOWN.get(char, char) for char in _one_line(text))


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(char, char) for char in _one_line(text))


def _one_line(text: str) -> str:
    """No line breaks, no control characters: a name cannot end its row or drive a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


def _rows(view: pl.DataFrame) -> list[list[str]]:
    """Header and cells; fixed words in the language spoken."""
    return [[say(str(one)) for one in row] for row in (view.columns, *view.iter_rows())]


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
