"""The list of hand-made faults is sound; `make mutations` runs it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mutations import MUTATIONS, ROOT, Mutation, apply


def test_there_are_many_faults_of_all_parts() -> None:
    assert len(MUTATIONS) >= 30
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    files = {m.file for m in MUTATIONS}
    for part in ("formats", "reference", "expand", "runtime", "storage", "planner", "saved_state"):
        assert any(part in file for file in files), part


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_fault_finds_its_place_and_its_tests(mutation: Mutation, tmp_path: Path) -> None:
    copy = tmp_path / mutation.file
    copy.parent.mkdir(parents=True)
    before = (ROOT / mutation.file).read_text()
    copy.write_text(before)
    apply(mutation, tmp_path)
    after = copy.read_text()
    assert after != before
    if copy.suffix == ".py":
        ast.parse(after)
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        functions = [
            n.name
            for n in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(n, ast.FunctionDef)
        ]
        assert name in functions, test


def test_a_fault_without_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old in ("x = 1", "y"):
        with pytest.raises(ValueError, match="needs one"):
            apply(Mutation("name", "a.py", old, "z", ()), tmp_path)


@pytest.mark.slow
def test_the_nightly_profile_tries_ten_thousand_examples() -> None:
    command = [sys.executable, "-m", "pytest", "-s", "-q", "--collect-only", "-m", "hypothesis"]
    done = subprocess.run(
        command, cwd=ROOT, text=True, check=True,
        env={**os.environ, "HYPOTHESIS_PROFILE": "nightly"},
        stdout=subprocess.PIPE,
    )  # fmt: skip
    found = re.search(r"properties are tried on (\d+) examples", done.stdout)
    assert found is not None
    assert int(found[1]) >= 10_000
