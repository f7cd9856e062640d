"""The report's words: everything that is said has its Korean, with the same fields, and nothing is left over."""

import ast
import re
import string
from html.parser import HTMLParser
from pathlib import Path

from scored import demo

from avrl import report
from avrl.cache import Cache
from avrl.words import KOREAN, say, speaking

AVRL = Path(__file__).parents[1] / "avrl"
IN_TEMPLATE = re.compile(r"""\bsay\((?:"([^"]*)"|'([^']*)')""")


def said():
    """Every literal that is given to `say`, in code and on the page."""
    found = {a or b for a, b in IN_TEMPLATE.findall((AVRL / "page.html.j2").read_text(encoding="utf-8"))}
    for path in AVRL.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say":
                assert node.args, path
                if isinstance(node.args[0], ast.Constant):
                    found.add(node.args[0].value)
    return found


def fields(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def test_all_that_is_said_has_its_korean():
    assert said() - set(KOREAN) == set()


def test_korean_fills_the_same_fields():
    assert [one for one, other in KOREAN.items() if fields(one) != fields(other)] == []
    assert [one for one, other in KOREAN.items() if not re.search("[가-힣]", other)] == []


def test_the_language_ends_with_its_block():
    with speaking("ko"):
        assert say("not measured") == "측정 안 함"
        assert say("two-stream · cls") == "two-stream · cls"
    assert say("not measured") == "not measured"


class Texts(HTMLParser):
    """What a reader sees, but for code and styles, and what is read out of figures."""

    def __init__(self, html):
        super().__init__()
        self.inside, self.found = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "img", "br"):
            self.inside.append(tag)
        self.found += [value for name, value in attrs if name == "aria-label" and tag == "figure"]

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if data.strip() and not set(self.inside) & {"style", "code"}:
            self.found.append(data.strip())


def test_no_english_sentence_is_left_in_a_korean_report(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    scores, checkpoints = demo(Cache(tmp_path / "cache"))
    with speaking("ko"):
        report.write(out, scores, checkpoints, 100)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert '<html lang="ko">' in html
    told = Texts(html).found
    assert sum(bool(re.search("[가-힣]", one)) for one in told) > 150
    lines = [*told, *(out / "summary.txt").read_text(encoding="utf-8").splitlines()]
    lines += "".join(one.read_text(encoding="utf-8") for one in sorted(out.glob("*.md"))).splitlines()
    english = [one for one in lines if re.search(r"\b(the|of|not|is|are|by|than|with|from|and)\b", one)]
    assert [one for one in english if not re.match(r"[\w ]+ = |avrl ", one)] == []
