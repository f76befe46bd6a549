"""The Triton target: `emit` writes source, `kernel` runs it, `aot` compiles it without a GPU."""
