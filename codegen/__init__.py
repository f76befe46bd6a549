"""Code generation: a quantized template becomes a kernel in a small IR, then source, then code."""
