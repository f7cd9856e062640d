"""Tables as text: every hostile string arrives as it is, every table fits, and LaTeX itself takes them."""

import re
import shutil
import subprocess

import polars as pl
import pytest

from avrl.tables import Table
from avrl.typeset import latex, markdown

HOSTILE = (
    "<script>alert(1)</script>",
    "|a_b%c&d#e~f^g$h",
    "\\input{/etc/passwd}",
    "*star [1] {x}",
    "a--b `c` 'd' \"e\"",
    "R² · − ▲ ★ ≈ ○ ± × → ≤ … °",
    "0 [\\input{x}] best",
)
CELLS = ("0.330 [0.240, 0.380] best", "-0.100 [-0.200, 0.001] tied", "not measured: 50% of_it", "+12.0% [+1, +2] pass")
DOCUMENT = (
    "\\documentclass{{article}}\\usepackage{{array,booktabs,longtable}}\\begin{{document}}\n{}\\end{{document}}\n"
)


def table(names, columns=9):
    view = pl.DataFrame({"encoder_%": names, **{f"R²_{i}": [CELLS[i % 4]] * len(names) for i in range(columns)}})
    return Table("main-a", "Scores & more", "A caption_with 95% $.", view, view)


def structure(text):
    """Environments and braces opened and closed in order; the cells of each row, by environment."""
    text = re.sub(r"\\shortstack\[l\]\{(.*?)\}(?= &| \\\\)", lambda title: title[1].replace("\\\\", " "), text)
    text = re.sub(r"(?<!\\)%.*", "", text).replace("\\\\", "\n")
    stack, tables = [], []
    for token in re.finditer(
        r"\\begin\{(\w+)\}(?:\{>\{\\raggedright\\arraybackslash\}p\{\d+pt\}(l*)\})?|\\end\{(\w+)\}|\\[^\w\s]|\\\w+|[{}&\n]",
        text,
    ):
        begun, columns, ended = token.groups()
        if begun:
            stack.append(begun)
            tables += [(begun, len(columns) + 1, [0])] if columns is not None else []
        elif ended:
            assert stack.pop() == ended
        elif token[0] == "{":
            stack.append("{")
        elif token[0] == "}":
            assert stack.pop() == "{"
        elif token[0] == "&":
            tables[-1][2][-1] += 1
        elif token[0] == "\n" and tables:
            tables[-1][2].append(0)
    assert stack == []
    return tables


@pytest.mark.parametrize(("names", "kind"), [(HOSTILE, "tabular"), (HOSTILE * 10, "longtable")])
def test_latex_is_balanced_and_each_row_has_its_cells(names, kind):
    text = latex(table(list(names)))
    found = structure(text)
    assert {one for one, _, _ in found} == {kind}
    assert sum(columns - 1 for _, columns, _ in found) == 9  # every column once, the first one in each part
    for _, columns, cells in found:
        assert set(cells) == {0, columns - 1}
        assert cells.count(columns - 1) >= len(names)
    assert text.isascii()
    assert not re.search(r"\\input|\n\[|\n\*|(?<!\\)[#~^]", text)
    assert r"\textbackslash{}input\{/etc/passwd\}" in text


def test_best_and_tied_are_seen_in_each_format():
    tex, md = latex(table(["a best"])), markdown(table(["a best"]))
    assert (
        r"a best & \textbf{0.330} {\tiny [0.240, 0.380]} & \underline{$-$0.100} {\tiny [$-$0.200, 0.001]} & not" in tex
    )
    assert "Bold: best; underlined: tied with it." in tex
    assert r"| a best | **0.330** \[0.240, 0.380\] | *-0.100* \[-0.200, 0.001\] | not measured: 50% of\_it |" in md
    assert "Bold: best; italic: tied with it." in md
    assert "Bold" not in latex(table(["a"], 0)) + markdown(table(["a"], 0))


def test_rows_of_one_name_are_told_apart_in_every_part():
    view = table(["same", "same"], 5).view.with_columns(pl.Series("test tasks", ["all", "unseen"]))
    text = latex(Table("main-a", "Scores", "", view, view))
    assert text.count("Part ") == text.count("& unseen") == text.count("& all") > 1
    assert text.count("Part ") == text.count("same &") / 2


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here: the tables are not set by it")
def test_latex_itself_sets_them_within_its_lines(tmp_path):
    text = latex(table(list(HOSTILE))) + latex(table(list(HOSTILE) * 10))
    (tmp_path / "t.tex").write_text(DOCUMENT.format(text), encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "-draftmode", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
