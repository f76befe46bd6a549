"""Goldens: expected text in a file beside the tests, compared byte for byte.

A test that asks for the fixture ``golden`` owns ``goldens/<module>/<test>.<suffix>``. Run with
``--update-goldens`` to write the files anew. A file that no test owns fails the run, and so does a
test that asks for its golden and never compares it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = "goldens"
OPTION = "--update-goldens"


@dataclass
class Golden:
    """The golden of one test."""

    stem: Path
    update: bool
    compared: bool = False

    def __call__(self, text: str, suffix: str = ".txt") -> None:
        """Compare ``text``, which ends without a newline, with the file."""
        self.compared = True
        file = self.stem.with_name(self.stem.name + suffix)
        found = text.rstrip("\n").encode() + b"\n"
        if self.update:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(found)
            return
        if not file.exists():
            pytest.fail(f"no golden {file}; run pytest with {OPTION}")
        if file.read_bytes() != found:
            pytest.fail(f"{_difference(file, found)}\nrun pytest with {OPTION} if it is right")


def _difference(file: Path, found: bytes) -> str:
    old, new = (b.decode().splitlines() for b in (file.read_bytes(), found))
    lines = difflib.unified_diff(old, new, str(file), "this run", lineterm="")
    return "\n".join(lines) or f"{file}: the bytes differ, the lines do not"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    stem = _stem(request.path, request.node.name)
    mine = Golden(stem, request.config.getoption(OPTION))
    yield mine
    if not mine.compared:
        pytest.fail(f"{request.node.name} asks for a golden and compares none")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="write the golden files anew")


@pytest.hookimpl(tryfirst=True)  # before -k and -m take tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any("::" in argument for argument in config.args):
        return  # modules are collected in part
    tests = Path(__file__).parent
    modules = {item.path.stem for item in items}
    owned = {
        _stem(item.path, item.name)
        for item in items
        if "golden" in getattr(item, "fixturenames", ())
    }
    existing = {path.stem for path in tests.rglob("test_*.py")}
    unused = [
        str(file.relative_to(tests))
        for file in sorted((tests / FOLDER).glob("*/*"))
        if file.parent.name in modules or file.parent.name not in existing
        if file.with_suffix("") not in owned
    ]
    if unused:
        raise pytest.UsageError(f"no test compares these goldens; delete them: {unused}")


def _stem(module: Path, test: str) -> Path:
    name = re.sub(r"[^\w-]+", "_", test).strip("_")
    return Path(__file__).parent / FOLDER / module.stem / name
