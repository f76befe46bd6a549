"""Every verb of ``stq`` on three optimizers, as text and as JSON, and its errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from schemas import SCHEMAS, check
from stq_compile import architectures, doctor
from stq_compile.benchmarks import growth, measure
from stq_compile.cli import app
from stq_compile.cli.common import Subject
from stq_compile.cli.flags import FLAGS, options_from
from stq_compile.errors import InvalidOptionError
from stq_compile.options import Options

INSPECTED: dict[Any, Any] = {}
"""Captures are shared: Dynamo takes seconds for those of GPT-2."""

SOURCE = """
import torch
from lion_pytorch import Lion

def make():
    return Lion([torch.nn.Parameter(torch.ones(100, 60))], lr=0.1)
def momentum():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(100, 60))], lr=0.1, momentum=0.9)
def wrong():
    return 3
def fails():
    raise RuntimeError("no data\\nhere")
"""


@pytest.fixture(scope="module", autouse=True)
def shared_captures() -> Iterator[None]:
    original = Subject.inspect

    def inspect(self: Subject, *, whole: bool = True) -> Any:
        key = (Path(self.target).name, repr(sorted(self.given.items())), whole)
        if key not in INSPECTED:
            INSPECTED[key] = original(self, whole=whole)
        return INSPECTED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subject, "inspect", inspect)
        yield
    INSPECTED.clear()


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("targets") / "mine.py"
    file.write_text(SOURCE)
    return f"{file}:make"


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, args, env={"COLUMNS": "100"})
    return result.exit_code, result.stdout, result.stderr


def read(*args: str) -> Any:
    """The JSON of a verb that succeeds, checked against its schema."""
    code, text, errors = run(*args, "--json")
    assert code == 0, errors
    found = json.loads(text)
    check(args[0], found)
    return found


# Every verb. ----------------------------------------------------------------------------------

ADAMW = ("AdamW", "--model", "gpt2")
MUON = ("torch.optim.Muon", "--model", "gpt2")


@pytest.fixture(params=["adamw", "lion"])
def target(request: pytest.FixtureRequest, mine: str) -> tuple[str, ...]:
    return ADAMW if request.param == "adamw" else (mine,)


def test_trace(target: tuple[str, ...]) -> None:
    code, text, errors = run("trace", *target)
    assert (code, errors) == (0, "")
    found = read("trace", *target)
    assert text == found["graph"] + "\n"
    assert found["refused"] is None
    params = [i for i in found["inputs"] if i["role"] == "param"]
    if target == ADAMW:
        assert len(params) == 148
        assert "adam.py:" in text
        assert "state  float32[50257, 768] wte.weight:exp_avg_sq" in text
    else:
        assert len(params) == 1
        assert "lion_pytorch.py:" in text


def test_trace_of_what_is_refused_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that reads undefined memory stands for all that cannot be compiled."""
    code, text, errors = run("trace", "refused_target:make")
    assert code == 0
    assert "torch.empty_like" in text
    (line,) = errors.strip().splitlines()
    assert line.startswith("stq: not compiled: Undefined, group0.param0: ")
    found = read("trace", "refused_target:make")
    assert found["refused"] in line
    code, text, errors = run("passes", "refused_target:make")
    assert code == 2
    assert "fold" in text
    assert "partition" not in text
    assert len(errors.strip().splitlines()) == 1
    code, text, errors = run("kernels", "refused_target:make")
    assert (code, text) == (2, "")


def test_passes(target: tuple[str, ...]) -> None:
    code, text, _ = run("passes", *target)
    assert code == 0
    rows = read("passes", *target)["passes"]
    names = [row["name"] for row in rows]
    assert names[0] == "expand_foreach"
    assert names[-1] == "feed"
    for row, after in itertools.pairwise(rows):
        assert row["nodes_after"] == after["nodes_before"]
        assert f" {row['name']} " in text
    fold = rows[names.index("fold")]
    if target == ADAMW:
        assert (fold["graphs_before"], fold["graphs_after"]) == (148, 1)
        assert "148 → 1" in text
    assert rows[names.index("quantize")]["nodes_after"] > fold["nodes_after"]


