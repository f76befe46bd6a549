"""A byte-level GPT of about a million parameters, and the English text it is trained on.

The text comes with every Python installation, so nothing is downloaded: the language reference
that `help()` shows (`pydoc_data.topics`), followed by the docstrings of the standard library in the
order of their paths.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 4096  # bytes; every tenth chunk of the text is held out for validation
HELD_OUT = 10
MAX_TEXT = 2_000_000  # bytes
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; `context` is in bytes.

    `initial_std` is 0.75 / sqrt(width): from GPT-2's 0.02 the loss after 700 steps was 2.52 nats,
    from 0.06 it was 1.98.
    """

    layers: int = 4
    width: int = 160
    heads: int = 4
    context: int = 128
    vocabulary: int = 256
    initial_std: float = 0.06


class Block(nn.Module):
    """Pre-norm attention and MLP, without biases."""

    def __init__(
        self, width: int, heads: int, *, causal: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.dropout(mixed)
        hidden = self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh"))
        out: Tensor = x + self.dropout(hidden)
        return out


def initialize(model: nn.Module, layers: int, std: float) -> None:
    """As in GPT-2: normal, and narrower where a layer ends in the residual stream."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
    for module in model.modules():
        if isinstance(module, Block):
            residual_std = std / (2 * layers) ** 0.5
            nn.init.normal_(module.attention_out.weight, std=residual_std)
            nn.init.normal_(module.mlp_out.weight, std=residual_std)


class TinyGPT(nn.Module):
    """Bytes in, logits of the next byte out: [batch, length] -> [batch, length, 256]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        initialize(self, config.layers, config.initial_std)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy in nats a byte of windows [batch, context + 1]."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@dataclass(frozen=True)
class Text:
    """A text as bytes (uint8, one dimension), split into a training and a validation part."""

    name: str
    train: Tensor
    valid: Tensor

    def batch(self, generator: torch.Generator, size: int, context: int) -> Tensor:
        """`size` random training windows, int64 [size, context + 1]."""
        starts = torch.randint(len(self.train) - context, (size, 1), generator=generator)
        return self.train[starts + torch.arange(context + 1)].long()

    def valid_windows(self, context: int, limit: int) -> Tensor:
        """At most `limit` windows spread evenly over the validation part; always the same ones."""
        count = min(limit, (len(self.valid) - 1) // context)
        starts = torch.linspace(0, len(self.valid) - 1 - context, count).long()
        return self.valid[starts[:, None] + torch.arange(context + 1)].long()


def load_text(file: Path | None = None) -> Text:
    """The text of `file`, or the one that comes with Python.

    Raises ValueError where the text is too short to be split.
    """
    if file is None:
        name, data = "Python's own documentation", python_text()
    else:
        name, data = file.name, file.read_bytes()
    if len(data) < 2 * HELD_OUT * CHUNK:
        raise ValueError(f"{name}: {len(data)} bytes of text, need {2 * HELD_OUT * CHUNK} or more")
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    held_out = range(HELD_OUT - 1, len(chunks), HELD_OUT)
    return Text(
        name,
        train=_as_tensor(b"".join(c for i, c in enumerate(chunks) if i not in held_out)),
        valid=_as_tensor(b"".join(chunks[i] for i in held_out)),
    )


def python_text() -> bytes:
    """Up to `MAX_TEXT` bytes of documentation from this Python installation."""
    parts = [topics[name] for name in sorted(topics)]
    size = sum(len(part.encode()) for part in parts)
    for docstring in _docstrings(Path(sysconfig.get_paths()["stdlib"])):
        if size > MAX_TEXT:
            break
        parts.append(docstring)
        size += len(docstring.encode())
    return "\n\n".join(parts).encode()[:MAX_TEXT]


def _docstrings(folder: Path) -> Iterator[str]:
    """The docstrings of 80 characters and more below `folder`, each text once."""
    seen: set[str] = set()
    for file in sorted(folder.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(file.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates and the like, not modules
            continue
        for text in _docstrings_of(tree):
            if len(text) >= 80 and text not in seen:
                seen.add(text)
                yield text


def _docstrings_of(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings_of(inner)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
