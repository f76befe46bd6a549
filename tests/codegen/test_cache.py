"""The folder of compiled kernels: private, shared by processes, and never trusted blindly."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stq_compile.codegen.cpp import build as building
from stq_compile.codegen.cpp import cache
from stq_compile.codegen.cpp.build import build
from stq_compile.errors import KernelBuildError, KernelCacheWarning

SOURCE = """#include <cstdint>
extern "C" void run(const void*, int64_t, uint64_t, int, void*) {}
extern "C" int64_t scratch_bytes(int64_t, int) { return 0; }
extern "C" int64_t row_bytes() { return %d; }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call of the compiler, by folder."""
    calls: list[str] = []
    real = building.compile_in

    def counted(folder: Path, *rest: Any) -> Path:
        calls.append(str(folder))
        return real(folder, *rest)

    monkeypatch.setattr(building, "compile_in", counted)
    return calls


def test_a_kernel_is_built_once(folder: Path, builds: list[str]) -> None:
    assert build("k", SOURCE % 24).row_bytes == 24
    assert build("k", SOURCE % 24).row_bytes == 24
    assert len(builds) == 1
    assert build("k", SOURCE % 32).row_bytes == 32
    assert len(builds) == 2


def test_the_next_process_finds_it(folder: Path) -> None:
    code = (
        "import sys; from stq_compile.codegen.cpp import build as b\n"
        "def never(*_): raise SystemExit('compiled')\n"
        "if len(sys.argv) > 1: b.compile_in = never\n"
        f"print(b.build('k', {SOURCE % 40!r}).row_bytes)"
    )
    for more in ([], ["warm"]):
        run = subprocess.run(
            [sys.executable, "-c", code, *more], capture_output=True, text=True, check=True
        )
        assert run.stdout.split() == ["40"]


def test_what_the_machine_code_depends_on_is_in_the_key(
    folder: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build("k", SOURCE % 24)
    monkeypatch.setattr(building, "_toolchain", lambda compiler: ("another processor",))
    build("k", SOURCE % 24)
    monkeypatch.setattr(building, "FLAGS", (*building.FLAGS, "-DX"))
    build("k", SOURCE % 24)
    monkeypatch.setattr(building, "_run_time_library", lambda: "// changed")
    build("k", SOURCE % 24)
    assert len(builds) == 4


def test_the_folder_is_private(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    build("k", SOURCE % 24)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(f.suffix for f in folder.iterdir()) == [".sha256", ".so"]


@pytest.mark.parametrize("damage", ["cut", "replaced", "empty", "no hash", "hash of another"])
def test_a_damaged_file_is_built_again(folder: Path, builds: list[str], damage: str) -> None:
    build("k", SOURCE % 24)
    (library,) = folder.glob("*.so")
    (noted,) = folder.glob("*.sha256")
    content = library.read_bytes()
    library.unlink()  # the loaded file stays as it is
    library.write_bytes({"cut": content[:-9], "empty": b""}.get(damage, content))
    if damage == "replaced":
        library.write_bytes(content.replace(b"row_bytes", b"row_bytez"))
    elif damage == "no hash":
        noted.unlink()
    elif damage == "hash of another":
        noted.write_text("0" * 64)
    assert build("k", SOURCE % 24).row_bytes == 24
    assert len(builds) == 2


@pytest.mark.parametrize("obstacle", ["a file", "another user's", "a link", "open to all"])
def test_a_folder_that_cannot_be_trusted_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    place = tmp_path / "kernels"
    monkeypatch.setenv(cache.VARIABLE, str(place))
    if obstacle == "a file":
        place.write_text("")
    elif obstacle == "a link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    elif obstacle == "open to all":
        tmp_path.chmod(0o777)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.warns(KernelCacheWarning, match=cache.VARIABLE):
        assert build("k", SOURCE % 24).row_bytes == 24
    assert place.is_file() or not list(place.iterdir())
    assert cache.folder() != place
    assert stat.S_IMODE(cache.folder().stat().st_mode) == 0o700


def test_a_failing_compiler_leaves_nothing(folder: Path) -> None:
    with pytest.raises(KernelBuildError, match="error"):
        build("k", "this is no C++")
    assert not list(folder.iterdir())
