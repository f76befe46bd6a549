"""pyproject.toml lists every package, and every entry point leads somewhere."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("passes", "codegen")  # import as stq_compile.passes and stq_compile.codegen


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    folders = {
        file.parent.relative_to(ROOT)
        for top in ("stq_compile", *MAPPED)
        for file in (ROOT / top).rglob("*.py")
    }
    expected = {
        ".".join(("stq_compile", *folder.parts) if folder.parts[0] in MAPPED else folder.parts): (
            folder.as_posix()
        )
        for folder in folders
    }
    setuptools = _pyproject()["tool"]["setuptools"]
    assert set(setuptools["packages"]) == set(expected)
    assert setuptools["package-dir"] == expected


def test_entry_points_can_be_loaded() -> None:
    project = _pyproject()["project"]
    for group in (project.get("scripts", {}), *project.get("entry-points", {}).values()):
        for target in group.values():
            module, _, name = target.partition(":")
            found = importlib.import_module(module)
            assert not name or callable(getattr(found, name)), target


def test_headers_are_shipped() -> None:
    data = _pyproject()["tool"]["setuptools"]["package-data"]
    for header in (ROOT / "codegen").rglob("*.h"):
        package = ".".join(("stq_compile", *header.parent.relative_to(ROOT).parts))
        assert "*.h" in data[package]


def test_what_is_no_code_is_shipped() -> None:
    data = _pyproject()["tool"]["setuptools"]["package-data"]
    shipped = {
        f
        for package, patterns in data.items()
        for pattern in patterns
        for f in (ROOT / package.replace(".", "/").replace("stq_compile/codegen", "codegen")).glob(
            pattern
        )
    }
    present = {
        f
        for folder in ("stq_compile", *MAPPED)
        for f in (ROOT / folder).rglob("*.*")
        if f.is_file() and f.suffix not in (".py", ".pyc", ".so")
    }
    assert present <= shipped
