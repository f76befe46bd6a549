"""Parameter shapes of well-known models, for looking at an optimizer without a model.

GPT-2 as in Radford et al. (2019) with the names of its released weights, Llama 3 as in Grattafiori
et al. (2024), ViT as in Dosovitskiy et al. (2021) at 224 x 224 with torchvision's names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

Shapes = dict[str, tuple[int, ...]]
"""Shape of every parameter by name, in the model's order."""


def gpt2(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """The output head shares the embedding's weight."""
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for i in range(layers):
        shapes |= _named(f"h.{i}.ln_1", (width,), (width,))
        shapes |= _named(f"h.{i}.attn.c_attn", (width, 3 * width), (3 * width,))
        shapes |= _named(f"h.{i}.attn.c_proj", (width, width), (width,))
        shapes |= _named(f"h.{i}.ln_2", (width,), (width,))
        shapes |= _named(f"h.{i}.mlp.c_fc", (width, 4 * width), (4 * width,))
        shapes |= _named(f"h.{i}.mlp.c_proj", (4 * width, width), (width,))
    return shapes | _named("ln_f", (width,), (width,))


def llama(
    layers: int, width: int, hidden: int, key_value: int = 1024, vocabulary: int = 128256
) -> Shapes:
    """Grouped-query attention: keys and values have ``key_value`` rows."""
    shapes: Shapes = {"embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        rows = {"q_proj": width, "k_proj": key_value, "v_proj": key_value, "o_proj": width}
        for name, row in rows.items():
            shapes[f"layers.{i}.self_attn.{name}.weight"] = (row, width)
        shapes[f"layers.{i}.mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"layers.{i}.mlp.up_proj.weight"] = (hidden, width)
        shapes[f"layers.{i}.mlp.down_proj.weight"] = (width, hidden)
        shapes[f"layers.{i}.input_layernorm.weight"] = (width,)
        shapes[f"layers.{i}.post_attention_layernorm.weight"] = (width,)
    return shapes | {"norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def vit(layers: int, width: int, patch: int, classes: int = 1000, image: int = 224) -> Shapes:
    shapes: Shapes = {
        "class_token": (1, 1, width),
        **_named("conv_proj", (width, 3, patch, patch), (width,)),
        "encoder.pos_embedding": (1, (image // patch) ** 2 + 1, width),
    }
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        shapes |= _named(f"{layer}.ln_1", (width,), (width,))
        shapes[f"{layer}.self_attention.in_proj_weight"] = (3 * width, width)
        shapes[f"{layer}.self_attention.in_proj_bias"] = (3 * width,)
        shapes |= _named(f"{layer}.self_attention.out_proj", (width, width), (width,))
        shapes |= _named(f"{layer}.ln_2", (width,), (width,))
        shapes |= _named(f"{layer}.mlp.0", (4 * width, width), (4 * width,))
        shapes |= _named(f"{layer}.mlp.3", (width, 4 * width), (width,))
    shapes |= _named("encoder.ln", (width,), (width,))
    return shapes | _named("heads.head", (classes, width), (classes,))


def _named(prefix: str, weight: tuple[int, ...], bias: tuple[int, ...]) -> Shapes:
    return {f"{prefix}.weight": weight, f"{prefix}.bias": bias}


MODELS: dict[str, Callable[[], Shapes]] = {
    "gpt2": partial(gpt2, 12, 768),
    "gpt2-medium": partial(gpt2, 24, 1024),
    "gpt2-large": partial(gpt2, 36, 1280),
    "gpt2-xl": partial(gpt2, 48, 1600),
    "llama-8b": partial(llama, 32, 4096, 14336),
    "llama-70b": partial(llama, 80, 8192, 28672),
    "vit-b": partial(vit, 12, 768, 16),
    "vit-l": partial(vit, 24, 1024, 16),
    "vit-h": partial(vit, 32, 1280, 14),
}
