"""Triton for GPUs: `TritonBackend`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stq_compile.codegen.executable import Executable
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.target import Target, parse_target
from stq_compile.codegen.triton.emit import emit
from stq_compile.codegen.triton.kernel import MEASURED_BLOCKS, WARPS
from stq_compile.codegen.triton.load import require_triton
from stq_compile.codegen.triton.run import TritonExecutable


def target_of(device: torch.device) -> Target:
    """The target of a CUDA or ROCm device; raises `UnsupportedTargetError`."""
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return parse_target(f"hip:{arch}")
    major, minor = torch.cuda.get_device_capability(device)
    return parse_target(f"cuda:{major}{minor}")


class TritonBackend:
    """A `stq_compile.codegen.backend.Backend`.

    ``blocks``: of a tile of a step, and of a measuring one; None for what suits the target.
    """

    suffix = ".py"

    def __init__(
        self,
        target_of: Callable[[torch.device], Target] = target_of,
        blocks: tuple[int, int] | None = None,
    ) -> None:
        self._target_of = target_of
        self._blocks = blocks

    def emit(self, kernel: Kernel) -> str:
        return emit(kernel).source

    def target(self, device: torch.device) -> Target:
        require_triton()
        return self._target_of(device)

    def compile(self, kernels: Sequence[Kernel], device: torch.device) -> list[Executable]:
        target = self.target(device)
        blocks = self._blocks or (target.blocks_per_warp * WARPS, MEASURED_BLOCKS)
        return [TritonExecutable.of(kernel, device, *blocks) for kernel in kernels]
