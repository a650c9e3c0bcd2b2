"""Every reason code that the program gives is in the table of reasons, and every one of the table is given."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import modalities
from modalities.bids import CODES
from modalities.policies import VolumePolicies
from modalities.reasons import REASONS

SOURCES = sorted(Path(modalities.__file__).parent.glob("*.py"))
GIVES = {"SceneError": 1, "Refused": 3}
"""What carries a code, and at which place among its arguments."""


def given(tree: ast.AST) -> Iterator[str]:
    """The codes that are written in a file; a code handed on from elsewhere (`error.code`) is none of its own."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in GIVES:
            continue
        place = GIVES[node.func.id]
        codes = [*node.args[place : place + 1], *(word.value for word in node.keywords if word.arg == "code")]
        for code in codes:
            words = [part.value for part in ast.walk(code) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            assert words or isinstance(code, ast.Attribute | ast.Name), ast.unparse(node)
            yield from (word for word in words if word)


def test_what_is_looked_for_is_found() -> None:
    text = """
raise SceneError("no", "a")
Refused(f, p, "r", "b" if x else "c"); SceneError("d"); SceneError("e", code="f"); SceneError(str(e), e.code)
"""
    assert list(given(ast.parse(text))) == ["a", "b", "c", "f"]


def test_every_code_has_a_meaning_and_every_meaning_a_use() -> None:
    used = {code for file in SOURCES for code in given(ast.parse(file.read_text(encoding="utf-8")))}
    assert used | CODES | set(VolumePolicies.model_fields) == set(REASONS)


def test_the_table_is_in_order_and_each_line_is_short_and_says_what_to_do() -> None:
    assert list(REASONS) == sorted(REASONS)
    for code, reason in REASONS.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", code)
        assert reason.meaning[0].isupper(), code
        assert reason.remedy, code
        assert len(reason.meaning) <= 100, code