def test_show(target: tuple[str, ...]) -> None:
    code, text, _ = run("show", *target, "--after", "quantize")
    assert code == 0
    found = read("show", *target, "--after", "quantize")
    assert text == found["graph"] + "\n"
    assert "torch.ops.stq.quantize" in text


def test_diff(target: tuple[str, ...]) -> None:
    code, text, _ = run("diff", *target[:1], "functionalize", *target[1:])
    assert code == 0
    found = read("diff", *target[:1], "functionalize", *target[1:])
    assert found["before"] == "widen"
    changed = [row for row in found["rows"] if row["what"] == "changed"]
    assert any("mul_(" in r["before"] and "aten.mul.Tensor" in r["after"] for r in changed)
    assert "before functionalize" in text
    assert "aten.mul.Tensor" in text
    places = [row["before"] for row in found["rows"] if row["what"] == "source"]
    assert all(".py:" in place for place in places)
    assert places


def test_diff_of_a_pass_that_changes_nothing(mine: str) -> None:
    code, text, _ = run("diff", mine, "ranges")
    assert code == 0
    assert text.strip().endswith("make") or "ranges changed nothing" in text
    assert read("diff", mine, "ranges")["rows"] == []


def test_diff_says_how_much_it_left_out(mine: str) -> None:
    code, text, _ = run("diff", mine, "functionalize", "--rows", "3")
    assert code == 0
    assert "more rows; --rows 0 shows all" in text


def test_facts(target: tuple[str, ...]) -> None:
    code, text, _ = run("facts", *target)
    assert code == 0
    rows = {row["state"]: row for row in read("facts", *target)["facts"]}
    if target == ADAMW:
        square = rows["exp_avg_sq"]
        assert (square["sign"], square["kind"], square["tensors"]) == (">= 0", "average", 148)
        assert square["recurrence"] == "exp_avg_sq' = 0.999·exp_avg_sq + 0.001·grad^2"
        assert square["amplification"] == 500.2501
        assert rows["exp_avg"]["normalizer"] == "exp_avg_sq"
        assert "√exp_avg_sq" in text
    else:
        assert rows["exp_avg"]["recurrence"] == "exp_avg' = 0.99·exp_avg + 0.01·grad"
        assert "flips are counted" in rows["exp_avg"]["sensitivity"]
        assert "0.99: average" in text


def test_kernels(target: tuple[str, ...]) -> None:
    code, text, _ = run("kernels", *target)
    assert code == 0
    rows = read("kernels", *target)["kernels"]
    assert sum(row["tensors"] for row in rows) == (148 if target == ADAMW else 1)
    for row in rows:
        assert row["source"] in text
        assert (row["target"], row["registers"]) == ("cpu", None)


def test_kernels_follow_the_options(mine: str) -> None:
    (kernel,) = read("kernels", mine, "--precision", "4")["kernels"]
    assert "stq::pack<4>" in kernel["source"]
    assert kernel["bytes_per_param"] == 13.03125  # p twice, g, codes twice, scales twice
    (kernel,) = read("kernels", mine, "--precision", "exp_avg=6")["kernels"]
    assert kernel["widths"] == {"exp_avg_0": 6}


def test_kernels_for_a_gpu_that_is_not_here(mine: str) -> None:
    target = mine.replace(":make", ":momentum")
    arguments = ("kernels", target, "--target", "cuda:90", "--precision", "4")
    (kernel,) = read(*arguments)["kernels"]
    assert (kernel["target"], kernel["widths"]) == ("cuda:90", {"momentum_buffer_0": 4})
    assert kernel["template"] == "template_0"
    assert 0 < kernel["registers"] <= 128
    assert (kernel["spill_bytes"], kernel["shared_bytes"], kernel["barriers"]) == (0, 0, 0)
    assert kernel["bytes_per_param"] == 13.0312
    assert "def update(" in kernel["source"]
    code, text, _ = run(*arguments)
    assert code == 0
    assert "registers" in text
    code, _, errors = run("kernels", target, "--target", "cuda:60")
    assert code == 2
    assert "the targets are cpu, cuda:80" in errors


