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
    # A bracket or a star that begins a row would be an argument of the \\ before it.
    **{char: f"{{{char}}}" for char in "[]*"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "²": r"\textsuperscript{2}",
    "·": r"\textperiodcentered{}",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≈": r"$\approx$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\rightarrow$",
    "○": r"$\circ$",
    "●": r"$\bullet$",
    "★": r"$\star$",
    "▲": r"$\bigtriangleup$",
    "▼": r"$\bigtriangledown$",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
    "°": r"\textdegree{}",
}
_NUMBER = re.compile(r"([+-]?[\d.,]+%?)( \[[-+\d., ]*\])?( .*)?")  # and what stands behind it: its interval, words
_BEST, _TIED = "best", "tied"  # how a cell ends that is marked
_PAGE = 30  # rows, some of two lines; more go over pages
# Points: a line of LaTeX's article, a column's margins, a character of \scriptsize, one of an interval in \tiny.
_LINE, _MARGIN, _CHARACTER, _SMALL = 345, 6, 4.2, 3.1
_PROSE = 130  # points; a column of sentences is broken into lines
_FIRST, _TITLE = 104, 13  # points that the first column may take, characters of a title; beyond that they are broken


def markdown(table: Table) -> str:
    """A pipe table under a heading; best in bold, ties in italics. Brackets are escaped: they would open a link."""
    names, *cells = _rows(table.view)
    head = [escape_markdown(one) for one in names]
    body = ([escape_markdown(row[0]), *(_in_markdown(one) for one in row[1:])] for row in cells)
    rows = [head, ["---"] * table.view.width, *body]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    legend = say(" Bold: best; italic: tied with it.") * _is_marked(table)
    return f"## {escape_markdown(table.title)}\n\n{escape_markdown(table.caption + legend)}\n\n{lines}\n"


def _in_markdown(text: str) -> str:
    bare, mark = _unmarked(text)
    value, space, rest = escape_markdown(bare).partition(" ")
    around = {_BEST: "**", _TIED: "*"}.get(mark, "")
    return f"{around}{value}{around}{space}{rest}"


def latex(table: Table) -> str:
    """Tables that fit: as many columns as a line holds, the rest in the next; over pages where there are many rows.

    Intervals are small, best is bold and ties are underlined. Korean needs a document that loads a font for it (kotex).
    """
    parts = _parts(table.view)
    legend = say(" Bold: best; underlined: tied with it.") * _is_marked(table)
    found = [r"% needs \usepackage{array,booktabs,longtable}; Korean needs kotex"]
    for number, names in enumerate(parts, 1):
        part = say(" Part {number} of {all}.", number=number, all=len(parts)) if len(parts) > 1 else ""
        text = escape_latex(f"{table.title}. {table.caption}{legend}{part}")
        label = table.name + (f"-{number}" if number > 1 else "")
        found.append(_set(table.view.select(names), f"\\caption{{{text}}}\\label{{tab:{label}}}"))
    return "\n".join(found) + "\n"


def _set(view: pl.DataFrame, caption: str) -> str:
    """One table of LaTeX: a float, or one that goes over pages."""
    names, *cells = _rows(view)
    titles = (r"\\".join(map(escape_latex, _broken(one))) for one in names)
    head = " & ".join(f"\\shortstack[l]{{{one}}}" for one in titles)
    rows = [[escape_latex(row[0]), *(_in_latex(one) for one in row[1:])] for row in cells]
    body = "\n".join(" & ".join(row) + r" \\" for row in rows)
    header = f"\\toprule\n{head} \\\\\n\\midrule\n"
    style = f"\\scriptsize\\setlength{{\\tabcolsep}}{{{_MARGIN / 2:.0f}pt}}"
    first = min(_FIRST, max(map(_width, [view.columns[0], *map(str, view.to_series())])))
    widths = [first, *(max(map(_width, map(str, view[name])), default=0) for name in view.columns[1:])]
    columns = "".join(
        f">{{\\raggedright\\arraybackslash}}p{{{min(width, _PROSE):.0f}pt}}" if not place or width > _PROSE else "l"
        for place, width in enumerate(widths)
    )
    if len(rows) <= _PAGE:
        inner = f"\\begin{{tabular}}{{{columns}}}\n{header}{body}\n\\bottomrule\n\\end{{tabular}}"
        return f"\\begin{{table}}\n\\centering{style}\n{caption}\\smallskip\n\n{inner}\n\\end{{table}}"
    header = f"{caption}\\\\\n{header}\\endfirsthead\n{header}\\endhead\n"
    return f"{{{style}\n\\begin{{longtable}}{{{columns}}}\n{header}{body}\n\\bottomrule\n\\end{{longtable}}}}"


