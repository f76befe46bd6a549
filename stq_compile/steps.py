"""The function that is captured in the place of ``optimizer.step``.

It is the step of the optimizer's class without torch's wrappers. A class that goes on from another
one's step calls that with its wrappers, which break the graph:

    def step(self, closure=None):                       def step(self, closure=None):
        self.clip()                               ->        self.clip()
        return super().step(closure)                        return base_step(self, closure)

so such calls are bound to the inherited step without them, and so on down the classes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import types
from collections.abc import Callable
from typing import Any

from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim import optimizer as optim

_COUNTER = itertools.count()

BASE_STEP = "_stq_base_step"
"""The free variable that stands for ``super().step``."""


def raw_step(cls: type[Optimizer]) -> Callable[..., Any]:
    """``cls.step`` without torch's profiling and gradient-mode wrappers."""
    step: Callable[..., Any] = inspect.unwrap(cls.step)
    return step


def captured_step(cls: type[Optimizer]) -> Callable[..., Any]:
    """`raw_step`, with the inherited steps that it calls as well."""
    return _with_inherited(raw_step(cls), cls)


def own_code(function: Callable[..., Any]) -> types.FunctionType:
    """A copy with a code object of its own, under a name of its own.

    Dynamo's cache and its recompile limit belong to a code object, and what it remembers of inputs
    that changed belongs to a name; optimizers of one class should share neither.
    """
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{next(_COUNTER)}"
    return _copied(function, function.__code__.replace(co_name=name), function.__closure__)


def _with_inherited(function: Callable[..., Any], cls: type[Optimizer]) -> Callable[..., Any]:
    """A function of ``cls`` with ``super().step`` bound to the inherited step."""
    if not isinstance(function, types.FunctionType):
        return function
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    owner = cells["__class__"].cell_contents if "__class__" in cells else None
    if owner not in cls.__mro__:
        return function
    above = cls.__mro__[cls.__mro__.index(owner) + 1 :]
    base: Any = next((vars(c)["step"] for c in above if "step" in vars(c)), None)
    code = None if base is None else _rewritten(function, list(cells))
    if code is None:
        return function
    cells[BASE_STEP] = types.CellType(_with_inherited(inspect.unwrap(base), cls))
    return _copied(function, code, tuple(cells[name] for name in code.co_freevars))


def _rewritten(function: types.FunctionType, free: list[str]) -> types.CodeType | None:
    """The code with ``super().step(...)`` as ``BASE_STEP(self, ...)``; None if there is no such
    call, or if the source is not to be had or does not stand alone."""
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return None
    step = tree.body[0]
    if not isinstance(step, ast.FunctionDef) or not step.args.args or _is_mangled(step):
        return None
    binding = _Binding(step.args.args[0].arg)
    binding.visit(step)
    if not binding.found:
        return None
    step.decorator_list.clear()
    names = [ast.arg(name) for name in (*free, BASE_STEP)]
    arguments = ast.arguments([], names, None, [], [], None, [])
    outer = ast.FunctionDef("outer", arguments, [step], [], lineno=1, col_offset=0)
    module = ast.fix_missing_locations(ast.Module([outer], []))
    ast.increment_lineno(module, start - 1)
    compiled = compile(module, function.__code__.co_filename, "exec", dont_inherit=True)
    return _code_in(_code_in(compiled, "outer"), step.name)


class _Binding(ast.NodeTransformer):
    def __init__(self, receiver: str) -> None:
        self.receiver = receiver
        self.found = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node.func:
            case ast.Attribute(ast.Call(ast.Name("super"), []), "step"):
                self.found = True
                receiver = ast.Name(self.receiver, ast.Load())
                function = ast.Name(BASE_STEP, ast.Load())
                call = ast.Call(function, [receiver, *node.args], node.keywords)
                return ast.copy_location(call, node)
        return node


def _is_mangled(step: ast.FunctionDef) -> bool:
    """Whether a name has two underscores in front, which Python completes by the class's name."""
    names = [getattr(n, "attr", "") or getattr(n, "id", "") for n in ast.walk(step)]
    return any(name.startswith("__") and not name.endswith("__") for name in names)


def _code_in(code: types.CodeType, name: str) -> types.CodeType:
    """The code of a function that is defined in another one's."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    return next(inner)


def _copied(
    function: types.FunctionType, code: types.CodeType, cells: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, cells
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def followed_step(step: Callable[..., Any], optimizer: Optimizer) -> Callable[..., Any]:
    """``step`` as torch wraps it, with profilers and hooks that hear of it.

    torch's wrapper takes a third of a small step, so it is left out of a step that nobody follows.
    (Whether an `ExecutionTraceObserver` listens, torch does not tell: where no profiler does, it
    misses the name of the step.) A closure may register a hook that is to run after its own step.
    """
    # A wrapper that never called Optimizer.__init__ has no hooks, and its step runs none.
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return step
    wrapped = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def bound(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or _is_followed(self):
            return wrapped(self, *args, **kwargs)
        return step(self)

    return bound


def _is_followed(optimizer: Optimizer) -> bool:
    """Whether a profiler is at work, or a hook is to be called."""
    hooks: Any = optimizer
    return bool(
        profiler._is_profiler_enabled
        or hooks._optimizer_step_pre_hooks
        or hooks._optimizer_step_post_hooks
        or optim._global_optimizer_pre_hooks
        or optim._global_optimizer_post_hooks
    )