def test_plan(target: tuple[str, ...]) -> None:
    code, text, _ = run("plan", *target)
    assert code == 0
    found = read("plan", *target, "--largest", "2")
    assert len(found["tensors"]) == (2 if target == ADAMW else 1)
    assert found["holdings"]["fp32"]["parameters"] == 4 * found["elements"]
    assert found["fits"]["packed"] == {"24 GB": True, "40 GB": True, "80 GB": True}
    if target == ADAMW:
        assert found["elements"] == 124_439_808
        assert "124.4 M parameters" in text
        assert found["bits_per_element"] < 4
    assert f"{found['bits_per_element']:.2f} true bits per element" in text


def test_the_plan_keeps_to_a_budget_and_is_sharded() -> None:
    found = read("plan", *ADAMW, "--target-bits", "4", "--world-size", "8")
    assert 3.9 < found["bits_per_element"] <= 4
    holding = found["holdings"]["packed"]
    assert holding["parameters"] == pytest.approx(4 * 124_439_808 / 8, rel=0.001)
    code, text, _ = run("plan", *ADAMW, "--target-bits", "4", "--world-size", "8")
    assert code == 0
    assert "on each of 8 GPUs" in text


def test_verbs_on_muon() -> None:
    """Two kernels for a matrix: every verb says what runs operator by operator, and why."""
    found = read("trace", *MUON)
    assert sum(i["role"] == "param" for i in found["inputs"]) == 50  # the matrices
    assert "_muon.py:" in found["graph"]
    assert found["refused"] is None
    code, text, _ = run("trace", *MUON)
    assert code == 0
    assert text == found["graph"] + "\n"
    for arguments in (
        ("passes", *MUON), ("show", *MUON, "--after", "functionalize"),
        ("diff", MUON[0], "functionalize", *MUON[1:]), ("plan", *MUON),
    ):  # fmt: skip
        code, _, _ = run(*arguments)
        assert code == 0, arguments
        read(*arguments)
    for verb in ("facts", "kernels"):
        found = read(verb, *MUON)
        assert sum(row["tensors"] for row in found[verb]) == {"facts": 50, "kernels": 100}[verb]
        assert all(region["cut"] for region in found["regions"])
        assert sum(region["tensors"] for region in found["regions"]) == 50
        assert all(region["states"] == ["momentum_buffer"] for region in found["regions"])
        code, text, _ = run(verb, *MUON)
        assert code == 0
        assert "operator by operator" in " ".join(text.split())


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = read("doctor")["findings"]
    found = {f["name"]: f for f in findings}
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding(**f) for f in findings])
    code, text, _ = run("doctor")
    assert code == 0
    assert found["step on the cpu"]["ok"] is True
    assert "works" in found["step on the cpu"]["found"]
    assert found["triton kernel for cuda:90"]["ok"] is True
    assert found["torch"]["found"] in text
    assert "c++ compiler" in text


def test_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a few small shapes; the picture and the text show what the JSON holds."""
    monkeypatch.setitem(architectures.MODELS, "gpt2", lambda: {"w": (96, 64), "b": (64,)})
    monkeypatch.setattr(measure, "memory_bandwidth", lambda **_: 3.2e10)
    monkeypatch.setattr(growth, "PARAMETERS", (8192,))
    monkeypatch.setattr(growth, "TENSORS", (2, 4))
    found = read("bench", "--optimizer", "sgd", "--rounds", "2", "--growth")
    names = [t["name"] for t in found["timings"]]
    assert names == ["torch fused", "torch foreach", "stq 4", "stq 8", "stq 3", "stq auto"]
    assert found["timings"][0]["ratio"] == 1
    by_tensors = found["growth"]["us per further tensor, by tensors"]
    assert [point["size"] for point in by_tensors] == [2, 4]
    picture = tmp_path / "bench.png"
    code, text, _ = run("bench", "--optimizer", "sgd", "--rounds", "2", "--picture", str(picture))
    assert code == 0
    assert all(name in text for name in names)
    assert "sgd on gpt2: 0.0 M parameters" in text
    assert picture.exists()


@pytest.mark.parametrize("arguments", [("--model", "gpt9"), ("--optimizer", "adam9")])
def test_bench_names_what_there_is(arguments: tuple[str, str]) -> None:
    code, _, errors = run("bench", *arguments)
    assert code == 2
    assert "it is none of" in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_says_that_there_is_no_gpu() -> None:
    code, _, errors = run("bench", "--device", "cuda", "--peers")
    assert code == 2
    assert "torch finds no GPU on this machine" in errors


def test_doctor_passes_over_files_that_vanish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a kernel that another process builds at that time."""
    (tmp_path / "kept").write_bytes(b"1234")
    walk = [(str(tmp_path), [], ["kept", "gone"])]
    monkeypatch.setattr(doctor.os, "walk", lambda folder: walk)
    assert list(doctor._sizes(tmp_path)) == [4]


