"""Packed layout: 128 codes of ``w`` bits in ``16 * w`` bytes, and back.

Element ``e`` of a block is lane ``e % 16`` of plane ``e // 16``. A width is a sum of
power-of-two fields (`formats.FIELDS`), stored one after the other, low bits first. A field of
``b`` bits takes ``16 * b`` bytes; its byte ``16 * c + lane`` holds plane ``c`` in its low bits
and planes ``c + b``, ``c + 2 b``, ... above it. No lane ever moves across a register.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stq_compile.formats import FIELDS, LANES, PLANES


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack int codes ``[blocks, 128]`` into uint8 ``[blocks, 16 * width]``."""
    planes = codes.view(-1, PLANES, LANES)
    packed = torch.empty(planes.shape[0], LANES * width, dtype=torch.uint8, device=codes.device)
    offset = shift = 0
    for bits in FIELDS[width]:
        field = (planes >> shift) & ((1 << bits) - 1)
        for chunk in range(bits):
            byte = torch.zeros_like(field[:, 0])
            for k, plane in enumerate(range(chunk, PLANES, bits)):
                byte |= field[:, plane] << (bits * k)
            packed[:, offset : offset + LANES] = byte.to(torch.uint8)
            offset += LANES
        shift += bits
    return packed


def unpack(packed: Tensor, width: int) -> Tensor:
    """Unpack uint8 ``[blocks, 16 * width]`` into int32 codes ``[blocks, 128]``."""
    shape = (packed.shape[0], PLANES, LANES)
    planes = torch.zeros(shape, dtype=torch.int32, device=packed.device)
    offset = shift = 0
    for bits in FIELDS[width]:
        for chunk in range(bits):
            byte = packed[:, offset : offset + LANES].to(torch.int32)
            for k, plane in enumerate(range(chunk, PLANES, bits)):
                planes[:, plane] |= ((byte >> (bits * k)) & ((1 << bits) - 1)) << shift
            offset += LANES
        shift += bits
    return planes.view(-1, PLANES * LANES)
