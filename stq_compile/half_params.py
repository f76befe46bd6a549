"""What a compiled step does with 16-bit parameters where no kernel does it: in regions.

A region of a widened graph computes on float32 copies of one parameter's tensors. Its parameter is
read with its error, if it has one, and rounded as kernels round it, by `halves`. The error states
themselves are made here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stq_compile.formats import ULP8
from stq_compile.halves import HALF_DTYPES, error_of, half_of, rounded, with_error
from stq_compile.options import ParamRounding
from stq_compile.packed_state import PackedState, memory_order
from stq_compile.rounding import Noise, step_key, stream_id
from stq_compile.shards import local, wrap
from stq_compile.step_graph import PARAM_ERROR, PARAM_ROUNDING, Operand, Program, Role, Source
from stq_compile.storage import Replacement


class Rounded(NamedTuple):
    """What a parameter is to hold, of its type, and what its error state is to hold."""

    param: Tensor
    error: Replacement | None = None


@dataclass(frozen=True)
class HalfParams:
    """Reads and rounds 16-bit parameters as an optimizer's options say.

    ``errors`` are the error states of compensated parameters, by the parameter's number.
    """

    rounding: ParamRounding
    errors: Mapping[int, Tensor]
    seed: Callable[[], int]

    def read(self, operand: Operand, param: Tensor) -> Tensor:
        """The value of a parameter, float32 of its shape."""
        if self.rounding != "compensated":
            return param.detach().float()
        error = local(self.errors[operand.source.param])
        assert isinstance(error, PackedState)
        return with_error(param.detach().float(), error.dequantize(), half_of(param.dtype))

    def rounded(self, operand: Operand, param: Tensor, value: Tensor, step: int) -> Rounded:
        """``value``, float32, as it is to be written into a parameter; changes nothing.

        ``step`` counts the steps before.
        """
        if self.rounding == "nearest":
            return Rounded(value.to(param.dtype))
        half, uniform = half_of(param.dtype), None
        ordered = torch.empty_like(param, dtype=torch.float32).copy_(value)  # dense
        if self.rounding == "stochastic":
            stream = stream_id(operand.source.param, PARAM_ROUNDING)
            key = step_key(self.seed(), step, stream)
            first = 0 if operand.region is None else operand.region.first_block
            flat = Noise(key).of_elements(param.numel(), first, param.device)
            uniform = flat.as_strided(ordered.size(), ordered.stride())
        on_grid = rounded(ordered, half, uniform)
        new = on_grid.to(param.dtype)
        if self.rounding != "compensated":
            return Rounded(new)
        error = local(self.errors[operand.source.param])
        assert isinstance(error, PackedState)
        left = error_of(ordered, on_grid, half)
        return Rounded(new, error.packed.encoded(memory_order(left)))


def uncompensated(program: Program) -> Iterator[tuple[int, Source]]:
    """The parameters of a program that need an error state: number and source of the state."""
    for unit in program.units:
        for instance in unit.instances if unit.widened else ():
            for operand in instance.operands:
                if operand.role is Role.PARAM and operand.dtype in HALF_DTYPES:
                    source = operand.source
                    yield source.param, Source(source.param, source.name, PARAM_ERROR)


def new_error(param: Tensor, **storage: Any) -> Tensor:
    """The error state of a parameter that is exact: zeros in the format ``ulp8``."""
    held = local(param)
    like = torch.empty_like(held, device="meta")
    return wrap(PackedState.zeros_like(like, ULP8, device=held.device, **storage), param)
