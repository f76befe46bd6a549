"""What a user names on the command line, made into an optimizer whose step can be captured.

A target is a class (``AdamW``, ``torch.optim.Muon``, ``lion_pytorch.Lion``), made on parameters of
given shapes that hold no memory, or ``module:callable`` or ``file.py:callable``, called as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.optim import Muon, Optimizer

from stq_compile.architectures import MODELS, Shapes
from stq_compile.errors import InvalidTargetError
from stq_compile.printable import printable

ONE_MATRIX: Shapes = {"weight": (128, 64)}
"""What a class is made on if no model is named."""

MATRICES_ONLY: tuple[type[Optimizer], ...] = (Muon,)
"""Optimizers that take no parameter of another dimension than 2."""


def make_optimizer(
    target: str, shapes: Shapes | None = None, arguments: Mapping[str, Any] | None = None
) -> Optimizer:
    """The optimizer that a target names.

    Args:
        target: a class, or a callable that returns an optimizer; see the module.
        shapes: of the parameters that a class gets; a callable brings its own.
        arguments: keyword arguments of a class.

    Raises:
        InvalidTargetError: there is no such thing, it fails, or gives no optimizer.
    """
    found = _find(target)
    if not callable(found):
        raise InvalidTargetError(target=target, reason=f"it is a {type(found).__name__}")
    if isinstance(found, type) and issubclass(found, Optimizer):
        return _from_class(target, found, shapes or ONE_MATRIX, arguments or {})
    given = "shapes" if shapes else "arguments" if arguments else ""
    if given:
        raise InvalidTargetError(
            target=target, reason=f"{given} are for a class; a callable brings its own parameters"
        )
    made = _called(target, found)
    if not isinstance(made, Optimizer):
        raise InvalidTargetError(
            target=target, reason=f"it returns a {type(made).__name__}, not an optimizer"
        )
    return made


def read_shapes(model: str | None, file: Path | None) -> Shapes | None:
    """Shapes of a built-in model, or of a JSON file: ``{"name": [rows, columns], ...}``.

    Raises:
        InvalidTargetError: both are given, there is no such model, or the file says something else.
    """
    if model is not None and file is not None:
        raise InvalidTargetError(target=model, reason="give --model or --shapes, not both")
    if model is not None:
        if model not in MODELS:
            raise InvalidTargetError(
                target=model, reason=f"no such model; the models are {', '.join(MODELS)}"
            )
        return MODELS[model]()
    return None if file is None else _read_file(file)


def _read_file(file: Path) -> Shapes:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidTargetError(target=file, reason=f"not readable: {error}") from error
    rows = found.items() if isinstance(found, dict) else ()
    shapes = {n: tuple(s) for n, s in rows if isinstance(s, list) and all(map(_is_size, s))}
    shapes = {printable(name): shape for name, shape in shapes.items()}
    if not shapes or len(shapes) != len(rows):
        raise InvalidTargetError(
            target=file, reason='no shapes; it should hold JSON like {"name": [128, 64]}'
        )
    return shapes


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _find(target: str) -> Any:
    place, colon, name = target.rpartition(":")
    if not colon:
        place, _, name = target.rpartition(".")
        place = place or "torch.optim"
    if not place or not name:
        raise InvalidTargetError(
            target=target, reason="write a class, module:callable or file.py:callable"
        )
    module = _called(target, lambda: _load(place))
    if not hasattr(module, name):
        what = "torch.optim has no such optimizer" if place == "torch.optim" else ""
        raise InvalidTargetError(target=target, reason=what or f"{place} has no {name!r}")
    return getattr(module, name)


def _load(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no such file: {place}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _called(target: str, function: Callable[[], Any]) -> Any:
    """Call what belongs to the user; whatever it raises is about the target."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InvalidTargetError(target=target, reason=reason) from error


def _from_class(
    target: str, cls: Callable[..., Optimizer], shapes: Shapes, arguments: Mapping[str, Any]
) -> Optimizer:
    """An instance on fake tensors: they have shapes and the device "cpu", and no memory.

    (On the meta device an optimizer takes its branches for accelerators, so that the graph is
    another.)
    """
    if cls in MATRICES_ONLY:
        shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [(name, torch.nn.Parameter(torch.empty(shape))) for name, shape in shapes.items()]
    made: Optimizer = _called(target, lambda: cls(params, **arguments))
    return made
