"""Optimizers as functional step graphs, written by hand.

They use no `alpha`, so that every node is one float32 operation.
"""

from __future__ import annotations

from torch import fx

from graphs import Sketch, aten
from stq_compile.step_graph import Facts, StepGraph

LR = 0.01
BETAS = (0.9, 0.99)
EPS = 1e-8

add, sub, mul, div, sqrt = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.sqrt.default,
)  # fmt: skip


def descend(s: Sketch, p: fx.Node, update: fx.Node) -> fx.Node:
    return s.call(sub, p, s.call(mul, update, LR))


def sgd() -> StepGraph:
    """``momentum_buffer' = 0.9 momentum_buffer + grad; param' = param - lr momentum_buffer'``."""
    s = Sketch("sgd")
    p, g, m = s.param(), s.grad(), s.state("momentum_buffer")
    new = s.call(aten.add.Tensor, s.call(aten.mul.Tensor, m, 0.9), g)
    return s.functional({m: new, p: s.call(aten.sub.Tensor, p, s.call(aten.mul.Tensor, new, LR))})


def averages(s: Sketch, g: fx.Node, m: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """``exp_avg'`` and ``exp_avg_sq'`` as sums of two products."""
    kept = s.call(aten.mul.Tensor, m, BETAS[0])
    new_m = s.call(aten.add.Tensor, kept, s.call(aten.mul.Tensor, g, 1 - BETAS[0]))
    square = s.call(aten.mul.Tensor, s.call(aten.mul.Tensor, g, g), 1 - BETAS[1])
    return new_m, s.call(aten.add.Tensor, s.call(aten.mul.Tensor, v, BETAS[1]), square)


def adam(facts: Facts = Facts()) -> StepGraph:  # noqa: B008
    """Adam without bias corrections."""
    s = Sketch("adam")
    p, g, m, v = s.param(), s.grad(), s.state("exp_avg"), s.state("exp_avg_sq")
    new_m, new_v = averages(s, g, m, v)
    root = s.call(aten.add.Tensor, s.call(aten.sqrt.default, new_v), EPS)
    update = s.call(aten.mul.Tensor, s.call(aten.div.Tensor, new_m, root), LR)
    return s.functional({m: new_m, v: new_v, p: s.call(aten.sub.Tensor, p, update)}, facts)


ADAM_FACTS = Facts(frozenset({"exp_avg_sq"}), {"exp_avg": "exp_avg_sq"})


def amsgrad() -> StepGraph:
    """AdamW with decay, a step counter, bias corrections and the running maximum of v."""
    s = Sketch("amsgrad")
    p, g, m, v = s.param(), s.grad(), s.state("exp_avg"), s.state("exp_avg_sq")
    top, step = s.state("max_exp_avg_sq"), s.counter()
    new_step = s.call(add, step, 1)
    new_m, new_v = averages(s, g, m, v)
    new_top = s.call(aten.maximum.default, top, new_v)
    correction = s.call(sub, 1, s.call(aten.pow.Scalar, 0.99, new_step))
    root = s.call(div, s.call(sqrt, new_top), s.call(sqrt, correction))
    update = s.call(div, new_m, s.call(add, root, EPS))
    decayed = s.call(mul, p, 1 - LR * 0.1)
    writes = {m: new_m, v: new_v, top: new_top, step: new_step, p: descend(s, decayed, update)}
    return s.functional(writes)


def rmsprop(*, centered: bool) -> StepGraph:
    s = Sketch("rmsprop")
    p, g, v, mean = s.param(), s.grad(), s.state("square_avg"), s.state("grad_avg")
    buf = s.state("momentum_buffer")
    new_mean, new_v = averages(s, g, mean, v)
    variance = new_v
    if centered:
        square = s.call(mul, new_mean, new_mean)
        variance = s.call(sub, new_v, square, at="rmsprop.py:9 avg = v - m * m")
    root = s.call(sqrt, variance, at="rmsprop.py:10 avg.sqrt()")
    new_buf = s.call(add, s.call(mul, buf, 0.9), s.call(div, g, s.call(add, root, EPS)))
    writes = {v: new_v, buf: new_buf, p: descend(s, p, new_buf)}
    return s.functional(writes | ({mean: new_mean} if centered else {}))


def adagrad() -> StepGraph:
    s = Sketch("adagrad")
    p, g, total = s.param(), s.grad(), s.state("sum")
    new = s.call(add, total, s.call(mul, g, g))
    update = s.call(div, g, s.call(add, s.call(sqrt, new), EPS))
    return s.functional({total: new, p: descend(s, p, update)})


def adamax() -> StepGraph:
    s = Sketch("adamax")
    p, g, m, top = s.param(), s.grad(), s.state("exp_avg"), s.state("exp_inf")
    new_m, _ = averages(s, g, m, m)
    magnitude = s.call(add, s.call(aten.abs.default, g), EPS)
    new_top = s.call(aten.maximum.default, s.call(mul, top, 0.999), magnitude)
    return s.functional({m: new_m, top: new_top, p: descend(s, p, s.call(div, new_m, new_top))})


def lion() -> StepGraph:
    s = Sketch("lion")
    p, g, m = s.param(), s.grad(), s.state("exp_avg")
    mix = s.call(add, s.call(mul, m, 0.9), s.call(mul, g, 0.1))
    new_m = s.call(add, s.call(mul, m, 0.99), s.call(mul, g, 0.01))
    update = s.call(aten.sign.default, mix)
    return s.functional({m: new_m, p: descend(s, p, update)})
