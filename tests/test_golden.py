"""The golden fixture itself: what it lets pass, and what it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TEST = """
def test_text(golden):
    golden("one\\ntwo")

def test_none():
    pass
"""
CONFTEST = "from golden import golden, pytest_addoption, pytest_collection_modifyitems\n"
UNCOMPARED = "def test_text(golden):\n    pass\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tests with the fixture and one golden."""
    shutil.copy(Path(__file__).parent / "golden.py", tmp_path)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TEST)
    (tmp_path / "goldens/test_it").mkdir(parents=True)
    (tmp_path / "goldens/test_it/test_text.txt").write_bytes(b"one\ntwo\n")
    return tmp_path


def pytest_in(folder: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_equal_bytes_pass(folder: Path) -> None:
    assert pytest_in(folder)[0] == 0


def test_other_bytes_fail_with_the_difference_and_update_mends_them(folder: Path) -> None:
    file = folder / "goldens/test_it/test_text.txt"
    file.write_bytes(b"one\nthree\n")
    code, output = pytest_in(folder)
    assert code == 1
    assert "-three" in output
    assert "+two" in output
    assert pytest_in(folder, "--update-goldens")[0] == 0
    assert file.read_bytes() == b"one\ntwo\n"


def test_a_missing_golden_fails(folder: Path) -> None:
    (folder / "goldens/test_it/test_text.txt").unlink()
    code, output = pytest_in(folder)
    assert code == 1
    assert "no golden" in output


@pytest.mark.parametrize("orphan", ["test_it/test_none.txt", "test_gone/test_text.txt"])
def test_a_golden_that_no_test_owns_fails_the_run(folder: Path, orphan: str) -> None:
    file = folder / "goldens" / orphan
    file.parent.mkdir(exist_ok=True)
    file.write_text("left over")
    code, output = pytest_in(folder, "-k", "test_text")
    assert code != 0
    assert orphan in output


def test_a_golden_that_is_asked_for_must_be_compared(folder: Path) -> None:
    (folder / "test_it.py").write_text(UNCOMPARED)
    code, output = pytest_in(folder)
    assert code == 1
    assert "compares none" in output
