"""What comes from others (checkpoints, run files, paths, names) is data: never run, never trusted.

The folder of kernels has tests of its own (`codegen/test_cache.py`).
"""

from __future__ import annotations

import ast
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import stq_compile as stq
from models import backward, make_model
from stq_compile import codegen, failures, passes
from stq_compile.cli import app
from stq_compile.cli.common import one_line
from stq_compile.errors import CheckpointError
from stq_compile.printable import printable
from stq_compile.reporting import run_file
from stq_compile.reporting.page import render
from trajectory import Run, planned

EVIL = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)' x=\"",
    "</title></style></svg><!--",
    "{{7*7}}{% raw %}[link=file:///etc/passwd]x[/link][/bold]",
    "]]>&lt;&#60;\u2028\u2029",
    "\x1b]0;owned\x07\x1b[2J\r\b\x9b31m",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a short planned run."""
    run = Run.start(planned)
    for step in range(3):
        run.advance()
        stq.log(run.optimizer, 1.0 - step / 10)
    path = tmp_path_factory.mktemp("runs") / "run.jsonl"
    stq.report(run.optimizer).save(path)
    return path


def poisoned(value: Any, evil: str) -> Any:
    """All texts of a JSON value with ``evil`` behind; keys of records stay."""
    if isinstance(value, str):
        return value + evil
    if isinstance(value, list):
        return [poisoned(v, evil) for v in value]
    if isinstance(value, dict):
        return {k: poisoned(v, evil) for k, v in value.items()}
    return value


def poisoned_file(saved: Path, evil: str, folder: Path) -> Path:
    lines = []
    for line in saved.read_text().splitlines():
        event = json.loads(line)
        kind = event.pop("kind")
        event = poisoned(event, evil)
        for name in ("options", "versions"):
            if name in event:
                event[name] = {k + evil: v for k, v in event[name].items()}
        for change in event.get("changes", ()):
            change["factors"] = {k + evil: v for k, v in change["factors"].items()}
        lines.append(json.dumps({"kind": kind, **event}))
    path = folder / "poisoned.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


class Page(HTMLParser):
    """The tags of a page with the names of their attributes, and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[tuple[str, tuple[str, ...]]] = set()
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add((tag, tuple(name for name, _ in attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.mark.parametrize("evil", EVIL)
def test_names_are_text_on_the_page(saved: Path, tmp_path: Path, evil: str) -> None:
    """In every place at once: the page has the tags, attributes and code that it has without."""
    harmless = Page(render(run_file.read(saved)))
    page = Page(render(run_file.read(poisoned_file(saved, evil, tmp_path))))
    assert page.tags == harmless.tags
    assert not any(name.startswith("on") for _, names in page.tags for name in names)
    assert len(page.scripts) == 2
    assert page.scripts[1] == harmless.scripts[1]
    assert json.loads(page.scripts[0])["lanes"][0]["param"].endswith(printable(evil))
    assert printable(evil).split()[0] in page.text


@pytest.mark.parametrize("evil", EVIL)
def test_names_are_text_in_the_terminal(saved: Path, tmp_path: Path, evil: str) -> None:
    path = poisoned_file(saved, evil, tmp_path)
    result = CliRunner().invoke(app, ["report", str(path)], env={"COLUMNS": "200"}, color=True)
    assert result.exit_code == 0, result.stderr
    shown = re.sub(r"\x1b\[[\d;]*m", "", result.stdout)  # our own colours
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert f"AdamW{printable(evil)} after" in " ".join(shown.split()) or len(evil) > 40


def test_printable() -> None:
    assert printable("exp_avg σ\n\t") == "exp_avg σ\n\t"
    assert printable("\x1b[2J\x9b\x00\u202e") == "\\x1b[2J\\x9b\\x00\\u202e"
    assert one_line("no such\nfile: \x1b]0;x\x07") == "no such file: \\x1b]0;x\\x07"


# Nothing is executed. -------------------------------------------------------------------------

FORBIDDEN = (
    "exec",
    "compile",
    "os.system",
    "subprocess.Popen",
    "ctypes.dlopen",
    "pickle.find_class",
)
_watched: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched and event in FORBIDDEN:
        _watched[-1].append(f"{event} {arguments!r:.200}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is executed in the block, as the interpreter's audit events report it."""
    if not getattr(sys, "_stq_audited", False):
        sys.addaudithook(_hook)  # stays for ever
        sys._stq_audited = True  # type: ignore[attr-defined]
    _watched.append([])
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def test_the_watch_sees_what_is_executed() -> None:
    with watched() as events:
        eval("1 + 1")
    assert len(events) == 2


CODE = "__import__('os').system('touch /tmp/owned')"


def test_a_run_file_executes_nothing(saved: Path, tmp_path: Path) -> None:
    path = poisoned_file(saved, CODE, tmp_path)
    with watched() as events:
        run = run_file.read(path)
    assert not events
    assert CODE in run.optimizer


def test_a_checkpoint_executes_nothing() -> None:
    model = make_model()
    optimizer = planned(model)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    saved = optimizer.state_dict()
    saved["stq"] = {**saved["stq"], "precision": CODE}
    saved["param_groups"][0]["note"] = CODE
    with watched() as events:
        optimizer.load_state_dict(saved)
    assert not events
    for state in saved["state"].values():
        for entry in state.values():
            if isinstance(entry, dict):
                entry["format"] = CODE
    with watched() as events, pytest.raises(CheckpointError, match="__import__"):
        optimizer.load_state_dict(saved)
    assert not events


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/owned",)


def test_a_checkpoint_with_a_payload_is_refused_by_torch(tmp_path: Path) -> None:
    """Our form needs nothing that ``weights_only=True`` does not give, and so it can be asked."""
    model = make_model()
    optimizer = planned(model)
    backward(model, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    torch.save(saved, tmp_path / "good.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "good.pt", weights_only=True))
    torch.save({**saved, "stq": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        torch.load(tmp_path / "bad.pt", weights_only=True)


ALLOWED = {
    "graph_text.py": {"eval"},  # the graph of a script that the user runs
    "repro.py": {"run_path"},  # that script
    "targets.py": {"exec_module", "import_module"},  # the user's own optimizer
    "__init__.py": {"import_module"},  # our own modules
    "contenders.py": {"import_module"},
    "aot.py": {"import_module", "run"},
    "load.py": {"import_module"},
    "doctor.py": {"run"},
    "measure.py": {"run"},
    "compiler.py": {"Popen"},
    "steps.py": {"compile"},  # the user's own step, from its source
}
EXECUTING = {
    "eval", "exec", "compile", "run_path", "run_module", "exec_module", "import_module", "system",
    "popen", "Popen", "check_output", "check_call", "loads", "Unpickler", "__import__",
}  # fmt: skip
OF_OTHERS = {
    ("torch", "compile"), ("re", "compile"), ("json", "loads"), ("api", "compile"),
    ("stq", "compile"), ("triton", "compile"), ("session", "compile"), ("backend", "compile"),
    ("platform", "system"),
}  # fmt: skip


def test_only_known_places_execute_anything() -> None:
    found: dict[str, set[str]] = {}
    for package in (stq, passes, codegen):
        for file in Path(str(package.__file__)).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                owner = node.func.value if isinstance(node.func, ast.Attribute) else None
                whose = getattr(owner, "id", getattr(owner, "attr", ""))
                shell = any(k.arg == "shell" for k in node.keywords)
                pickled = name == "load" and whose in ("pickle", "torch", "dill")
                runs = name in EXECUTING or (name == "run" and whose == "subprocess")
                if (runs and (whose, name) not in OF_OTHERS) or shell or pickled:
                    found.setdefault(file.name, set()).add(name)
    unknown = {file: names - ALLOWED.get(file, set()) for file, names in found.items()}
    assert not {file: names for file, names in unknown.items() if names}


# Paths. ---------------------------------------------------------------------------------------


def test_a_run_is_not_written_through_a_link(saved: Path, tmp_path: Path) -> None:
    """Whatever another user has put where the unfinished file will be."""
    run = run_file.read(saved)
    victim, path = tmp_path / "victim", tmp_path / "run.jsonl"
    victim.write_text("precious")
    (tmp_path / f"run.jsonl.{os.getpid()}.partial").symlink_to(victim)
    run_file.save(run, path)
    assert victim.read_text() == "precious"
    assert run_file.read(path) == run
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run.jsonl", "victim"]


def test_a_page_does_not_replace_its_run(saved: Path, tmp_path: Path) -> None:
    before = saved.read_text()
    (tmp_path / "link").symlink_to(saved)
    for target in (str(saved), str(tmp_path / "link")):
        result = CliRunner().invoke(app, ["report", str(saved), "--html", target])
        assert result.exit_code == 2
        assert "the run itself" in result.stderr
    assert saved.read_text() == before


@pytest.mark.parametrize("name", ["a b;touch x", "$(touch x)", "-rf", "ä\nö", "%s{0}[red]", "..a"])
def test_names_of_files_are_names(
    saved: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(saved.read_text())
    page = name + ".html"
    result = CliRunner().invoke(app, ["report", "--html", page, "--", name])
    assert result.exit_code == 0, result.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([name, page])


def test_a_script_that_shows_a_failure_lies_in_a_folder_of_its_user() -> None:
    """It is going to be run, so nobody else may write it, or guess where it will lie."""
    failures._private_folder.cache_clear()
    folder = failures._private_folder()
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.geteuid()
        assert folder == failures._private_folder()
    finally:
        folder.rmdir()
        failures._private_folder.cache_clear()
