"""The words of the design, read from the source: a boolean array is no mask, a share is a fraction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARES = ("mask_ratio", "final_mask_ratio", "mlp_ratio")


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of all that a file names itself: variables, arguments, attributes, functions, classes, aliases, keywords of calls."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case (
                ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.alias(asname=str(name))
            ):
                yield node.lineno, name
            case ast.Call(func=function, keywords=keywords):
                torch = ast.unparse(function).split(".")[0] in ("torch", "F", "nn")
                yield from ((word.value.lineno, word.arg) for word in keywords if word.arg and not (torch and word.arg == "attn_mask"))


def complaint(name: str) -> str:
    """What is wrong with a name; empty if nothing is."""
    lower = name.lower()
    if lower == "mask" or lower.endswith("_mask"):
        return "a boolean array is called hidden or valid"
    if lower.endswith(("_pct", "_percent", "_ratio")) and lower not in SHARES:
        return "a share is called *_fraction and lies in [0, 1]"
    return ""


@pytest.mark.parametrize("package", ["mae_core", "modalities", "pipelines"])
def test_names_keep_to_the_words(package: str) -> None:
    wrong = []
    for file in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        wrong += [f"{file.relative_to(ROOT)}:{line} {name}: {text}" for line, name in names(tree) if (text := complaint(name))]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "mask = 1",
        "self.loss_mask = 1",
        "def f(token_mask): ...",
        "for mask in x: ...",
        "class A:\n  cloud_pct: float",
        "train_ratio = 1",
        "with x as mask: ...",
        "import m as mask",
        "average(x, mask=y)",
        "average(x, attn_mask=y)",
        "def make_mask(): ...",
        "lambda mask: 1",
        "(mask := 1)",
        "match x:\n  case [mask]: ...",
    ],
)
def test_a_wrong_word_is_seen(code: str) -> None:
    assert [name for _, name in names(ast.parse(code)) if complaint(name)]


@pytest.mark.parametrize(
    "code", ["mask_ratio = mlp_ratio = 0.75", "F.scaled_dot_product_attention(q, attn_mask=x)", "y = dataset.read_mask()", "masking = 1"]
)
def test_a_right_word_is_let_pass(code: str) -> None:
    assert not [name for _, name in names(ast.parse(code)) if complaint(name)]
