"""What a captured step must be like to be compiled; refused before any state is touched."""

from __future__ import annotations

import torch

from stq_compile.errors import (
    UnsupportedDeviceError,
    UnsupportedParameterError,
    UnsupportedStateError,
)
from stq_compile.packed_state import is_dense
from stq_compile.step_graph import Operand, Program, Role, StepGraph, location_of


def check_dtypes(program: Program) -> None:
    """Before anything is analysed: passes compute with the types that they see."""
    for unit in program.units:
        for operand in unit.operands:
            if operand.role in (Role.PARAM, Role.GRAD) and operand.dtype != torch.float32:
                raise UnsupportedParameterError(
                    optimizer=program.optimizer,
                    source=operand.source,
                    reason=f"the {operand.role} is {operand.dtype}; only float32 is supported",
                )


def check_program(program: Program) -> None:
    """Shapes, layouts and devices of every instance of an analysed program."""
    for unit in program.units:
        for instance in unit.instances:
            _check_operands(program.optimizer, unit, instance.operands)


def _check_operands(optimizer: str, unit: StepGraph, operands: tuple[Operand, ...]) -> None:
    param = next(o for o in operands if o.role is Role.PARAM)
    for operand, node in zip(operands, unit.placeholders, strict=True):
        if operand.role in (Role.PARAM, Role.GRAD):
            reason = _param_defect(operand, param)
            if reason:
                raise UnsupportedParameterError(
                    optimizer=optimizer, source=operand.source, reason=reason
                )
            if operand.device.type != "cpu":
                raise UnsupportedDeviceError(
                    source=operand.source, device=operand.device, valid="cpu"
                )
        elif operand.role is Role.STATE:
            reason = _state_defect(operand, param)
            if reason:
                raise UnsupportedStateError(
                    optimizer=optimizer,
                    state=operand.source.key,
                    source=operand.source.name,
                    reason=reason,
                    location=operand.location or next((location_of(u) for u in node.users), ""),
                )


def _param_defect(operand: Operand, param: Operand) -> str:
    if operand.shape != param.shape:
        return f"the gradient has shape {operand.shape}, the parameter {param.shape}"
    dense = torch.empty_strided(operand.shape, operand.stride, device="meta")
    if operand.role is Role.PARAM and not is_dense(dense):
        return f"its memory is not dense (size {operand.shape}, strides {operand.stride})"
    return ""


def _state_defect(operand: Operand, param: Operand) -> str:
    if operand.dtype != torch.float32:
        return f"it is {operand.dtype}; only float32 states are supported so far"
    if operand.shape not in ((), param.shape):
        return f"its shape {operand.shape} is not the parameter's {param.shape}"
    if operand.shape != () and operand.stride != param.stride:
        return f"its strides {operand.stride} are not the parameter's {param.stride}"
    return ""
