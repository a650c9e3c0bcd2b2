"""The table of faults is whole: every one is shown by tests that are there, and what happened is told as it was."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.faults.faults import FAULTS, ROOT, Fault, Outcomes, happened, table

ON_A_GPU = 24


@cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault.number))
def test_a_fault_is_shown_by_tests_that_are_there(fault: Fault) -> None:
    assert fault.tests
    parts = [name.partition("::") for name in fault.tests]
    missing = [file for file, _, _ in parts if not (ROOT / file).is_file()]
    assert not missing
    missing = [f"{file}::{name}" for file, _, name in parts if name not in functions(file)]
    assert not missing, "renamed or gone: put the new name into tests/faults/faults.py"


def test_every_fault_stands_in_the_table_once_and_only_that_of_a_gpu_is_excepted() -> None:
    assert [fault.number for fault in FAULTS] == list(range(1, 25))
    assert [fault.number for fault in FAULTS if fault.exception] == [ON_A_GPU]


def report(name: str, outcome: str, when: str = "call") -> pytest.TestReport:
    return pytest.TestReport(name, ("", 0, ""), {}, outcome, None, when)  # type: ignore[arg-type]


def test_what_happened_is_told_as_it_was() -> None:
    fault, outcomes = Fault(7, "a", "b", ("tests/t.py::test_x", "tests/t.py::test_y"), "c"), Outcomes()
    for name, outcome, when in (("x[1]", "passed", "call"), ("x[2]", "passed", "call"), ("x[2]", "passed", "teardown")):
        outcomes.pytest_runtest_logreport(report(f"tests/t.py::test_{name}", outcome, when))
    assert happened(fault, outcomes.of(fault)) == "1 not run, 2 passed; c"
    outcomes.pytest_runtest_logreport(report("tests/t.py::test_y", "passed"))
    assert table([fault], outcomes).splitlines()[2] == "| 7 | a | b | as expected (3 passed); c |"
    outcomes.pytest_runtest_logreport(report("tests/t.py::test_y", "failed", "setup"))
    outcomes.pytest_runtest_logreport(report("tests/t.py::test_x[3]", "skipped", "setup"))
    assert happened(fault, outcomes.of(fault)) == "1 failed, 3 passed, 1 skipped; c"
