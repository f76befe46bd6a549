"""Fixtures of the tests of the examples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tinygpt import CHUNK, HELD_OUT


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and wait for it where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Chunks that are each filled with a byte of their own."""
    file = tmp_path / "text.txt"
    file.write_bytes(b"".join(bytes([chunk]) * CHUNK for chunk in range(3 * HELD_OUT)))
    return file