def _in_latex(text: str) -> str:
    bare, mark = _unmarked(_one_line(text))
    found = _NUMBER.fullmatch(bare)
    if not found:
        return escape_latex(text)
    value, interval = (one.replace("-", "$-$") for one in (found[1], found[2] or ""))
    value = {_BEST: f"\\textbf{{{value}}}", _TIED: f"\\underline{{{value}}}"}.get(mark, value).replace("%", r"\%")
    return value + (f" {{\\tiny{interval}}}" if interval else "") + escape_latex(found[3] or "")


def _parts(view: pl.DataFrame) -> list[list[str]]:
    """Column names by table, so that none is wider than a line; what tells one row from another is in each."""
    first, *names = view.columns
    twice = view.select(first).is_duplicated().any()
    keys = [first, *[one for one in names if twice and not view.select(first, one).is_duplicated().any()][:1]]
    widths = {name: max(map(_width, [*_broken(name), *map(str, view[name])])) for name in view.columns}
    widths = {name: min(width, _PROSE + _MARGIN) for name, width in widths.items()}
    widths[first] = min(_FIRST, widths[first]) + _MARGIN
    parts: list[list[str]] = [[]]
    for name in names:
        here = dict.fromkeys([*keys, *parts[-1], name])
        if parts[-1] and sum(widths[one] for one in here) > _LINE:
            parts.append([])
        parts[-1].append(name)
    return [list(dict.fromkeys([first, *(one for one in keys if one not in part), *part])) for part in parts]


def _broken(title: str) -> list[str]:
    """A title, in two lines if it is long, broken at the space nearest to its middle."""
    spaces = [at for at, char in enumerate(title) if char == " "] if len(title) > _TITLE else []
    at = min(spaces, key=lambda one: abs(one - len(title) / 2), default=len(title))
    return [one for one in (title[:at], title[at + 1 :]) if one] or [""]


def _width(text: str) -> float:
    bare, _ = _unmarked(text)
    found = _NUMBER.fullmatch(bare)
    interval = len(found[2] or "") if found else 0
    return _MARGIN + _SMALL * interval + _CHARACTER * (_cells(bare) - interval)


def _unmarked(text: str) -> tuple[str, str]:
    """A cell without the word that says that it is best or tied, and that word."""
    mark = next((one for one in (_BEST, _TIED) if text.endswith(f" {say(one)}")), "")
    return text.removesuffix(f" {say(mark)}") if mark else text, mark


def _is_marked(table: Table) -> bool:
    return any(_unmarked(str(one))[1] for row in table.view.iter_rows() for one in row[1:])


def plain(view: pl.DataFrame, limit: int, width: int) -> str:
    """Aligned columns for a terminal: at most `limit` rows, as many columns as `width` holds; Korean counts double."""
    rows = [[_one_line(one) for one in row] for row in _rows(view)]
    shown = rows[: limit + 1]
    widths = [max(_cells(row[i]) for row in shown) for i in range(view.width)]
    kept = max(1, sum(sum(widths[: i + 1]) + 2 * i <= width for i in range(view.width)))
    lines = [
        "  ".join(one + " " * (w - _cells(one)) for one, w in zip(row, widths[:kept], strict=False)) for row in shown
    ]
    more = ((len(rows) - len(shown), say("row"), say("rows")), (view.width - kept, say("column"), say("columns")))
    left = [f"{count} {one if count == 1 else several}" for count, one, several in more if count]
    lines += [say("... on the page as well: {what}", what=", ".join(left))] * bool(left)
    return "\n".join(line.rstrip() for line in lines)


def escape_markdown(text: str) -> str:
    """Text that markdown shows as it is."""
    return "".join(_MARKDOWN.get(char, char) for char in _one_line(text))


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is; two hyphens are no dash."""
    return "".join(_LATEX.get(char, char) for char in _one_line(text).replace("--", "-\0-")).replace("\0", "{}")


def _one_line(text: str) -> str:
    """No line breaks, no control characters: a name cannot end its row or drive a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


def _rows(view: pl.DataFrame) -> list[list[str]]:
    """Header and cells; fixed words in the language spoken."""
    return [[say(str(one)) for one in row] for row in (view.columns, *view.iter_rows())]


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
