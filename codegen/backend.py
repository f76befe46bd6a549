"""Code generators, and which device each one is for: the seam between compiler and run time.

A backend makes kernels executable; what it makes takes a table of tensors (`stq_compile.runtime`)
and runs it step by step. Everything above asks for the backend of a device and knows no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from stq_compile.codegen.cpp.backend import CppBackend
from stq_compile.codegen.executable import Executable
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.target import Target
from stq_compile.codegen.triton.backend import TritonBackend
from stq_compile.errors import UnsupportedDeviceError, UnsupportedTargetError


class Backend(Protocol):
    """One code generator."""

    def target(self, device: torch.device) -> Target:
        """What the device can do.

        Raises:
            StqError: the device is too old, or what it needs is not installed.
        """

    suffix: str
    """Of a file of its source."""

    def emit(self, kernel: Kernel) -> str:
        """The source."""

    def compile(self, kernels: Sequence[Kernel], device: torch.device) -> list[Executable]:
        """Emit and build; raises `StqError`."""


BACKENDS: dict[str, Backend] = {"cpu": CppBackend(), "cuda": TritonBackend()}
"""By type of device; AMD's GPUs are of torch's type ``cuda``, too."""


def backend_of(device: torch.device) -> Backend:
    """The backend of a device that `check_device` lets pass."""
    return BACKENDS[device.type]


def check_device(device: torch.device, source: object) -> None:
    """Whether steps can be run on the device of ``source``.

    Raises:
        UnsupportedDeviceError: there is no backend, or the device is too old for it.
        TritonMissingError: kernels for it need Triton, which is not there.
    """
    reason = "there is no code generator for it"
    if device.type in BACKENDS:
        try:
            BACKENDS[device.type].target(device)
        except UnsupportedTargetError as error:
            reason = str(error)
        else:
            return
    raise UnsupportedDeviceError(source=source, device=device, reason=reason)
