"""What can be known of GPUs without one: capture, devices of everything that is made, refusals.

A fake tensor (torch's `FakeTensorMode`) says that it is on a CUDA device and has no memory. Where a
build of torch without CUDA cannot copy those, torch's device ``meta`` stands for one: a tensor
there does not go together with the CPU's, so an operation that forgot the device of its arguments
fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.variables.optimizer import OptimizerVariable
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

from device_runs import CASES
from stq_compile import PackedState, reference, rounding
from stq_compile.codegen import backend
from stq_compile.codegen.backend import BACKENDS, check_device
from stq_compile.codegen.target import parse_target
from stq_compile.codegen.triton.backend import TritonBackend, target_of
from stq_compile.errors import TritonMissingError, UnsupportedDeviceError
from stq_compile.formats import CONSTANT, FORMATS, Format
from stq_compile.inspection import inspect_optimizer
from stq_compile.options import Options
from stq_compile.rounding import NEAREST, Noise
from stq_compile.storage import PackedStorage

CUDA, META = torch.device("cuda", 0), torch.device("meta")
SHAPES = ((128, 64), (300, 7), (64,))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, for what runs nothing on it. torch moves step counters to the device,
    which is not there; kernels are told where they are by other means (`Session.move_counters`)."""
    monkeypatch.setitem(BACKENDS, "cuda", TritonBackend(lambda device: parse_target("cuda:90")))
    monkeypatch.setattr(OptimizerVariable, "move_step_if_cpu", lambda self: None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {}),
        ("AdamW", {"capturable": True}),
        ("SGD", {"momentum": 0.9}),
        ("RMSprop", {}),
        ("Adagrad", {}),
    ],
)
def test_a_step_on_cuda_is_one_template(name: str, options: dict[str, Any], hopper: None) -> None:
    """torch takes its ``foreach`` code there; kernels are Triton's, for all tensors at once."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [Parameter(torch.empty(shape, device=CUDA)) for shape in SHAPES]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = getattr(torch.optim, name)(params, **options)
        group = optimizer.param_groups[0]
        lists = {"AdamW": 6, "SGD": 3, "RMSprop": 6, "Adagrad": 4}
        optimizer._init_group(group, *([] for _ in range(lists[name])))
    for entries in optimizer.state.values():
        entries.update({k: torch.tensor(0.0) for k, v in entries.items() if v.ndim == 0})
    found = inspect_optimizer(optimizer, Options.from_dict({"precision": 4, "min_numel": 1}))
    assert len(found.front.units) == 1
    (unit,) = found.quantized.units
    assert (len(unit.instances), unit.unfused, unit.device) == (len(SHAPES), "", CUDA)
    tensors = [o for i in unit.instances for o in i.operands if o.shape != () or o.role == "codes"]
    assert {o.device for o in tensors} == {CUDA}


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if f != CONSTANT], ids=str)
def test_codes_are_made_where_the_values_are(format: Format) -> None:
    values = torch.empty(1000, device=META)
    unit = torch.empty(1000, device=META) if format.normalized else None
    for noise in (Noise(7), NEAREST):
        codes, scales = reference.encode(values, format, noise, unit)
        decoded = reference.decode(codes, scales, format, 1000, unit)
        assert {codes.device, scales.device, decoded.device} == {META}


def test_the_check_sees_a_tensor_that_was_made_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rounding.random_bits
    monkeypatch.setattr(rounding, "random_bits", lambda *args: made(*args[:3]))
    with pytest.raises(RuntimeError, match="expected device"):
        reference.encode(torch.empty(1000, device=META), FORMATS["softsign4"], Noise(7))


def test_a_packed_state_is_on_the_device_of_its_storage() -> None:
    like = torch.empty(30, 40, device=META)
    state = PackedState.zeros_like(like, FORMATS["softsign4"], device=META)
    storage = PackedStorage(1200, CONSTANT, device=META)
    assert {state.device, state.view(-1).device, state.detach().device} == {META}
    assert {storage.codes.device, storage.scales.device, storage.device} == {META}
    _, context = state.__tensor_flatten__()
    stand_in = PackedState.__tensor_unflatten__({"_anchor": state._anchor}, context, None, None)
    assert stand_in.device == META


# What runs on a GPU alone is ready. ------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_tests_are_found_and_say_why_they_are_skipped() -> None:
    """Each with its reason: nothing fails where there is no GPU, down to the imports."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("test_gpu.py"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    reasons = re.findall(r"SKIPPED \[(\d+)\] \S+: needs a CUDA GPU", done.stdout)
    skipped = sum(map(int, reasons))
    assert re.match(rf"{skipped} skipped in", done.stdout.splitlines()[-1])
    assert skipped > len(CASES) + 49  # runs, pairs of widths, and more


# What is refused. -----------------------------------------------------------------------------


def test_a_device_without_a_code_generator_is_refused() -> None:
    with pytest.raises(UnsupportedDeviceError, match="weight is on device xpu:0"):
        check_device(torch.device("xpu", 0), "weight")


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UnsupportedDeviceError, match=r"cuda:75.*compute capability below 8\.0"):
        check_device(CUDA, "weight")


def test_a_gpu_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert target_of(CUDA) == parse_target("cuda:90")
    properties = type("Properties", (), {"gcnArchName": "gfx942:sramecc+:xnack-"})
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert target_of(CUDA) == parse_target("hip:gfx942")


def test_without_triton_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with pytest.raises(TritonMissingError, match="pip install triton"):
        check_device(CUDA, "weight")


def test_the_cpu_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    check_device(torch.device("cpu"), "weight")
    assert backend.backend_of(torch.device("cpu")).target(torch.device("cpu")).tables
