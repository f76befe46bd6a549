"""A compiler that is missing, fails or hangs, and a folder of kernels that fails: training goes on,
more slowly, and says so."""

from __future__ import annotations

import errno
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config, cpp_builder

import stq_compile as stq
from models import backward, make_model
from stq_compile.codegen.cpp import build as building
from stq_compile.codegen.cpp import cache, compiler
from stq_compile.errors import (
    EagerStepWarning,
    KernelBuildError,
    KernelCacheWarning,
    PlanningWarning,
)
from trajectory import Run, planned, session

Use = Callable[[str], None]

COMPILERS = {
    "missing": "",
    "fails": "#!/bin/sh\necho 'cc1plus: killed by nobody' >&2\nexit 1\n",
    "hangs": "#!/bin/sh\nsleep 600\n",
    "hangs at work": '#!/bin/sh\ncase "$*" in\n*kernel.cpp*) sleep 600;;\n'
    '*) exec g++ "$@";;\nesac\n',
    "fails at work": '#!/bin/sh\ncase "$*" in\n*kernel.cpp*) echo broken; exit 1;;\n'
    '*) exec g++ "$@";;\nesac\n',
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def use(tmp_path: Path) -> Iterator[Use]:
    """Puts another compiler in the place of g++."""
    path = tmp_path / "compiler"

    def forget() -> None:
        cpp_builder.cpp_compiler_search.cache_clear()
        compiler.introduce.cache_clear()

    def put(text: str) -> None:
        if text:
            path.write_text(text)
            path.chmod(0o755)
        forget()
        replaced.enter_context(config.patch({"cpp.cxx": (None, str(path))}))

    with ExitStack() as replaced:
        yield put
    forget()


@pytest.mark.parametrize("name", COMPILERS)
def test_a_step_without_a_compiler_runs_eagerly_and_says_what_that_costs(
    use: Use, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "hangs" in name:
        monkeypatch.setenv(compiler.VARIABLE, "3")
    use(COMPILERS[name])
    model = make_model()
    optimizer = stq.compile(
        torch.optim.AdamW(model.named_parameters(), lr=0.01), min_numel=64, precision=8
    )
    backward(model, 0)
    started = time.monotonic()
    said = "did not end" if "hangs" in name else "compiles nothing|No working C"
    reason = rf"several times as long[\s\S]*({said})[\s\S]*stq doctor"
    with pytest.warns(EagerStepWarning, match=reason):
        optimizer.step()
    assert time.monotonic() - started < 60
    assert "C++ compiler" in stq.report(optimizer).note
    stock = make_model()
    other = torch.optim.AdamW(stock.parameters(), lr=0.01)
    for step in range(3):
        if step:
            backward(model, step)
            optimizer.step()
        backward(stock, step)
        other.step()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
    packed = [
        s for e in optimizer.state.values() for s in e.values() if isinstance(s, stq.PackedState)
    ]
    assert len(packed) == 6
    assert all(s.format.width == 8 for s in packed)


def test_a_hanging_compiler_leaves_no_process(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.VARIABLE, "3")
    use(COMPILERS["hangs"])
    with pytest.raises(KernelBuildError, match=rf"did not end[\s\S]*{compiler.VARIABLE}"):
        building.build("k", "")
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue  # it has ended
        if b"sleep 600" in line:
            left.append(line)
    assert not left


def test_a_compiler_that_is_lost_later_leaves_the_widths(use: Use) -> None:
    """A decision on widths, which needs new kernels; training does not notice but for a warning."""
    run = Run.start(planned)
    for _ in range(3):
        run.advance()
    use("")
    before = dict(session(run.optimizer).plan)
    changes = {key: 5 if width != 5 else 6 for key, width in before.items()}
    planner = session(run.optimizer).planner
    assert planner is not None
    planner.decide = lambda *_: planner.widths.update(changes) or changes  # type: ignore[method-assign,func-returns-value]
    with pytest.warns(PlanningWarning, match=r"could not change widths[\s\S]*stq doctor"):
        run.advance()
    vars(planner).pop("decide")
    assert session(run.optimizer).plan == before == planner.widths
    assert session(run.optimizer).steps == 4
    assert not stq.report(run.optimizer).note  # steps are still compiled
    run.advance()


def test_an_error_of_our_own_is_not_blamed_on_the_compiler() -> None:
    with pytest.raises(KernelBuildError) as found:
        building.build("k", "this is no C++")
    assert "compiles nothing" not in str(found.value)
    assert found.value.__cause__ is not None


SOURCE = """#include <cstdint>
extern "C" void run(const void*, int64_t, uint64_t, int, void*) {}
extern "C" int64_t scratch_bytes(int64_t, int) { return 0; }
extern "C" int64_t row_bytes() { return 8; }
"""


@pytest.mark.parametrize("problem", ["full", "full for the compiler", "not executable"])
def test_a_folder_that_fails_midway_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    building.build("k", SOURCE)
    inside = str(folder)
    compile_in, load, full = building.compile_in, building.load, cache._full

    def failing(work: Path, *rest: Any) -> Path:
        if not str(work).startswith(inside):
            return compile_in(work, *rest)
        if problem == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise building.CppCompileError(["g++"], "fatal error: No space left on device")

    def unmapped(name: str, source: str, path: Path) -> building.CompiledKernel:
        if str(path).startswith(inside):
            raise OSError("failed to map segment from shared object")
        return load(name, source, path)

    if problem == "not executable":
        monkeypatch.setattr(building, "load", unmapped)
    else:
        monkeypatch.setattr(building, "compile_in", failing)
    monkeypatch.setattr(cache, "_full", lambda path: str(path) == inside or full(path))
    with pytest.warns(KernelCacheWarning, match=r"No space left|map segment|CppCompileError"):
        assert building.build("k", SOURCE + "// another\n").row_bytes == 8
    assert cache.folder() != folder
    building.build("k", SOURCE + "// a third\n")  # no second warning: pytest would show it


def test_a_folder_that_is_lost_midway_is_given_up(folder: Path) -> None:
    building.build("k", SOURCE)
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.warns(KernelCacheWarning, match="exists"):
        assert building.build("k", SOURCE).row_bytes == 8


def test_a_full_folder_is_seen_by_writing(folder: Path) -> None:
    """A limit of the system on the size of files stands for a full disk."""
    folder.mkdir()
    assert not cache._full(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (cache.ROOM // 2, before[1]))
    try:
        assert cache._full(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, former)
