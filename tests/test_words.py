"""The report's words: everything that is said has its Korean, with the same fields, and nothing is left over."""

import ast
import re
import string
from pathlib import Path

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