def test_doctor_says_what_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("no such luck\nat all")

    monkeypatch.setattr(doctor, "_cpu_step", broken)
    monkeypatch.setattr(doctor, "_triton_kernel", lambda: "not tried")
    code, text, _ = run("doctor")
    assert code == 1
    assert "RuntimeError: no such luck" in text
    assert "at all" not in text


# Targets and options. -------------------------------------------------------------------------


def test_every_option_has_a_flag_of_its_name() -> None:
    assert {*FLAGS, "record", "on_nonfinite"} == {f.name for f in dataclasses.fields(Options)}
    code, text, _ = run("plan", "--help")
    assert code == 0
    for name in FLAGS:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"precision": ["4"]}, {"precision": 4}),
        ({"precision": ["exp_avg=4", "h.*:v=3"]}, {"precision": {"exp_avg": 4, "h.*:v": 3}}),
        ({"precision": ["8", "exp_avg=4"]}, {"precision": {"*": 8, "exp_avg": 4}}),
        ({"ladder": "2,4,8", "exclude": ["a"]}, {"ladder": (2, 4, 8), "exclude": ["a"]}),
        ({"target_bits": 4.0, "seed": 0}, {"target_bits": 4.0, "seed": 0}),
    ],
)
def test_flags_become_options(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert options_from({**dict.fromkeys(FLAGS), **given}) == expected


@pytest.mark.parametrize("given", [{"precision": ["four"]}, {"ladder": "2,,3"}])
def test_flags_that_are_no_numbers(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError, match="whole numbers of bits"):
        options_from({**dict.fromkeys(FLAGS), **given})


def test_shapes_from_a_file_and_arguments(tmp_path: Path) -> None:
    file = tmp_path / "shapes.json"
    file.write_text('{"a.weight": [64, 128], "a.bias": [64]}')
    found = read("trace", "SGD", "--shapes", str(file), "--arg", "momentum=0.5")
    states = {i["param"]: i["shape"] for i in found["inputs"] if i["role"] == "state"}
    assert states == {"a.weight": [64, 128], "a.bias": [64]}
    assert "0.5" in found["graph"]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("trace", "Adamm"), "no such optimizer"),
        (("trace", "lion_pytorch.Tiger"), "has no 'Tiger'"),
        (("trace", "nowhere:make"), "No module named"),
        (("trace", "nowhere.py:make"), "no such file"),
        (("trace", ":"), "write a class"),
        (("trace", "math:pi"), "it is a float"),
        (("trace", "{mine}:wrong"), "returns a int"),
        (("trace", "{mine}:fails"), "RuntimeError: no data here"),
        (("trace", "{mine}:missing"), "has no 'missing'"),
        (("trace", "{broken}:make"), "ZeroDivisionError"),
        (("trace", "{exits}:make"), "SystemExit"),
        (("trace", "AdamW", "--model", "gpt5"), "the models are gpt2,"),
        (("trace", "AdamW", "--shapes", "nowhere.json"), "not readable"),
        (("trace", "AdamW", "--shapes", "{mine}"), "not readable"),
        (("trace", "AdamW", "--shapes", "{numbers}"), "no shapes"),
        (("trace", "AdamW", "--model", "gpt2", "--shapes", "{numbers}"), "not both"),
        (("trace", "{mine}:make", "--model", "gpt2"), "brings its own parameters"),
        (("trace", "AdamW", "--arg", "lr"), "write NAME=VALUE"),
        (("trace", "AdamW", "--arg", "rate=3"), "unexpected keyword"),
        (("show", "SGD", "--after", "nothing"), "no such pass; the passes are expand_foreach"),
        (("diff", "SGD", "nothing"), "no such pass"),
        (("kernels", "LBFGS"), "line search"),
        (("kernels", "AdamW", "--precision", "7"), "the widths are"),
        (("facts", "AdamW", "--precision", "exp_avgg=4"), "matches no state of any parameter"),
        (("kernels", "AdamW", "--target-bits", "4", "--tolerance", "0.1"), "contradict"),
        (("plan", "AdamW", "--target-bits", "0.5"), "budget"),
        (("report", "nowhere.jsonl"), "not readable"),
        (("report", "{mine}"), "line 1: no JSON"),
        (("report", "{numbers}"), "line 1: not as expected"),
        (("repro", "nowhere.py"), "not readable"),
        (("repro", "{mine}"), "no script that stq_compile wrote"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(
    args: tuple[str, ...], reason: str, mine: str, tmp_path: Path
) -> None:
    files = {"broken": "1 / 0", "exits": "raise SystemExit(0)", "numbers": "[1, 2]"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    names = {name: str(tmp_path / f"{name}.py") for name in files}
    names["mine"] = mine.removesuffix(":make")
    code, text, errors = run(*(a.format(**names) for a in args))
    assert (code, text) == (2, "")
    assert reason in errors
    assert len(errors.strip().splitlines()) == 1
    assert "Traceback" not in errors


def test_a_traceback_is_shown_when_asked_for(mine: str) -> None:
    code, _, errors = run("trace", mine.replace(":make", ":fails"), "--traceback")
    assert code == 2
    assert "Traceback" in errors
    assert 'raise RuntimeError("no data' in errors


# The command itself. --------------------------------------------------------------------------


def stq(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "stq"), *args]
    return subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_help_does_not_wait_for_torch() -> None:
    """CPU seconds, since other work may run beside the tests; torch alone takes more than one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = stq("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    for verb in (file.stem for file in SCHEMAS.glob("*.json")):
        assert verb in done.stdout


def test_every_verb_has_a_schema_and_an_example() -> None:
    _, text, _ = run("--help")
    verbs = {file.stem for file in SCHEMAS.glob("*.json")}
    listed = {c.name or c.callback.__name__ for family in app.registered_groups
              for c in family.typer_instance.registered_commands}  # fmt: skip
    assert verbs == listed
    for verb in verbs:
        code, text, _ = run(verb, "--help")
        assert code == 0
        assert f"stq {verb}" in text.split("Example", 1)[1]
        assert "--json" in text


def test_shells_can_complete() -> None:
    done = stq("", _STQ_COMPLETE="complete_bash", COMP_WORDS="stq tr", COMP_CWORD="1")
    assert done.stdout.strip() == "trace"


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error() -> None:
    line = "stq trace AdamW --model vit-b --json | head -c 10; echo ${PIPESTATUS[0]}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert (done.stdout.splitlines()[-1], done.stderr) == ('{"optimize0', "")


# Not ru_maxrss: that begins with what the process had that started this one.
MEASURED = """
import re, resource, sys
from pathlib import Path
from stq_compile.cli import app
try:
    app()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = re.search(r"VmHWM:[ \\t]+([0-9]+)", Path("/proc/self/status").read_text())[1]
    print(used.ru_utime + used.ru_stime, most, file=sys.stderr)
"""


def test_planning_a_llama_takes_seconds_and_little_memory() -> None:
    """The seconds are the processor's: 723 parameters, 70 billion elements, one process."""
    arguments = ("plan", "AdamW", "--model", "llama-70b", "--target-bits", "4", "--json")
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stderr.split())
    assert seconds < 10
    assert kilobytes < 1e6
    found = json.loads(done.stdout)
    check("plan", found)
    assert (found["parameters"], found["elements"]) == (723, 70_553_706_496)
    assert found["bits_per_element"] <= 4
    assert found["fits"]["packed"] == {"24 GB": False, "40 GB": False, "80 GB": False}
